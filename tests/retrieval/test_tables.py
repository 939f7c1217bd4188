"""Tables of pandas, Polars, Arrow and DuckDB are passages; an index is a table of Arrow."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from d2llm import Index, Passage
from d2llm.core.errors import InputError
from fake_models import FakeStudent

pandas = pytest.importorskip("pandas", reason="needs pandas")
polars = pytest.importorskip("polars", reason="needs Polars")

NOON = datetime(2024, 5, 31, 12, tzinfo=timezone.utc)
COLUMNS: dict[str, list[Any]] = {
    "id": ["a", "b", "c"],
    "text": ["a cat", "a dog", "an owl"],
    "title": ["Cats", None, "Owls"],
    "year": [None, 2001, 2002],
    "price": [1.5, None, 2.5],
    "seen": [NOON, NOON, None],
    "tame": [True, None, False],
    "unused": [None, None, None],
}
PASSAGES = [
    Passage("a", "a cat", "Cats", metadata={"price": 1.5, "seen": NOON, "tame": True}),
    Passage("b", "a dog", metadata={"year": 2001, "seen": NOON}),
    Passage("c", "an owl", "Owls", metadata={"year": 2002, "price": 2.5, "tame": False}),
]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index.create(tmp_path / "index", FakeStudent())


def sorted_frame() -> Any:
    """Sorted and filtered frames have an index that is not 0, 1, 2."""
    return pandas.DataFrame(COLUMNS).sort_values("id", ascending=False)


TABLES = {
    "pandas": lambda: pandas.DataFrame(COLUMNS),
    "pandas, sorted": sorted_frame,
    "pandas, ids as index": lambda: pandas.DataFrame(COLUMNS).set_index("id"),
    "pandas, columns of Arrow": lambda: pandas.DataFrame(COLUMNS).convert_dtypes(dtype_backend="pyarrow"),
    "polars": lambda: polars.DataFrame(COLUMNS),
    "arrow": lambda: pa.table(COLUMNS),
    "arrow, a batch": lambda: pa.record_batch(COLUMNS),
    "arrow, a stream": lambda: pa.table(COLUMNS).to_reader(2),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_table_is_passages(index: Index, table: Any):
    report = index.upsert(table())
    assert report.num_added == 3
    assert index.get(["a", "b", "c"]) == PASSAGES


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_long_table_is_read_in_blocks(index: Index, kind: str):
    """Also if a column has no value in the first of them."""
    numbers = [*map(str, range(5_000))]
    table = {"id": numbers, "text": [f"text {one}" for one in numbers], "year": [None] * 4_999 + [7]}
    index.upsert({"pandas": pandas.DataFrame, "polars": polars.DataFrame}[kind](table))
    assert len(index) == 5_000
    assert index.get(["4999"])[0].metadata == {"year": 7}


def test_a_table_of_queries_is_searched(index: Index):
    index.upsert(PASSAGES)
    for table in (polars.DataFrame({"text": ["a dog"]}), pa.table({"text": ["a dog"]})):
        (ranking,) = index.search(table)
        assert ranking.passages[0].passage.id == "b"


WRONG = {
    "no text": (pa.table({"id": ["a"], "body": ["x"]}), "'text' is missing; fields found: 'id', 'body'"),
    "no id": (polars.DataFrame({"text": ["x"]}), "'id' is missing"),
    "numbers": (pa.table({"id": ["a"], "text": [7]}), "'text' must be a string, found a number"),
    "lists": (polars.DataFrame({"id": ["a"], "text": ["x"], "tags": [["y"]]}), "'tags'.*list"),
    "twice, arrow": (pa.table([["a"], ["x"], ["y"]], names=["id", "text", "text"]), "several columns named 'text'"),
    "twice, pandas": (pandas.DataFrame([["a", "x", "y"]], columns=["id", "text", "text"]), "columns named 'text'"),
    "an empty text": (pandas.DataFrame({"id": ["a", "b"], "text": ["x", None]}), r"passages\[1\].*'text' is missing"),
}


@pytest.mark.parametrize(("table", "problem"), WRONG.values(), ids=WRONG.keys())
def test_a_table_of_something_else_is_named(index: Index, table: Any, problem: str):
    with pytest.raises(InputError, match=problem):
        index.upsert(table)
    assert len(index) == 0


@pytest.mark.parametrize("num_shards", [None, 2])
def test_an_index_is_a_table(tmp_path: Path, num_shards: int | None):
    index = Index.create(tmp_path / "index", FakeStudent(), num_shards=num_shards)
    assert index.to_arrow().column_names == ["id", "title", "text", "document_id", "position"]
    index.upsert([*PASSAGES, Passage("d#2", "a newt", document_id="d", position=2)])
    index.delete("b")
    table = index.to_arrow(vectors=True).sort_by("id")
    assert table["id"].to_pylist() == ["a", "c", "d#2"]
    assert table["position"].to_pylist() == [0, 0, 2]
    assert table["seen"].to_pylist() == [NOON, None, None]
    assert table.schema.field("year").type == pa.int64()
    vectors = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    assert np.array_equal(vectors, index.view.vectors(index.view.rows(["a", "c", "d#2"])))
    copy = Index.create(tmp_path / "copy", FakeStudent())
    copy.upsert(polars.from_arrow(index.to_arrow()))
    assert copy.get(["a", "c", "d#2"]) == index.get(["a", "c", "d#2"])
