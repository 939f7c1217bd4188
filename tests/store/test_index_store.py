"""A store keeps what is written, rejects invalid input, and loses nothing when a write fails."""

from __future__ import annotations

import resource
import shutil
import threading
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import pytest

from d2llm.core.errors import (
    DamagedFileError,
    DataFormatError,
    DuplicateIdError,
    IndexLockedError,
    IndexMismatchError,
    InputError,
    StorageError,
)
from d2llm.core.types import Passage
from d2llm.store import vector_file
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.schema import MetadataSchema
from d2llm.store.vector_file import VectorFile
from d2llm.store.view import PassageView
from tiny_store import DIM, check_contents, edit_manifest, few_passages, new_store, put, vectors_of

PASSAGES = few_passages(12)


BOTH_FORMS = pytest.mark.parametrize("store", [2, 1], indirect=True, ids=["two copies", "one copy"])


@pytest.fixture
def store(tmp_path, request):
    store = new_store(tmp_path / "index", vector_copies=getattr(request, "param", 2))
    put(store, PASSAGES.values())
    return store


def _check_reopened(store, expected):
    check_contents(PassageView(IndexStore.open(store.folder)), expected)
    assert verify(store).problems == []


@contextmanager
def _file_size_limit(num_bytes):
    """Simulate a full disk: no file can grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Writing


@BOTH_FORMS
def test_changes_are_classified(store):
    changed = [
        PASSAGES["p0"],
        Passage("p1", "another text", "title 1", metadata={"year": 2001}),
        Passage("p2", PASSAGES["p2"].text, "another title", metadata={"year": 2002}),
        Passage("p3", PASSAGES["p3"].text, "title 3", metadata={"year": 7}),
        Passage("p4", PASSAGES["p4"].text, "title 4", metadata={"year": None}),
        Passage("p5", PASSAGES["p5"].text, "title 5", document_id="d", metadata={"year": 2005}),
        Passage("p6", PASSAGES["p6"].text, "title 6", position=3, metadata={"year": 2006}),
        Passage("new", "text"),
    ]
    changes = store.compare(changed)
    assert [passage.id for passage in changes.texts] == ["p1", "p2", "new"]
    assert [passage.id for passage, _, _ in changes.others] == ["p3", "p4", "p5", "p6"]
    assert (changes.num_new, changes.num_unchanged) == (1, 1)
    put(store, changed)
    without_year = Passage("p4", PASSAGES["p4"].text, "title 4")
    _check_reopened(store, PASSAGES | {passage.id: passage for passage in changed} | {"p4": without_year})


def test_the_version_is_read_without_the_rows(store, monkeypatch):
    version, reopened = store.version, IndexStore.open(store.folder)
    monkeypatch.setattr("d2llm.store.passage_table.PassageTable.problems", lambda _table: ["a row was changed"])
    assert reopened.version == version
    with pytest.raises(DamagedFileError, match="a row was changed"):
        reopened.table()


@BOTH_FORMS
def test_metadata_changes_keep_row_vector_and_truncation_flag(store):
    with store.writing():
        changes = store.compare([Passage("long", "very long")])
        store.write(changes, vectors_of(changes.texts), truncated=[0])
    capacity = PassageView(store).capacity
    put(store, [Passage("long", "very long", position=2, metadata={"language": "de"})])
    row = store.table().by_ids(["long"], ["d2_row", "d2_truncated", "language"])
    assert row == [{"d2_row": capacity - 1, "d2_truncated": True, "language": "de"}]
    assert PassageView(store).capacity == capacity


def test_a_damaged_vector_file_never_reaches_the_table(store):
    """A metadata change keeps the vectors of the table, not those of the vector file."""
    path = vector_file.path_of(store.folder, 0)
    path.write_bytes(b"\x3f" * path.stat().st_size)
    changed = {key: Passage(key, p.text, p.title, metadata={"year": 1}) for key, p in PASSAGES.items()}
    put(store, changed.values())
    put(store, [Passage("new", "text")])
    check_contents(PassageView(store), changed | {"new": Passage("new", "text")})
    assert verify(store).problems == []


@pytest.mark.parametrize("damage", ["an older copy", "missing", "no rows", "of a later version"])
def test_row_numbers_are_never_reused(store, damage):
    """A vector file that lacks rows of the table is not extended: new rows would get numbers already in use."""
    parts = [vector_file.path_of(store.folder, 0).with_suffix(suffix) for suffix in (".bin", ".json")]
    older = [part.read_bytes() for part in parts]
    put(store, few_passages(5, start=20).values())
    for part, content in zip(parts, older, strict=True):
        if damage == "an older copy":
            part.write_bytes(content)
        else:
            part.unlink()
    if damage == "no rows":
        VectorFile.create(store.folder, 0, store.format.code_size)
    elif damage == "of a later version":
        VectorFile.create(store.folder, 0, store.format.code_size, since=99).append(
            np.zeros((50, store.format.code_size), np.uint8)
        )
    put(store, few_passages(5, start=40).values())
    _check_reopened(store, PASSAGES | few_passages(5, start=20) | few_passages(5, start=40))


def test_a_new_generation_is_not_used_for_earlier_versions(store):
    """Not even when the files are lost and the generation number is reused."""
    old = store.table().version
    vector_file.remove(store.folder, 0)
    store.delete(list(PASSAGES))
    put(store, few_passages(3, start=50).values())
    store.compact(dense=True)
    compacted = store.table().version
    check_contents(PassageView(store, old), PASSAGES)
    put(store, few_passages(1, start=50, word="changed").values())  # appended after the others
    vector_file.remove(store.folder, 1)
    store.compact(dense=True)
    check_contents(PassageView(store, compacted), few_passages(3, start=50))
    check_contents(PassageView(store, old), PASSAGES)
    _check_reopened(store, few_passages(3, start=50) | few_passages(1, start=50, word="changed"))


@BOTH_FORMS
def test_a_failed_rewrite_is_not_used(store, monkeypatch):
    def fail(*_):
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr("d2llm.store.passage_table.PassageTable.replace_all", fail)
        with pytest.raises(StorageError):
            store.compact(dense=True)
    _check_reopened(store, PASSAGES)
    store.delete(list(PASSAGES))  # if no rows are left, the newest file would be extended
    put(store, PASSAGES.values())
    _check_reopened(store, PASSAGES)
    store.compact(timedelta(0))
    assert len(list(vector_file.generations(store.folder))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_vectors_are_rejected(store, value):
    version, files = store.table().version, sorted(store.folder.rglob("*"))
    changes = store.compare([Passage("good", "a"), Passage("bad", "b")])
    vectors = np.ones((2, DIM), np.float32)
    vectors[1, 3] = value
    with pytest.raises(InputError, match="bad"):
        store.write(changes, vectors)
    assert (store.table().version, sorted(store.folder.rglob("*"))) == (version, files)


@pytest.mark.parametrize("shape", [(1, DIM), (2, DIM - 1), (2,), (3, DIM), (0, DIM)])
def test_vectors_of_the_wrong_shape_are_rejected(store, shape):
    changes = store.compare([Passage("good", "a"), Passage("bad", "b")])
    with pytest.raises(InputError, match="vectors of shape"):
        store.write(changes, np.ones(shape, np.float32))


def test_empty_and_megabyte_texts(store):
    passages = {"empty": Passage("empty", ""), "long": Passage("long", "Wort 中文 " * 90_000)}
    assert len(passages["long"].text.encode()) > 1_000_000
    put(store, passages.values())
    store.update_word_files()
    _check_reopened(store, PASSAGES | passages)
    view = PassageView(store)
    assert view.ids(view.match("Wort", 3).rows) == ["long"]
    assert put(store, passages.values()) == view.version


@pytest.mark.parametrize(
    ("passage", "message"),
    [
        (Passage("", "text begins so"), "empty id.*text begins so"),
        (Passage("i" * 4_097, "text"), "its id has 4,097 characters; 4,096 are allowed"),
        (Passage("a", "text", document_id="i" * 5_000), "its document_id has 5,000 characters"),
        (Passage("a\ud800", "text"), "its id is not valid Unicode"),
        (Passage("a", "text \udfff"), "its text is not valid Unicode"),
        (Passage("a", "text", "\ud800"), "its title is not valid Unicode"),
        (Passage("a", "text", document_id="\ud800"), "its document_id is not valid Unicode"),
        (Passage("a", None), "its text is not valid Unicode"),  # pyright: ignore[reportArgumentType]
        (Passage("a", "text", position=2**31), "position is 2147483648"),
        (Passage("a", "text", position="1"), "position is '1'"),  # pyright: ignore[reportArgumentType]
        (Passage("a", "text", metadata={"colour": 1}), "no such field"),
        (Passage("a", "text", metadata={"year": "2001"}), "whole number"),
        (Passage("a", "text", metadata={"language": "\ud800"}), "surrogate"),
    ],
)
def test_invalid_passages_are_rejected(store, passage, message):
    with pytest.raises(InputError, match=message):
        store.compare([Passage("good", "text"), passage])
    _check_reopened(store, PASSAGES)


def test_duplicate_ids_are_rejected(store):
    with pytest.raises(DuplicateIdError, match="'a'"):
        store.compare([Passage("a", "1"), Passage("b", "2"), Passage("a", "3")])


@BOTH_FORMS
def test_deleting(store):
    assert store.delete(["p1", "nobody", "p1", "p4"]) == 2
    assert store.delete([]) == 0
    with pytest.raises(InputError, match="valid Unicode"):
        store.delete(["p0", "\ud800"])
    _check_reopened(store, {key: value for key, value in PASSAGES.items() if key not in ("p1", "p4")})


@BOTH_FORMS
def test_fields_can_be_added(store):
    store.add_fields(MetadataSchema({"score": "number", "year": "integer"}))
    assert dict(store.metadata.fields) == {"year": "integer", "language": "string", "score": "number"}
    assert put(store, PASSAGES.values()) == store.table().version
    put(store, [Passage("p0", "text", metadata={"score": 0.5})])
    _check_reopened(store, PASSAGES | {"p0": Passage("p0", "text", metadata={"score": 0.5})})
    for conflicting in ({"year": "string"}, {"Year": "integer"}):
        with pytest.raises(InputError):
            store.add_fields(MetadataSchema(conflicting))


# Snapshots


def test_a_copy_of_a_snapshot_is_restored_where_its_vectors_fit(store, tmp_path):
    copy = shutil.copytree(store.snapshot("first"), tmp_path / "copy")
    other = new_store(tmp_path / "other")
    assert other.restore(copy) == len(PASSAGES)
    _check_reopened(other, PASSAGES)
    edit_manifest(copy, student="another")
    with pytest.raises(IndexMismatchError, match=r"copy: its vectors are not made and stored as those of .*other"):
        other.restore(copy)


def test_snapshots_are_read_only(store):
    snapshot = IndexStore.open(store.snapshot("a"))
    for change in (
        lambda: snapshot.delete(["p1"]),
        lambda: put(snapshot, [Passage("new", "text")]),
        snapshot.compact,
        lambda: snapshot.snapshot("b"),
    ):
        with pytest.raises(InputError, match="is the snapshot 'a', which never changes"):
            change()
    with pytest.raises(InputError, match="there is already a snapshot 'a'"):
        store.snapshot("a")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "a\nb", "a b", "a\0", "x" * 101, "\ud800"])
def test_invalid_snapshot_names_are_rejected(store, name):
    for call in (store.snapshot, store.restore, store.drop_snapshot):
        with pytest.raises(InputError, match="cannot name a snapshot"):
            call(name)


def test_an_unknown_snapshot_is_reported(store):
    with pytest.raises(InputError, match=r"no snapshot 'a'; there are: none"):
        store.restore("a")
    store.snapshot("b")
    with pytest.raises(InputError, match=r"no snapshot 'a'; there are: b"):
        store.drop_snapshot("a")


def test_a_damaged_snapshot_is_not_restored(store):
    folder = store.snapshot("a")
    put(store, [Passage("new", "text")])
    (folder / "passages.db").unlink()
    with pytest.raises(DamagedFileError, match=r"snapshots/a/passages.db: is missing"):
        store.restore("a")
    check_contents(PassageView(store), PASSAGES | {"new": Passage("new", "text")})


def test_leftovers_of_interrupted_writers_are_removed(store):
    store.snapshot("kept")
    (store.folder / ".vectors-0.new").mkdir()
    (store.folder / ".vectors-0.json.new-0123").touch()
    (store.folder / "snapshots" / ".a.new-4567").mkdir()
    (store.folder / "snapshots" / ".b.old").mkdir()
    (store.folder / "snapshots" / ".b.old" / "file").touch()
    store.snapshot("b")
    store.drop_snapshot("b")
    store.compact()
    assert list(store.folder.rglob(".*")) == []
    assert store.snapshots() == ["kept"]


# One writer


def test_a_second_writer_fails_immediately(store):
    other = IndexStore.open(store.folder)
    with store.writing(), store.writing():
        for call in (lambda: put(other, [Passage("a", "b")]), lambda: other.delete(["p1"]), other.compact):
            with pytest.raises(IndexLockedError, match="another process or thread is writing"):
                call()
        check_contents(PassageView(other), PASSAGES)
    put(other, [Passage("a", "b")])


def test_a_second_writing_thread_fails_immediately(store):
    errors = []

    def write():
        try:
            store.delete(["p1"])
        except IndexLockedError as error:
            errors.append(error)

    with store.writing():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert len(errors) == 1
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert len(PassageView(store)) == len(PASSAGES) - 1


# Full disks


def _append(store):
    put(store, few_passages(200, start=100).values())


def _commit(store):
    put(store, [Passage("big", "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 20_000))))])


@BOTH_FORMS
@pytest.mark.parametrize(
    ("change", "limit"),
    [
        (_append, 100 * 16),  # the vectors do not fit
        (_commit, 16_000),  # the vectors fit, the text does not
        (lambda store: store.compact(dense=True), 300),
        (lambda store: store.snapshot("a"), 300),
        (lambda store: store.delete(["p1"]), 100),
        (lambda store: store.compact(), 100),
    ],
)
def test_a_full_disk_loses_nothing(store, change, limit):
    with (
        _file_size_limit(limit),
        pytest.raises(StorageError, match=r"cannot be written.*What was committed before is kept"),
    ):
        change(store)
    _check_reopened(store, PASSAGES)
    assert store.snapshots() == []
    change(store)
    assert verify(store).problems == []


@BOTH_FORMS
def test_a_restore_that_fails_on_a_full_disk_loses_nothing(store):
    store.snapshot("a")
    put(store, [Passage("new", "text")])
    with _file_size_limit(300), pytest.raises(StorageError, match="cannot be written"):
        store.restore("a")
    _check_reopened(store, PASSAGES | {"new": Passage("new", "text")})
    store.restore("a")
    _check_reopened(store, PASSAGES)


def test_lost_vectors_are_held_in_memory_on_a_full_disk(store, caplog):
    vector_file.remove(store.folder, 0)
    with _file_size_limit(50):
        check_contents(PassageView(store), PASSAGES)
    assert "held in memory" in caplog.text
    assert list(vector_file.generations(store.folder)) == []


# Invalid folders


def test_create_requires_an_empty_folder(store, tmp_path):
    with pytest.raises(InputError, match="already exists"):
        new_store(store.folder)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, but a folder is needed there"):
        new_store(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert len(PassageView(new_store(tmp_path / "empty"))) == 0
    with pytest.raises(InputError, match="int7"):
        new_store(tmp_path / "new", "int7")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "student"}, "describes a 'student'"),
        ({"dim": "8"}, "no valid dim"),
        ({"student": None, "task": 3}, "no valid student, task"),
        ({"vector_format": "int7"}, "int7"),
        ({"window_format": {"int8": 1}}, "is damaged"),
        ({"vector_copies": 3}, "no valid vector_copies"),
        ({"vector_copies": []}, "no valid vector_copies"),
        ({"vector_copies": None}, "no valid vector_copies"),
        ({"vector_copies": 1}, "other vectors than its manifest"),
        ({"dim": 16}, "other vectors than its manifest"),
        ({"vector_format": "int8"}, "other vectors than its manifest"),
    ],
)
def test_a_wrong_manifest_is_rejected(store, changes, message):
    edit_manifest(store.folder, **changes)
    with pytest.raises(DataFormatError, match=message):
        PassageView(IndexStore.open(store.folder))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"{}"])
def test_an_unreadable_manifest_is_rejected(store, content):
    path = store.folder / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataFormatError, match=str(store.folder)):
        IndexStore.open(store.folder)
