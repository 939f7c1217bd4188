"""Fields that slow filters name are indexed beside the search, and nothing that is found changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from d2llm.core.types import Passage
from d2llm.store import filter_indexes
from d2llm.store.passage_table import NAME
from d2llm.store.view import PassageView
from tiny_store import new_store, put
from waiting import until

FILTERS = ("year >= 2010", "language = 'de'", "language IS NULL", "year < 2005 OR language LIKE 'e%'", "id = 'p7'")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every filter counts as slow."""
    monkeypatch.setattr(filter_indexes, "MIN_PASSAGES", 0)
    monkeypatch.setattr(filter_indexes, "SLOW_S", 0.0)
    yield
    with filter_indexes._lock:
        filter_indexes._making.clear()


def some_passages(count: int) -> list[Passage]:
    languages = ("de", "en", None)
    return [
        Passage(f"p{row}", f"text {row}", metadata={"year": 2000 + row % 20, "language": languages[row % 3]})
        for row in range(count)
    ]


def indexed(folder: Path) -> set[str]:
    with closing(sqlite3.connect(folder / NAME)) as connection:
        names = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND name LIKE 'filter_%'")
        return {name.removeprefix("filter_") for (name,) in names}


def found(view: PassageView) -> list[list[int]]:
    masks = [view.select(text) for text in FILTERS]
    return [mask.nonzero()[0].tolist() for mask in masks if mask is not None]


def test_a_slow_filter_gets_its_fields_indexed_and_finds_the_same(tmp_path, eager):
    store = new_store(tmp_path / "index")
    put(store, some_passages(60))
    expected = found(PassageView(store))
    until(lambda: indexed(store.folder) == {"year", "language", "id"}, "the indexes")
    with closing(sqlite3.connect(store.folder / NAME)) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT d2_row FROM passages WHERE born <= 9 AND died > 9 AND language = 'de'"
        ).fetchall()
    assert "COVERING INDEX filter_language" in str(plan)
    assert found(PassageView(store)) == expected
    until(lambda: not filter_indexes._making, "the end of the threads")
    with closing(sqlite3.connect(store.folder / NAME)) as connection:
        connection.execute("DROP INDEX filter_year")  # as a rewritten table has lost it
    found(PassageView(store))
    until(lambda: "year" in indexed(store.folder), "the index again")
    old = PassageView(store)
    put(store, [Passage("p0", "changed", metadata={"year": 2019}), Passage("new", "new", metadata={"year": 2001})])
    store.delete(["p30"])
    after = PassageView(store)
    by_year = after.select("year >= 2010")
    assert by_year is not None
    years = {passage.id: passage.metadata["year"] for passage in after.passages(after.live_rows())}
    assert {passage.id for passage in after.passages(by_year.nonzero()[0])} == {
        name for name, year in years.items() if year >= 2010
    }
    assert found(old) == expected  # a version never changes


def test_fast_filters_and_small_tables_are_left_alone(tmp_path, monkeypatch):
    store = new_store(tmp_path / "index")
    put(store, some_passages(30))
    found(PassageView(store))
    monkeypatch.setattr(filter_indexes, "SLOW_S", 0.0)  # still few passages
    found(PassageView(store))
    assert indexed(store.folder) == set()


def test_a_table_that_another_writes_waits_and_one_that_is_away_stays_away(tmp_path, eager, monkeypatch):
    store = new_store(tmp_path / "index")
    put(store, some_passages(30))
    with closing(sqlite3.connect(store.folder / NAME, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert len(found(PassageView(store))) == len(FILTERS)
        assert indexed(store.folder) == set()
        writer.execute("ROLLBACK")
    until(lambda: "year" in indexed(store.folder), "the index")
    away = tmp_path / "away" / NAME
    filter_indexes._making.add((away, "year"))
    filter_indexes._make(away, ["year"])
    assert (away, "year") not in filter_indexes._making  # the next slow filter tries again
    assert not away.exists()
