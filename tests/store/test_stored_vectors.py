"""Vectors stored in one copy: damaged vectors are never returned, and the student encodes lost ones again."""

from __future__ import annotations

import re
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, IndexMismatchError, InputError, StorageError
from d2llm.core.types import Passage
from d2llm.retrieval.index import Index
from d2llm.store import stored_vectors, vector_file
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.passage_table import PassageTable
from d2llm.store.vector_file import VectorFile
from d2llm.store.view import PassageView
from fake_models import FakeStudent, Interruption
from tiny_store import DIM, check_contents, few_passages, new_store, put, vectors_of

PASSAGES = few_passages(30)
DELETED = ("p4", "p29")
ALIVE = {key: passage for key, passage in PASSAGES.items() if key not in DELETED}
QUERY = np.ones(DIM, np.float32)
CODE_SIZE = 2 * DIM


class Encoder:
    """Stands in for a student and records in ``asked`` the ids of the passages it encodes."""

    def __init__(self, fail_after: int | None = None):
        self.asked: list[str] = []
        self.fail_after = fail_after

    def __call__(self, passages):
        if self.fail_after is not None and len(self.asked) + len(passages) > self.fail_after:
            raise Interruption
        self.asked += [passage.id for passage in passages]
        return vectors_of(passages)


@pytest.fixture(scope="module")
def built_folder(tmp_path_factory):
    """30 passages in three extents of ten rows; two of them are deleted, including the last one."""
    folder = tmp_path_factory.mktemp("made") / "index"
    store = new_store(folder, vector_copies=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2llm.store.vector_file._JOINED_ROWS", 10)
        for start in (0, 10, 20):
            put(store, few_passages(10, start=start).values())
    store.delete(DELETED)
    return folder


@pytest.fixture
def store(built_folder, tmp_path):
    return IndexStore.open(shutil.copytree(built_folder, tmp_path / "index"))


def _damage(folder: Path, damage: str) -> list[str]:
    """Damage the vector file; return the ids of the live passages whose vectors are lost."""
    path = vector_file.path_of(folder, 0)
    content = bytearray(path.read_bytes())
    lost = range(30)
    path.unlink()  # snapshots, and readers that have it mapped, keep the old file
    if damage == "flipped":
        content[12 * CODE_SIZE] ^= 1
        lost = range(10, 20)
    elif damage == "flipped twice":
        content[9 * CODE_SIZE] ^= 128
        content[30 * CODE_SIZE - 1] ^= 1
        lost = [*range(10), *range(20, 30)]
    elif damage == "dead row flipped":
        content[4 * CODE_SIZE] ^= 1
        lost = range(10)
    elif damage == "cut":
        del content[-1:]
        lost = range(20, 30)
    elif damage == "cut in the middle":
        del content[15 * CODE_SIZE + 1 :]
        lost = range(10, 30)
    elif damage == "empty":
        content.clear()
    if damage != "missing":
        path.write_bytes(content)
    record = path.with_suffix(".json")
    if damage == "no list":
        record.unlink()
    elif damage == "garbage list":
        record.write_text('{"extents": [["a", "b", "c"]], "since": "x"}')
    elif damage == "of a later version":
        write_checked(record, read_checked(record) | {"since": 99})
    elif damage == "an older copy":
        content = read_checked(record)
        write_checked(record, content | {"extents": content["extents"][:2]})
        lost = range(20, 30)
    return [f"p{n}" for n in lost if f"p{n}" in ALIVE]


DAMAGES = pytest.mark.parametrize(
    "damage",
    [
        "flipped",
        "flipped twice",
        "dead row flipped",
        "cut",
        "cut in the middle",
        "empty",
        "missing",
        "no list",
        "garbage list",
        "of a later version",
        "an older copy",
    ],
)


def test_the_table_has_no_vectors(store):
    assert {record["d2_vector"] for batch in store.table().batches() for record in batch} == {None}
    check_contents(PassageView(store), ALIVE)
    assert verify(store).problems == []
    index_stats = stats(store)
    assert (index_stats.vector_copies, index_stats.vector_bytes, index_stats.num_rows) == (1, CODE_SIZE, 30)
    assert index_stats.vector_file_bytes == 30 * CODE_SIZE + (store.folder / "vectors-0.json").stat().st_size


def test_invalid_numbers_of_copies_are_rejected(tmp_path):
    for copies in (0, 3):
        with pytest.raises(InputError, match=r"vector_copies is \d, but must be at (least 1|most 2)"):
            new_store(tmp_path / "index", vector_copies=copies)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "index").exists()


@DAMAGES
def test_damage_is_an_error_until_lost_vectors_are_encoded_again(store, damage):
    opened_before = PassageView(store)
    lost, encode = _damage(store.folder, damage), Encoder()
    for read in (
        lambda: PassageView(store).scan(QUERY, 3),
        lambda: PassageView(store).vectors(np.array([0])),
        lambda: PassageView(store).block(0, 2),
        lambda: store.compact(dense=True),
    ):
        with pytest.raises(DataFormatError, match=re.escape(f"`d2llm index {store.folder} verify --repair` encodes")):
            read()
    check_contents(opened_before, ALIVE)
    (problem,) = verify(store).problems
    assert problem.endswith(f"; {len(lost)} of 28 passages have lost their vectors")
    assert "vectors-0.bin" in problem
    assert verify(store, repair=True, encode=encode).problems == [f"{problem}; it was rewritten"]
    assert encode.asked == lost
    assert verify(store).problems == []
    check_contents(PassageView(store), ALIVE)
    put(store, few_passages(5, start=50).values())  # appended to the repaired file
    check_contents(PassageView(store), ALIVE | few_passages(5, start=50))
    assert list(store.folder.glob(".vectors*")) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "an older copy", "of a later version"])
def test_a_vector_file_that_lacks_rows_is_not_extended(store, damage):
    _damage(store.folder, damage)
    version = store.table().version
    for change in (
        lambda: put(store, [Passage("new", "text")]),
        lambda: put(store, [Passage("p1", PASSAGES["p1"].text, PASSAGES["p1"].title)]),
        lambda: store.snapshot("a"),
        store.compact,
    ):
        with pytest.raises(DataFormatError, match="verify --repair"):
            change()
    assert (store.table().version, store.snapshots()) == (version, [])


def test_appended_rows_do_not_hide_damage(store):
    """A file that has all of its rows can be extended; the damage is still an error, and is repaired."""
    lost = _damage(store.folder, "flipped")
    put(store, few_passages(3, start=40).values())
    with pytest.raises(DataFormatError, match="is damaged"):
        PassageView(store).scan(QUERY, 1)
    encode = Encoder()
    verify(store, repair=True, encode=encode)
    assert encode.asked == lost
    check_contents(PassageView(store), ALIVE | few_passages(3, start=40))


@pytest.mark.parametrize("damage", ["missing", "of a later version", "no list"])
def test_an_index_without_passages_has_nothing_to_lose(store, damage):
    _damage(store.folder, damage)
    store.delete(list(PASSAGES))
    assert len(PassageView(store).scan(QUERY, 3).rows) == 0
    assert store.vectors.recover(store.table(), "lost").codes.shape == (0, CODE_SIZE)
    put(store, few_passages(3).values())
    check_contents(PassageView(store), few_passages(3))
    assert verify(store).problems == []


def test_a_newer_file_of_an_empty_index_is_not_damage(store):
    """A writer killed before it commits the rewrite of an empty index leaves the file of a later version."""
    store.delete(list(PASSAGES))
    version = store.table().version
    VectorFile.replace(store.folder, 7, np.zeros((0, CODE_SIZE), np.uint8), since=version + 1)
    assert verify(store).problems == []
    put(store, few_passages(3).values())
    check_contents(PassageView(store), few_passages(3))
    assert verify(store).problems == []


def test_a_repair_needs_an_encoder(store):
    _damage(store.folder, "flipped")
    with pytest.raises(InputError, match="a student must encode"):
        verify(store, repair=True)
    assert len(verify(store).problems) == 1


def test_an_interrupted_repair_is_resumed(store, monkeypatch):
    monkeypatch.setattr(stored_vectors, "_REPAIRED_ROWS", 7)
    lost, first = _damage(store.folder, "missing"), Encoder(fail_after=13)
    with pytest.raises(Interruption):
        verify(store, repair=True, encode=first)
    with pytest.raises(DataFormatError, match="verify --repair"):
        PassageView(store)
    assert len(verify(store).problems) == 1
    second = Encoder()
    verify(store, repair=True, encode=second)
    assert first.asked
    assert first.asked + second.asked == lost
    check_contents(PassageView(store), ALIVE)


@pytest.mark.parametrize("change", ["a text", "damage"])
def test_leftovers_of_an_interrupted_repair_are_checked(store, monkeypatch, change):
    monkeypatch.setattr(stored_vectors, "_REPAIRED_ROWS", 7)
    lost = _damage(store.folder, "cut in the middle")
    with pytest.raises(Interruption):
        verify(store, repair=True, encode=Encoder(fail_after=5))
    (draft,) = store.folder.glob(".vectors-0.new*")
    if change == "damage":
        content = bytearray((draft / "vectors-0.bin").read_bytes())
        content[0] ^= 1
        (draft / "vectors-0.bin").write_bytes(content)
    else:
        store.delete(["p11"])
        lost.remove("p11")
    encode = Encoder()
    verify(store, repair=True, encode=encode)
    assert encode.asked == lost
    check_contents(PassageView(store), {key: ALIVE[key] for key in ALIVE if change == "damage" or key != "p11"})


@pytest.mark.parametrize("renames", [0, 1])
def test_a_repair_killed_while_it_replaces_the_files(store, monkeypatch, renames):
    """Killed before its first rename, and between its two renames."""
    _damage(store.folder, "flipped twice")
    replace, renamed = Path.replace, []

    def kill(self, target):
        if self.parent.name.startswith(".vectors"):
            if len(renamed) == renames:
                raise KeyboardInterrupt
            renamed.append(self)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            verify(store, repair=True, encode=lambda passages: vectors_of(passages) * 2)
    with pytest.raises(DataFormatError, match="verify --repair"):
        PassageView(store).scan(QUERY, 1)
    for path in store.folder.glob(".vectors-*"):
        shutil.rmtree(path)  # discard the first draft, which has doubled vectors
    verify(store, repair=True, encode=Encoder())
    check_contents(PassageView(store), ALIVE)


def test_a_repair_on_a_full_disk_keeps_the_old_file(store, monkeypatch):
    lost = _damage(store.folder, "flipped")
    content = vector_file.path_of(store.folder, 0).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(VectorFile, "append", fail)
        with pytest.raises(StorageError, match="No space left"):
            verify(store, repair=True, encode=Encoder())
    assert vector_file.path_of(store.folder, 0).read_bytes() == content
    encode = Encoder()
    verify(store, repair=True, encode=encode)
    assert encode.asked == lost


# Versions and snapshots


def test_versions_from_before_a_repair_have_no_vectors(store):
    version = store.table().version
    check_contents(PassageView(store, version - 1), PASSAGES)
    put(store, few_passages(2, start=60).values())
    _damage(store.folder, "missing")
    for _ in range(2):
        with pytest.raises(DataFormatError, match=f"version {version} no longer has vectors .*open the index again"):
            PassageView(store, version)
        verify(store, repair=True, encode=Encoder())
    check_contents(PassageView(store), ALIVE | few_passages(2, start=60))


@pytest.mark.parametrize("damage", ["flipped twice", "cut", "missing"])
def test_a_damaged_snapshot_is_restored_only_after_a_repair(store, damage):
    folder = store.snapshot("a")
    lost = _damage(folder, damage)
    put(store, [Passage("new", "text")])
    with pytest.raises(DataFormatError, match=re.escape(f"`d2llm index {folder} verify --repair`")):
        store.restore("a")
    check_contents(PassageView(store), ALIVE | {"new": Passage("new", "text")})
    (problem,) = verify(store).problems
    assert problem.startswith("snapshot 'a': ")
    encode = Encoder()
    assert verify(store, repair=True, encode=encode).problems == [f"{problem}; it was rewritten"]
    assert encode.asked == lost
    assert store.restore("a") == 28
    check_contents(PassageView(store), ALIVE)


def test_a_snapshot_can_be_repaired_by_itself(store):
    snapshot = IndexStore.open(store.snapshot("a"))
    _damage(snapshot.folder, "missing")
    verify(snapshot, repair=True, encode=Encoder())
    check_contents(PassageView(snapshot), ALIVE)


def test_damage_shared_with_a_snapshot_is_repaired_in_both(store):
    snapshot = IndexStore.open(store.snapshot("a"))
    path = vector_file.path_of(store.folder, 0)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)  # in place: the snapshot has a hard link to the same file
    assert len(verify(store).problems) == 2
    verify(store, repair=True, encode=Encoder())
    assert verify(store).problems == []
    for repaired in (store, snapshot):
        check_contents(PassageView(repaired), ALIVE)


def test_compaction_removes_unneeded_vectors(store):
    store.compact(timedelta(0), dense=True)
    assert list(vector_file.generations(store.folder)) == [1]
    check_contents(PassageView(store), ALIVE)


# With a student


def test_the_student_repairs_an_index(tmp_path):
    student = FakeStudent()
    index = Index.create(tmp_path / "i", student, vector_copies=1)
    passages = [Passage(f"p{n}", f"text {n}", "title") for n in range(20)]
    index.upsert(passages)
    before = index.search("title text 7", top_k=5)
    vector_file.remove(index.folder, 0)
    with pytest.raises(DataFormatError, match="verify --repair"):
        Index.open(index.folder, student).search("text 7")
    with pytest.raises(IndexMismatchError, match="another"):
        Index.open(index.folder, FakeStudent(fingerprint="another")).verify(repair=True)
    reopened = Index.open(index.folder, student)
    # The words were removed along with the vectors.
    vectors_problem, words_problem = reopened.verify(repair=True).problems
    assert vectors_problem.endswith("it was rewritten")
    assert words_problem == "the words of 20 passages are in no file; they were read again"
    assert student.encoded_passages == 40
    assert reopened.verify(repair=True).problems == []
    assert student.encoded_passages == 40
    assert reopened.search("title text 7", top_k=5).passages == before.passages


def test_two_copies_are_repaired_without_the_student(tmp_path):
    index = Index.create(tmp_path / "i", FakeStudent())
    index.upsert([Passage(f"p{n}", f"text {n}") for n in range(20)])
    index.snapshot("a")
    for folder in (index.folder, index.folder / "snapshots" / "a"):
        vector_file.remove(folder, 0)
    index_without_student = Index.open(index.folder, tmp_path / "nowhere")
    problems = index_without_student.verify(repair=True).problems  # one for vectors and one for words, in each folder
    assert len(problems) == 4
    assert sum(problem.endswith("it was rewritten") for problem in problems) == 2
    assert index_without_student.verify().problems == []


def test_compaction_reads_no_version_by_itself(store, monkeypatch):
    """Finding the last row of an old version passes all newer ones: of 2,000 versions, that took an hour."""
    for number in range(20):
        put(store, few_passages(1, start=100 + number).values())
    store.compact(dense=True)
    opened: list[int] = []
    last_row = PassageTable.last_row

    def counted(table):
        opened.append(table.version)
        return last_row(table)

    monkeypatch.setattr(PassageTable, "last_row", counted)
    store.compact()
    assert sorted(vector_file.generations(store.folder)) == [0, 1]  # an hour's versions are kept
    assert set(opened) == {store.table().version}
    store.compact(timedelta(0))
    assert list(vector_file.generations(store.folder)) == [1]
