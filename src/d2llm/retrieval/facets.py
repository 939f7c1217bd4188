"""Facets: how often the values of metadata fields occur in a search; and results in the order of a field.

Without words that a passage must have, every passage that the filter allows matches a query more or less. So a facet
has two counts for each value: of all these passages, whatever the query, and of the query's candidates, which got the
full score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.names import suggestion
from d2llm.core.types import Facet, FacetValue, RankedPassage
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.schema import MetadataSchema

MAX_VALUES = 100
"""Values of a field that are listed."""


def check_fields(settings: SearchSettings, schema: MetadataSchema) -> None:
    """Check that the index has the fields by which a search counts and sorts.

    Raises:
        InputError: it has no such metadata field.
    """
    sorted_by = () if settings.sort is None else (_field(settings.sort),)
    for setting, names in (("sort", sorted_by), ("facets", settings.facets or ())):
        for name in names:
            if name not in schema.fields:
                known = suggestion(name, schema.fields, "there are") if schema.fields else "the index has none"
                raise InputError(f"{setting}: there is no metadata field {name!r}; {known}")


def facet(allowed: Counter[Any], candidates: Sequence[Any]) -> Facet:
    """The facet of a field from the counts of its values, None included, and the value of each candidate."""
    scored = Counter(candidates)
    present = [(value, count) for value, count in allowed.items() if value is not None]
    present.sort(key=lambda item: (-item[1], item[0]))
    values = tuple(FacetValue(value, count, scored[value]) for value, count in present[:MAX_VALUES])
    return Facet(values, len(present), allowed[None])


def in_order_of(passages: Sequence[RankedPassage], sort: str) -> tuple[RankedPassage, ...]:
    """Results by a field (``SearchSettings.sort``): equal ones by score, those without a value last."""
    name, is_descending = _field(sort), sort.endswith(":desc")
    with_value = [one for one in passages if one.passage.metadata.get(name) is not None]
    with_value.sort(key=lambda one: one.passage.metadata[name], reverse=is_descending)  # pyright: ignore[reportArgumentType]
    return (*with_value, *(one for one in passages if one.passage.metadata.get(name) is None))


def _field(sort: str) -> str:
    return sort.partition(":")[0]
