"""The table of an index: passages are read back by version, id and row."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2llm.core.errors import DamagedFileError, DataFormatError, InputError, StorageError
from d2llm.core.types import Passage
from d2llm.store.blocks import record_of, rows_of
from d2llm.store.passage_table import NAME, PassageTable
from d2llm.store.schema import MetadataSchema
from d2llm.store.storage import link_or_copy

FIELDS = MetadataSchema({"year": "integer"})
CODE_SIZE = 4


def _records(passages, first_row=0, fields=FIELDS):
    return [
        record_of(
            passage,
            fields,
            row,
            {"d2_truncated": False, "d2_words": "", "d2_vector": bytes([row % 256] * CODE_SIZE)},
        )
        for row, passage in enumerate(passages, start=first_row)
    ]


def _ids(table):
    return sorted(record["id"] for batch in table.batches(["id"]) for record in batch)


@pytest.fixture
def table(tmp_path):
    table = PassageTable.create(tmp_path, FIELDS)
    table.put(_records([Passage(f"p{n}", f"word own{n}", metadata={"year": n}) for n in range(5)]))
    return table


def test_rows_by_id_and_row(table):
    assert len(table) == 5
    matches = table.by_ids(["p3", "nobody", "p0", "p3"], ["id", "year"])
    assert sorted(matches, key=str) == [{"id": "p0", "year": 0}, {"id": "p3", "year": 3}]
    assert table.by_rows([4, 1, 4], ["id"]) == [{"id": "p4"}, {"id": "p1"}, {"id": "p4"}]
    assert table.by_rows([], ["id", "year"]) == table.by_ids([], ["id"]) == []
    with pytest.raises(DataFormatError, match="lacks 2 of 3 requested rows"):
        table.by_rows([1, 9, 9], ["id"])
    assert table.last_row() == 4
    assert table.rows().tolist() == [0, 1, 2, 3, 4]
    assert table.codes(CODE_SIZE).tolist() == [[n] * CODE_SIZE for n in range(5)]


def test_all_columns_are_read_back_as_they_were_given(tmp_path):
    kinds = {"s": "string", "i": "integer", "n": "number", "b": "boolean", "t": "timestamp"}
    fields = MetadataSchema(kinds)
    moment = datetime(1, 1, 1, 0, 0, 0, 1, timezone.utc)
    passages = [
        Passage("a", "text\0", "title", "d", 7, {"s": "", "i": -(2**63), "n": 0.1, "b": True, "t": moment}),
        Passage("b", "", metadata={"n": 2.0, "b": False}),
    ]
    records = _records(passages, 3, fields)
    table = PassageTable.create(tmp_path, fields)
    table.put(records)
    [read] = table.intact_batches()
    assert read == records
    assert [type(value) for value in read[0].values()] == [type(value) for value in records[0].values()]


def test_more_ids_than_fit_in_one_statement(table, monkeypatch):
    monkeypatch.setattr("d2llm.store.passage_table._ASKED_AT_ONCE", 2)
    monkeypatch.setattr("d2llm.store.passage_table._SCANNED_AT_ONCE", 2)
    ids = [f"p{n}" for n in range(5)]
    assert sorted(record["id"] for record in table.by_ids(ids, ["id"])) == ids == _ids(table)
    assert [record["id"] for record in table.by_rows([3, 2, 1, 0, 4], ["id"])] == ["p3", "p2", "p1", "p0", "p4"]
    assert list(table.texts(1, 6)) == ["word own1", "word own2", "word own3", "word own4", ""]
    assert table.delete([*ids, "nobody"]) == 5
    assert table.last_row() is None
    assert table.codes(CODE_SIZE).shape == (0, CODE_SIZE)


def test_an_open_version_does_not_change(table, tmp_path):
    old_table, version = PassageTable.open(tmp_path), table.version
    table.put(_records([Passage("p0", "changed"), Passage("new", "more")], first_row=5))
    table.delete(["p1"])
    assert table.version == version + 2
    assert old_table.version == version
    assert _ids(old_table) == [f"p{n}" for n in range(5)]
    assert _ids(PassageTable.open(tmp_path, version + 1)) == ["new", *(f"p{n}" for n in range(5))]
    assert PassageTable.open(tmp_path).by_ids(["p0"], ["text"]) == [{"text": "changed"}]
    assert old_table.by_ids(["p0"], ["text"]) == [{"text": "word own0"}]
    assert table.versions() == [1, version, version + 1, version + 2]
    assert list(table.problems()) == []


def test_a_removed_version_is_an_error(table, tmp_path):
    old_table = PassageTable.open(tmp_path)
    table.put(_records([Passage("new", "more")], first_row=5))
    table.replace_all(FIELDS, [_records([Passage("other", "text")])])
    table.remove_older(timedelta(0))
    assert table.versions() == [table.version]
    assert _ids(table) == ["other"]
    with pytest.raises(DataFormatError, match=f"version {old_table.version} of its table cannot be opened"):
        PassageTable.open(tmp_path, old_table.version)
    for read in (lambda: old_table.by_ids(["p0"], ["text"]), lambda: list(old_table.batches()), old_table.rows):
        with pytest.raises(DataFormatError, match=r"cannot be read.*open it again"):
            read()


def test_versions_are_kept_for_a_while(table):
    table.delete(["p0"])
    table.remove_older(timedelta(hours=1))
    assert len(table.versions()) == 3
    before = (table.folder / NAME).stat().st_size
    table.put(_records([Passage(f"long{n}", "word " * 4_000) for n in range(50)], 5))
    table.delete([f"long{n}" for n in range(50)])
    table.remove_older(timedelta(0))
    assert (table.folder / NAME).stat().st_size < before + 100_000  # the space of what was deleted is given back


def test_texts_by_row(table):
    assert list(table.texts(3, 7)) == ["word own3", "word own4", "", ""]
    table.put(_records([Passage("p5", "text", "title")], first_row=6))
    assert list(table.texts(4, 7)) == ["word own4", "", "title\ntext"]


def test_errors_in_replacement_rows_are_raised_and_change_nothing(table, tmp_path):
    def damaged_rows():
        yield _records([Passage("x", "y")])
        raise DataFormatError(tmp_path, "this part is damaged")

    with pytest.raises(DataFormatError, match="this part is damaged"):
        table.replace_all(FIELDS, damaged_rows())

    def unwritable_rows():
        yield _records([Passage("x", "y")])
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left.*committed before is kept"):
        table.replace_all(FIELDS, unwritable_rows())
    assert len(PassageTable.open(tmp_path)) == 5
    assert _ids(table) == [f"p{n}" for n in range(5)]


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
    (tmp_path / "t").mkdir()
    table = PassageTable.create(tmp_path / "t", FIELDS)
    table.put(_records([Passage(name, "t", name) for name in ids]))
    assert table.by_rows(range(len(ids)), ["id", "title"]) == [{"id": name, "title": name} for name in ids]
    assert table.by_ids(ids[:1], ["id"]) == [{"id": ids[0]}]
    assert table.ids_after("", 100) == sorted(ids)  # by code point
    assert [document.id for document in table.documents_after("", 100)] == sorted(ids)
    table.put(_records([Passage(ids[-1], "changed")], first_row=50))
    assert len(table) == len(ids)
    assert table.delete(ids[:1]) == 1
    assert _ids(table) == sorted(ids[1:])


def test_unusual_ids_one_by_one(table):
    for number, name in enumerate(UNUSUAL_IDS):
        table.put(_records([Passage(name, "t")], first_row=10 + number))
    assert len(table) == 5 + len(UNUSUAL_IDS)
    for name in UNUSUAL_IDS:
        assert table.by_ids([name], ["id"]) == [{"id": name}]
        assert table.delete([name]) == 1
    assert len(table) == 5


def test_documents_and_their_parts(table):
    pieces = [Passage(f"d#{n}", "t", document_id="d", position=n) for n in (3, 1, 2)]
    table.put(_records([*pieces, Passage("d2", "t", document_id="p0", position=9)], first_row=5))
    assert table.pieces_of(["d", "p1", "nobody", "p0"]) == {
        "d": ["d#1", "d#2", "d#3"],
        "p1": ["p1"],
        "p0": ["p0", "d2"],
    }
    assert sorted(table.positions_of(["d", "d2"])) == [
        ("d#1", "d", 1),
        ("d#2", "d", 2),
        ("d#3", "d", 3),
        ("d2", "p0", 9),
    ]
    near = table.around([("d", 1), ("d", 2), ("p1", 0)], 1, ["id"])  # p1 has no document, so no neighbours
    assert sorted(record["id"] for record in near) == ["d#1", "d#2", "d#3"]
    assert table.around([("d", 2**31 - 1)], 2**31, ["id"])
    listed = {document.id: document.num_passages for document in table.documents_after("", 100)}
    assert listed == {"d": 3, "p0": 2, "p1": 1, "p2": 1, "p3": 1, "p4": 1}
    assert [document.id for document in table.documents_after("d", 2)] == ["p0", "p1"]
    for bad in (0, True, 1.5):
        with pytest.raises(InputError, match="limit is"):
            table.ids_after("", bad)
    with pytest.raises(InputError, match="cannot be an id"):
        table.pieces_of(["\ud800"])


def test_a_copy_has_one_version_and_outlives_the_table(table, tmp_path):
    table.put(_records([Passage("p0", "changed")], first_row=5))
    (tmp_path / "copy").mkdir()
    old = PassageTable.open(tmp_path, table.version - 1)
    old.copy_to(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [NAME]
    (tmp_path / NAME).unlink()
    copy = PassageTable.open(tmp_path / "copy")
    assert copy.by_ids(["p0"], ["text", "d2_row"]) == [{"text": "word own0", "d2_row": 0}]
    assert len(copy) == 5
    assert len(copy.versions()) == 1
    assert list(copy.problems()) == []


def test_files_are_copied_where_links_are_impossible(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("pathlib.Path.hardlink_to", fail)
    (tmp_path / "a").write_text("content")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"


def test_added_fields_are_empty(table, tmp_path):
    before = PassageTable.open(tmp_path)
    table.add_fields(MetadataSchema({"language": "string"}))
    assert PassageTable.open(tmp_path).by_ids(["p1"], ["language", "year"]) == [{"language": None, "year": 1}]
    assert list(table.metadata.fields) == ["year", "language"]
    assert list(PassageTable.open(tmp_path, before.version).metadata.fields) == ["year"]


@pytest.mark.parametrize("damage", ["no table", "empty", "garbage", "half"])
def test_a_damaged_table_is_reported(table, tmp_path, damage):
    table.close()
    path = tmp_path / NAME
    content = path.read_bytes()
    if damage == "no table":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "garbage": b"garbage" * 99, "half": content[: len(content) // 2]}[damage])

    def read():
        table = PassageTable.open(tmp_path)
        assert not list(table.batches())
        return list(table.problems())

    with pytest.raises(DamagedFileError, match=rf"^{path}: (is missing|cannot be read)"):
        read()


def test_a_changed_page_is_found(table, tmp_path):
    table.close()
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content.replace(b"word own3", b"work own3"))
    [problem] = PassageTable.open(tmp_path).problems()
    assert problem == "1 damaged passage, the first is 'p3'"
    with pytest.raises(DamagedFileError, match="1 damaged passage, the first is 'p3'"):
        list(PassageTable.open(tmp_path).intact_batches())


@pytest.mark.parametrize("column", ["d2_row", "d2_truncated", "d2_words", "d2_vector", "born", "died", "year"])
def test_every_column_is_covered_by_a_hash(table, tmp_path, column):
    table.close()
    connection = sqlite3.connect(tmp_path / NAME)
    where = "bodies" if column in ("d2_words", "d2_vector") else "passages"
    value = {"d2_words": '{"a":1.0}', "d2_vector": b"\0\0\0\7", "died": 2, "born": 3}.get(column, 77)
    connection.execute(f"UPDATE {where} SET {column} = ? WHERE key = 2", (value,))
    connection.commit()
    connection.close()
    assert any("damaged passage" in one or "were written" in one for one in PassageTable.open(tmp_path).problems())


def test_a_folder_that_cannot_be_written_is_read(table, tmp_path):
    table.close()
    folder = tmp_path / "r"
    folder.mkdir()
    shutil.copy2(tmp_path / NAME, folder / NAME)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert _ids(PassageTable.open(folder)) == [f"p{n}" for n in range(5)]
        if os.geteuid():  # root may write anywhere
            assert [path.name for path in folder.iterdir()] == [NAME]
            with pytest.raises(StorageError, match="cannot be written"):
                PassageTable.open(folder).delete(["p0"])
    finally:
        folder.chmod(stat.S_IRWXU)


def test_rows_of_records_leave_out_the_generation():
    assert rows_of([{"d2_row": 3 | 2 << 40}]).tolist() == [3]
    assert rows_of([]).dtype == np.int64


def test_a_commit_between_the_reads_of_a_check_is_no_damage(tmp_path, table):
    """Versions and passages are counted as of one moment; otherwise readers would be told to repair a whole index."""
    writer, reader = PassageTable.open(tmp_path), PassageTable.open(tmp_path)

    def write(statement):
        if statement.startswith("SELECT version, num_passages FROM versions") and len(writer) == 5:
            writer.put(_records([Passage("new", "text")], first_row=5))

    reader._connection.set_trace_callback(write)
    assert list(reader.problems()) == []
    assert len(writer) == 6
