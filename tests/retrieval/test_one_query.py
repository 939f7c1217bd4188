"""One query gives one ranking; a list gives a list, also a list of one."""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from d2llm import Index, Passage, Query, Ranking
from d2llm.core.types import QueryExpansion
from d2llm.models.writers.writer import WrittenQueries
from d2llm.retrieval.expansion import Expansion
from fake_models import FakeStudent

pandas = pytest.importorskip("pandas", reason="needs pandas")
polars = pytest.importorskip("polars", reason="needs Polars")

Row = namedtuple("Row", ["id", "text"])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    made = Index.create(tmp_path_factory.mktemp("one") / "index", FakeStudent())
    made.upsert([Passage(f"p{number}", f"the text {number}") for number in range(4)])
    return made


def row_of_sqlite() -> Any:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    return connection.execute("select 'q' as id, 'text 2' as text").fetchone()


ONE = [
    "text 2",
    Query("q", "text 2"),
    {"text": "text 2"},
    {"id": "q", "text": "text 2"},
    Row("q", "text 2"),
    row_of_sqlite(),
    pandas.Series({"id": "q", "text": "text 2"}),
]
SEVERAL = [
    ["text 2"],
    ("text 2",),
    (text for text in ("text 2",)),
    [Query("q", "text 2")],
    [{"text": "text 2"}],
    [Row("q", "text 2")],
    {"q": "text 2"},
    {"q": Query("q", "text 2")},
    pandas.DataFrame({"id": ["q"], "text": ["text 2"]}),
    polars.DataFrame({"id": ["q"], "text": ["text 2"]}),
]


@pytest.mark.parametrize("query", ONE, ids=lambda value: type(value).__name__)
def test_one_query_gives_its_ranking(index: Index, query: Any):
    ranking = index.search(query, top_k=2)
    assert isinstance(ranking, Ranking)
    assert ranking.query.text == "text 2"
    assert ranking.passages[0].passage.id == "p2"


@pytest.mark.parametrize("queries", SEVERAL, ids=lambda value: type(value).__name__)
def test_a_list_or_table_of_one_gives_a_list(index: Index, queries: Any):
    rankings = index.search(queries, top_k=2)
    assert isinstance(rankings, list)
    assert [ranking.query.text for ranking in rankings] == ["text 2"]


def test_a_list_of_none_gives_none(index: Index):
    assert index.search([]) == []


def test_a_sharded_index_answers_alike(tmp_path: Path):
    sharded = Index.create(tmp_path / "index", FakeStudent(), num_shards=2)
    sharded.upsert([Passage(f"p{number}", f"the text {number}") for number in range(4)])
    assert sharded.search("text 2").passages == sharded.search(["text 2"])[0].passages


class Rephrasing:
    """A writer that puts every query in capitals."""

    fingerprint = "rephrasing"

    def write(self, assignments: Any, *, advance: Any = None) -> list[WrittenQueries]:
        return [WrittenQueries((each.passage.upper(),), 1, 1) for each in assignments]


def test_one_query_is_expanded_alone():
    expansion = Expansion(Rephrasing())
    one = expansion.expand("a query")
    assert isinstance(one, QueryExpansion)
    assert [one.texts] == [each.texts for each in expansion.expand(["a query"])]
