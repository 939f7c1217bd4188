"""Haystack's filters as conditions of d2llm's filter language (``store.filters``).

Haystack handles nulls as Python does: a missing value differs from every other value, and a negation is true whenever
its condition is not. In SQL neither is the case, so every comparison written here is made either true or false.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

import numpy as np

from d2llm.core.errors import FilterError

_COMPARISONS = {"==": "=", ">": ">", ">=": ">=", "<": "<", "<=": "<="}


def as_condition(filters: Mapping[str, Any]) -> str:
    """Translate a filter into an equivalent condition.

    Raises:
        FilterError: the filter is not valid in Haystack, or uses something that an index does not have.
    """
    operator = filters.get("operator")
    if "conditions" in filters and operator in ("AND", "OR", "NOT"):
        parts = [as_condition(condition) for condition in filters["conditions"]]
        if not parts:
            raise FilterError(f"filters: {operator} has no conditions; give it one")
        joined = f" {'OR' if operator == 'OR' else 'AND'} ".join(parts)
        return f"NOT ({joined})" if operator == "NOT" else f"({joined})"
    if not {"field", "operator", "value"} <= filters.keys():
        raise FilterError(
            f"filters {dict(filters)!r:.100}: give field, operator and value, or the operator AND, OR or NOT with "
            "conditions"
        )
    field = str(filters["field"])
    if field in ("content", "score", "embedding", "blob"):
        raise FilterError(f"filters: '{field}' cannot be used; use metadata fields, id or title")
    return _comparison(field.removeprefix("meta."), operator, filters["value"])


def _comparison(field: str, operator: object, value: Any) -> str:
    if operator == "!=":
        return f"NOT {_comparison(field, '==', value)}"
    if operator == "not in":
        return f"NOT {_comparison(field, 'in', value)}"
    if operator == "in":
        if not isinstance(value, list | tuple | set):
            raise FilterError(f"filters: 'in' on '{field}' needs a list of values, but has {value!r:.60}")
        if not value:
            return "(id IS NULL)"  # true for no passage
        return f"({field} IN ({', '.join(_written(field, item) for item in value)}) AND {field} IS NOT NULL)"
    if operator not in _COMPARISONS:
        raise FilterError(
            f"filters: there is no operator {operator!r}; use {', '.join(_COMPARISONS)}, !=, in, not in, AND, OR or NOT"
        )
    if value is None and operator == "==":
        return f"({field} IS NULL)"
    return f"({field} {_COMPARISONS[str(operator)]} {_written(field, value)} AND {field} IS NOT NULL)"


def _written(field: str, value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | date):
        text = value if isinstance(value, str) else value.isoformat()
        return "'" + text.replace("'", "''") + "'"
    raise FilterError(f"filters: '{field}' is compared with {value!r:.60}; use a text, number, boolean or time")
