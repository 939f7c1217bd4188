"""Filters of other libraries as conditions of d2llm's filter language (``store.filters``).

These libraries handle missing values as Python does: a missing value differs from every other value, and a negation is
true whenever its condition is not. In SQL neither is the case, so every comparison written here is made either true or
false. A passage without a title or document has an empty text there instead of null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, cast

from d2llm.core.errors import FilterError
from d2llm.core.plain_values import plain_value

_COMPARISONS = {"==": "=", ">": ">", ">=": ">=", "<": "<", "<=": "<="}
_DICTIONARY_OPERATORS = {
    "$eq": "==",
    "$ne": "!=",
    "$gt": ">",
    "$gte": ">=",
    "$lt": "<",
    "$lte": "<=",
    "$in": "in",
    "$nin": "not in",
}
_LLAMA_INDEX_OPERATORS = {name: name for name in ("==", "!=", ">", ">=", "<", "<=", "in")} | {"nin": "not in"}
_EMPTY_TEXTS = ("title", "document_id")
_NOTHING = "(id IS NULL)"  # true for no passage


def all_of(conditions: Sequence[str | None]) -> str | None:
    """One condition that is true where all of these are; None if there are none."""
    given = [part for part in conditions if part]
    return " AND ".join(f"({part})" for part in given) if len(given) > 1 else next(iter(given), None)


def one_of(field: str, values: Sequence[str]) -> str:
    """A condition that a field has one of these values."""
    return _comparison(field, "in", values)


def haystack_condition(filters: Mapping[str, Any]) -> str:
    """The condition that a filter of Haystack stands for.

    Raises:
        FilterError: the filter is not valid in Haystack, or uses something that an index does not have.
    """
    if not isinstance(filters, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may pass anything
        raise FilterError(f"filters: a dictionary is needed, but {type(filters).__name__} was given ({filters!r:.60})")
    operator = filters.get("operator")
    if "conditions" in filters and operator in ("AND", "OR", "NOT"):
        conditions = filters["conditions"]
        if not isinstance(conditions, list | tuple):
            raise FilterError(f"filters: {operator} needs a list of conditions, but has {conditions!r:.60}")
        return _joined(operator, [haystack_condition(item) for item in cast("list[Any]", conditions)])
    if not {"field", "operator", "value"} <= filters.keys():
        raise FilterError(
            f"filters {dict(filters)!r:.100}: give field, operator and value, or the operator AND, OR or NOT with "
            "conditions"
        )
    field = str(filters["field"])
    if field in ("content", "score", "embedding", "blob"):
        raise FilterError(f"filters: '{field}' cannot be used; use metadata fields, id or title")
    field = field.removeprefix("meta.")
    if operator not in (*_COMPARISONS, "!=", "in", "not in"):
        raise FilterError(
            f"filters: there is no operator {operator!r}; use {', '.join(_COMPARISONS)}, !=, in, not in, AND, OR or NOT"
        )
    return _comparison(field, operator, filters["value"])


def dictionary_condition(filters: object) -> str | None:
    """The condition that a dictionary stands for, as many of LangChain's vector stores read it; None for an empty one.

    ``{"year": 2020, "language": ["de", "en"]}`` compares fields with a value, or with several. A comparison is a
    dictionary, as in ``{"year": {"$gte": 2020, "$lt": 2024}}``: ``$eq``, ``$ne``, ``$gt``, ``$gte``, ``$lt``, ``$lte``,
    ``$in``, ``$nin``, ``$between``, ``$like`` or ``$exists``. ``$and``, ``$or`` and ``$not`` join conditions.

    Raises:
        FilterError: it is no dictionary, or has something else.
    """
    if callable(filters) or not isinstance(filters, Mapping):
        raise FilterError(
            f'filter: {type(filters).__name__} cannot be used; give a condition such as "year >= 2020 AND language = '
            "'en'\", or a dictionary such as {'year': {'$gte': 2020}, 'language': 'en'}"
        )
    entries = [_entry(str(name), value) for name, value in cast("Mapping[object, Any]", filters).items()]
    return _joined("AND", entries) if entries else None


def llama_index_condition(filters: Any) -> str | None:
    """The condition that LlamaIndex's ``MetadataFilters`` stand for; None if there are none.

    Raises:
        FilterError: it is something else, or an operator does not suit fields that have one value.
    """
    if isinstance(filters, Mapping):
        return dictionary_condition(cast("Mapping[str, Any]", filters))
    if not hasattr(filters, "filters"):
        raise FilterError(f"filters: MetadataFilters or a dictionary is needed, but {type(filters).__name__} was given")
    converted = [
        llama_index_condition(member) if hasattr(member, "filters") else _llama_index_comparison(member)
        for member in filters.filters
    ]
    operator = str(getattr(filters.condition, "value", filters.condition) or "and").upper()
    given = [part for part in converted if part]
    if operator == "NOT":  # none of them is true
        return _joined("NOT", [_joined("OR", given)]) if given else None
    return _joined(operator, given) if given else None


def _llama_index_comparison(comparison: Any) -> str:
    operator = str(getattr(comparison.operator, "value", comparison.operator))
    if operator in _LLAMA_INDEX_OPERATORS:
        return _comparison(comparison.key, _LLAMA_INDEX_OPERATORS[operator], comparison.value)
    if operator in ("text_match", "contains") and isinstance(comparison.value, str):
        return _like(comparison.key, f"%{_escaped(comparison.value)}%")
    if operator == "is_empty":
        return _missing(comparison.key)
    raise FilterError(
        f"filters: '{comparison.key}' cannot be compared by {operator!r} with {comparison.value!r:.60}: fields have "
        f"one value, and texts are compared as they are written; use {', '.join(_LLAMA_INDEX_OPERATORS)}, text_match "
        "or is_empty"
    )


def _entry(name: str, value: Any) -> str:
    """The condition of one entry of a dictionary."""
    if name in ("$and", "$or"):
        if not isinstance(value, list | tuple):
            raise FilterError(f"filter: {name} needs a list of conditions, but has {value!r:.60}")
        conditions = [dictionary_condition(item) for item in cast("list[object]", value)]
        if None in conditions:
            raise FilterError(f"filter: a condition of {name} is empty; leave it out")
        return _joined(name[1:].upper(), [str(condition) for condition in conditions])
    if name == "$not":
        condition = dictionary_condition(value)
        if condition is None:
            raise FilterError("filter: the condition of $not is empty; leave it out")
        return f"NOT {condition}"
    if name.startswith("$"):
        raise FilterError(f"filter: {name!r} joins no conditions; use $and, $or or $not, or the name of a field")
    if isinstance(value, Mapping):
        comparisons = cast("Mapping[object, Any]", value).items()
        if not comparisons:
            raise FilterError(f"filter: '{name}' is compared with nothing; give a value, or {{'$eq': value}}")
        return _joined("AND", [_operation(name, str(operator), operand) for operator, operand in comparisons])
    return _comparison(name, "in" if isinstance(value, list | tuple | set | frozenset) else "==", value)


def _operation(field: str, operator: str, value: Any) -> str:
    if operator == "$not" and isinstance(value, Mapping):
        return f"NOT {_entry(field, value)}"
    if operator == "$between":
        if not isinstance(value, list | tuple) or len(cast("list[object]", value)) != 2:
            raise FilterError(f"filter: $between on '{field}' needs two values, but has {value!r:.60}")
        low, high = cast("list[object]", value)
        return _joined("AND", [_comparison(field, ">=", low), _comparison(field, "<=", high)])
    if operator == "$like" and isinstance(value, str):
        return _like(field, value)
    if operator == "$exists" and isinstance(value, bool):
        return f"NOT {_missing(field)}" if value else _missing(field)
    if operator not in _DICTIONARY_OPERATORS:
        known = ", ".join([*_DICTIONARY_OPERATORS, "$between", "$like", "$exists"])
        raise FilterError(f"filter: '{field}' cannot be compared by {operator!r} with {value!r:.60}; use {known}")
    return _comparison(field, _DICTIONARY_OPERATORS[operator], value)


def _joined(operator: str, conditions: Sequence[str]) -> str:
    if not conditions:
        raise FilterError(f"filters: {operator} has no conditions; give it one")
    joined = f" {'OR' if operator == 'OR' else 'AND'} ".join(conditions)
    grouped = joined if len(conditions) == 1 else f"({joined})"
    return f"NOT {grouped}" if operator == "NOT" else grouped


def _comparison(field: str, operator: str, value: Any) -> str:
    if operator == "!=":
        return f"NOT {_comparison(field, '==', value)}"
    if operator == "not in":
        return f"NOT {_comparison(field, 'in', value)}"
    name, given = _quoted(field), f"NOT {_missing(field)}"
    if operator == "in":
        if not isinstance(value, list | tuple | set | frozenset):
            raise FilterError(f"filters: 'in' on '{field}' needs a list of values, but has {value!r:.60}")
        values = [plain_value(item) for item in cast("list[object]", value)]
        written = ", ".join(_written(field, item) for item in values if item is not None)
        conditions = [f"({name} IN ({written}) AND {given})"] if written else []
        conditions += [_missing(field)] if None in values else []
        return _joined("OR", conditions) if conditions else _NOTHING
    value = plain_value(value)
    if value is None and operator == "==":
        return _missing(field)
    return f"({name} {_COMPARISONS[operator]} {_written(field, value)} AND {given})"


def _like(field: str, pattern: str) -> str:
    return f"({_quoted(field)} LIKE {_written(field, pattern)} AND NOT {_missing(field)})"


def _missing(field: str) -> str:
    return f"({_quoted(field)} = '')" if field in _EMPTY_TEXTS else f"({_quoted(field)} IS NULL)"


def _quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"'


def _escaped(text: str) -> str:
    """A text as a pattern that only the text itself matches."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _written(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, str | date):
        text = value if isinstance(value, str) else value.isoformat()
        return "'" + text.replace("'", "''") + "'"
    raise FilterError(f"filters: '{field}' is compared with {value!r:.60}; use a text, number, boolean or time")
