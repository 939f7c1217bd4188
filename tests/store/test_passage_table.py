"""The table of an index: passages are read back by version, id and row."""

from __future__ import annotations

import shutil
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2llm.core.errors import DamagedFileError, DataFormatError, StorageError
from d2llm.core.types import Passage
from d2llm.store.blocks import table_block, table_schema
from d2llm.store.passage_table import PassageTable, quoted
from d2llm.store.schema import MetadataSchema
from d2llm.store.storage import link_or_copy
from d2llm.store.table_files import TableFiles

FIELDS = MetadataSchema({"year": "integer"})
CODE_SIZE = 4


def _block(passages, first_row=0):
    rows = np.arange(first_row, first_row + len(passages))
    codes = np.repeat(rows.astype(np.uint8), CODE_SIZE).reshape(-1, CODE_SIZE)
    schema = table_schema(FIELDS.arrow_fields(), CODE_SIZE)
    return table_block(passages, schema, FIELDS, rows, [{"d2_truncated": False}] * len(rows), codes)


@pytest.fixture
def table(tmp_path):
    table = PassageTable.create(tmp_path, table_schema(FIELDS.arrow_fields(), CODE_SIZE))
    table.put(_block([Passage(f"p{n}", f"word own{n}", metadata={"year": n}) for n in range(5)]), replaces=False)
    return table


def test_rows_by_id_and_row(table):
    assert len(table) == 5
    matches = table.by_ids(["p3", "nobody", "p0"], ["id", "year"])
    assert sorted(matches.to_pylist(), key=str) == [{"id": "p0", "year": 0}, {"id": "p3", "year": 3}]
    assert table.by_rows([4, 1, 4], ["id"])["id"].to_pylist() == ["p4", "p1", "p4"]
    assert table.by_rows([], ["id", "year"]).to_pydict() == {"id": [], "year": []}
    assert table.by_ids([], ["id"]).to_pydict() == {"id": []}
    with pytest.raises(DataFormatError, match="lacks 2 of 3 requested rows"):
        table.by_rows([1, 9, 9], ["id"])
    assert table.has_rows_from(4)
    assert not table.has_rows_from(5)
    assert table.codes().tolist() == [[n] * CODE_SIZE for n in range(5)]


def test_more_ids_than_fit_in_one_query(table, monkeypatch):
    monkeypatch.setattr("d2llm.store.passage_table._ASKED_AT_ONCE", 2)
    monkeypatch.setattr("d2llm.store.passage_table._DELETED_AT_ONCE", 2)
    ids = [f"p{n}" for n in range(5)]
    assert sorted(table.by_ids(ids, ["id"])["id"].to_pylist()) == ids
    assert table.by_rows([3, 2, 1, 0, 4], ["id"])["id"].to_pylist() == ["p3", "p2", "p1", "p0", "p4"]
    assert table.delete([*ids, "nobody"]) == 5
    assert table.any_row() is None


def test_an_open_version_does_not_change(table, tmp_path):
    old_table, version = PassageTable.open(tmp_path), table.version
    table.put(_block([Passage("p0", "changed"), Passage("new", "more")], first_row=5), replaces=True)
    table.delete(["p1"])
    assert table.version == version + 2
    assert old_table.version == version
    assert sorted(old_table.columns(["id"])["id"].to_pylist()) == [f"p{n}" for n in range(5)]
    assert sorted(PassageTable.open(tmp_path, version + 1).columns(["id"])["id"].to_pylist()) == [
        "new",
        *(f"p{n}" for n in range(5)),
    ]
    assert PassageTable.open(tmp_path).by_ids(["p0"], ["text"]).to_pylist() == [{"text": "changed"}]


def test_a_removed_version_is_an_error(table, tmp_path):
    old_table = PassageTable.open(tmp_path)
    table.put(_block([Passage("new", "more")], first_row=5), replaces=False)
    table.replace_all(table.schema, iter(_block([Passage("other", "text")]).to_batches()))
    table.optimize(timedelta(0))
    with pytest.raises(DataFormatError, match=f"version {old_table.version} of its table cannot be opened"):
        PassageTable.open(tmp_path, old_table.version)
    with pytest.raises(DataFormatError, match=r"cannot be read.*open it again"):
        old_table.columns(["id"])
    with pytest.raises(DataFormatError, match="cannot be read"):
        list(old_table.batches(["id", "text"]))


def test_texts_by_row(table):
    assert list(table.texts(3, 7)) == ["word own3", "word own4", "", ""]
    table.put(_block([Passage("p5", "text", "title")], first_row=6), replaces=False)
    assert list(table.texts(4, 7)) == ["word own4", "", "title\ntext"]
    table.build_indices()
    assert table.indices == dict.fromkeys(["id_idx", "d2_row_idx", "document_id_idx"], 0)


def test_errors_in_replacement_rows_are_raised_and_change_nothing(table, tmp_path):
    def damaged_rows():
        yield from _block([Passage("x", "y")]).to_batches()
        raise DataFormatError(tmp_path, "this part is damaged")

    with pytest.raises(DataFormatError, match="this part is damaged"):
        table.replace_all(table.schema, damaged_rows())

    def unwritable_rows():
        yield from _block([Passage("x", "y")]).to_batches()
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left.*committed before is kept"):
        table.replace_all(table.schema, unwritable_rows())
    assert len(PassageTable.open(tmp_path)) == 5


def test_files_are_of_the_format_that_reads_single_rows_quickly(table, tmp_path):
    table.put(_block([Passage("q", "z")], 5), replaces=False)
    table.optimize(timedelta(days=1))
    table.replace_all(table.schema, iter(_block([Passage("x", "y")]).to_batches()))
    files = list((tmp_path / "passages.lance" / "data").glob("*.lance"))
    assert len(files) > 1
    assert {file.read_bytes()[-8:] for file in files} == {b"\x02\0\x01\0LANC"}


IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
UNUSUAL_IDS = [
    "'",
    "''",
    '"',
    "\\",
    "\\'",
    "a\0b",
    "\n\r\t",
    "%_",
    "--",
    "; DROP",
    "\u202eabc",
    "😀",
    "e\u0301",
    "é",
    "\uffff",
    "x" * 100_000,
]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(IDS | st.sampled_from(UNUSUAL_IDS), min_size=1, max_size=8, unique=True))
def test_arbitrary_ids(tmp_path, ids):
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    table = PassageTable.create(tmp_path / "t", table_schema(FIELDS.arrow_fields(), CODE_SIZE))
    table.put(_block([Passage(name, "t", name) for name in ids]), replaces=False)
    assert table.by_rows(range(len(ids)), ["id", "title"]).to_pylist() == [{"id": n, "title": n} for n in ids]
    assert table.by_ids(ids[:1], ["id"])["id"].to_pylist() == ids[:1]
    table.put(_block([Passage(ids[-1], "changed")], first_row=50), replaces=True)
    assert len(table) == len(ids)
    assert table.delete(ids[:1]) == 1
    assert sorted(table.columns(["id"])["id"].to_pylist()) == sorted(ids[1:])


def test_unusual_ids_one_by_one(table):
    for number, name in enumerate(UNUSUAL_IDS):
        table.put(_block([Passage(name, "t")], first_row=10 + number), replaces=True)
    assert len(table) == 5 + len(UNUSUAL_IDS)
    for name in UNUSUAL_IDS:
        assert table.by_ids([name], ["id"])["id"].to_pylist() == [name]
        assert table.delete([name]) == 1
    assert len(table) == 5


def test_quotes_are_doubled():
    assert quoted("it's 'so'") == "'it''s ''so'''"


def test_a_linked_copy_survives_removal_of_the_table(table, tmp_path):
    (tmp_path / "copy").mkdir()
    TableFiles(tmp_path).link(table.version, tmp_path / "copy")
    table.replace_all(table.schema, iter(_block([Passage("other", "text")]).to_batches()))
    table.optimize(timedelta(0))
    shutil.rmtree(tmp_path / "passages.lance")
    copy = PassageTable.open(tmp_path / "copy")
    assert sorted(copy.columns(["id"])["id"].to_pylist()) == [f"p{n}" for n in range(5)]
    assert len(copy.versions()) <= 2


def test_files_are_copied_where_links_are_impossible(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("pathlib.Path.hardlink_to", fail)
    (tmp_path / "a").write_text("content")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"


def test_added_columns_are_empty(table, tmp_path):
    table.add_columns([pa.field("language", pa.string())])
    assert PassageTable.open(tmp_path).by_ids(["p1"], ["language", "year"]).to_pylist() == [
        {"language": None, "year": 1}
    ]


@pytest.mark.parametrize("damage", ["no table", "no versions", "empty versions", "garbage versions"])
def test_a_damaged_table_cannot_be_opened(table, tmp_path, damage):
    lance = tmp_path / "passages.lance"
    if damage == "no table":
        shutil.rmtree(lance)
    for path in (lance / "_versions").glob("*"):
        if damage == "no versions":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty versions" else b"garbage" * 20)
    manifest = lance / "_versions" / "18446744073709551613.manifest"
    with pytest.raises(DamagedFileError, match=rf"^{manifest}: (is missing|has \d+ bytes).*verify --repair"):
        PassageTable.open(tmp_path)
    files = TableFiles(tmp_path)  # if checksums are ignored, LanceDB reports the error
    with files.unchecked(), pytest.raises(DataFormatError, match=f"{tmp_path}: its table cannot be opened"):
        PassageTable.open(tmp_path, files=files)


@pytest.mark.parametrize("damage", ["gone", "half", "garbage"])
def test_damaged_data_files_are_reported(table, tmp_path, damage):
    for path in (tmp_path / "passages.lance" / "data").glob("*"):
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "half" else b"x" * len(content))
    with pytest.raises(DamagedFileError, match=rf"^{tmp_path}/passages.lance/data/.*restore a snapshot"):
        PassageTable.open(tmp_path)
    files = TableFiles(tmp_path)
    with (
        files.unchecked(),
        pytest.raises(DataFormatError, match=rf"^{tmp_path}: version 2 of its table cannot be read"),
    ):
        PassageTable.open(tmp_path, files=files).columns(["id"])
