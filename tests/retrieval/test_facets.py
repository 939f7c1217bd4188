"""Facets count values of metadata fields; a sorted search shows the same results in another order."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from d2llm import Index, Passage, SearchSettings
from d2llm.core.errors import InputError
from d2llm.core.types import Facet
from fake_models import FakeStudent

COLOURS = ["red", "green", "blue", None]
PASSAGES = [
    Passage(
        f"p{number:03}",
        f"text {number}",
        metadata={
            "colour": COLOURS[number % 4],
            "year": 2000 + number % 7 if number % 5 else None,
            "seen": datetime(2024, 1, 1 + number % 3, tzinfo=timezone.utc),
            "new": number % 2 == 0,
            "name": f"n{number}",
        },
    )
    for number in range(150)
]
FIELDS = ("colour", "year", "seen", "new", "name")


@pytest.fixture(scope="module", params=[None, 3])
def index(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Index:
    made = Index.create(tmp_path_factory.mktemp("facets") / "index", FakeStudent(), num_shards=request.param)
    made.upsert([*PASSAGES, Passage("gone", "text", metadata={"colour": "red"})])
    made.delete("gone")
    return made


def expected(passages: list[Passage], candidates: list[Passage], field: str) -> tuple[list[tuple[Any, int, int]], int]:
    counts = Counter(passage.metadata.get(field) for passage in passages)
    scored = Counter(passage.metadata.get(field) for passage in candidates)
    without = counts.pop(None, 0)
    order = sorted(counts, key=lambda value: (-counts[value], value))  # pyright: ignore[reportArgumentType]
    return [(value, counts[value], scored[value]) for value in order], without


def listed(facet: Facet) -> tuple[list[tuple[Any, int, int]], int]:
    return [(one.value, one.num_passages, one.num_candidates) for one in facet.values], facet.num_without


@pytest.mark.parametrize("allowed", [None, "year >= 2003"])
def test_a_facet_counts_what_the_filter_allows_and_the_candidates(index: Index, allowed: str | None):
    passages = [one for one in PASSAGES if allowed is None or (one.metadata["year"] or 0) >= 2003]  # pyright: ignore[reportOperatorIssue]
    settings = SearchSettings(filter=allowed, facets=FIELDS, num_candidates=20, sources=("vectors",))
    ranking = index.search("text 7", settings, top_k=3)
    assert set(ranking.facets) == set(FIELDS)
    candidates = [one.passage for one in index.search("text 7", settings, top_k=20)]
    for field in FIELDS:
        values, without = expected(passages, candidates, field)
        assert listed(ranking.facets[field]) == (values[:100], without)
        assert ranking.facets[field].num_values == len(values)
    assert sum(one.num_candidates for one in ranking.facets["new"].values) == 20


def test_counts_follow_the_index(tmp_path: Path):
    index = Index.create(tmp_path / "index", FakeStudent())
    index.upsert(PASSAGES[:8])
    before = index.search("text", facets="colour").facets["colour"]
    index.delete(["p000", "p003"])
    after = index.search("text", facets="colour").facets["colour"]
    assert [(one.value, one.num_passages) for one in before.values] == [("blue", 2), ("green", 2), ("red", 2)]
    assert [(one.value, one.num_passages) for one in after.values] == [("blue", 2), ("green", 2), ("red", 1)]
    assert (before.num_without, after.num_without) == (2, 1)


@pytest.mark.parametrize(("sort", "sign"), [("year", 1), ("year:asc", 1), ("year:desc", -1), ("seen:desc", -1)])
@pytest.mark.parametrize("group", ["passage", "best"])
def test_results_are_shown_in_the_order_of_a_field(index: Index, sort: str, sign: int, group: Any):
    plain = index.search("text 7", top_k=30, group=group)
    ranking = index.search("text 7", top_k=30, group=group, sort=sort)
    assert {one.passage.id for one in ranking} == {one.passage.id for one in plain}
    assert {one.passage.id: one.rank for one in ranking} == {one.passage.id: one.rank for one in plain}
    values = [one.passage.metadata.get(sort.partition(":")[0]) for one in ranking]
    ranks = [one.rank for one in ranking]
    keys = [
        (value is None, 0 if value is None else sign * (value.day if isinstance(value, datetime) else value), rank)  # pyright: ignore[reportOperatorIssue]
        for value, rank in zip(values, ranks, strict=True)
    ]
    assert keys == sorted(keys)


def test_wrong_fields_are_named(index: Index):
    with pytest.raises(InputError, match="sort: there is no metadata field 'yaer'; did you mean 'year'"):
        index.search("text", sort="yaer:desc")
    with pytest.raises(InputError, match="facets: there is no metadata field 'shape'"):
        index.search("text", facets=["year", "shape"])
    with pytest.raises(InputError, match=r"sort is 'year:down' \(str\), but must be of another form. .* as in year or"):
        SearchSettings(sort="year:down")
