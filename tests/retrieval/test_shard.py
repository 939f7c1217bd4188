from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from d2llm.core.errors import D2LLMError, DataFormatError, DuplicateIdError, IndexMismatchError, InputError
from d2llm.core.types import Passage
from d2llm.retrieval import build_ann as build_ann_module
from d2llm.retrieval import upserting
from d2llm.retrieval.build_ann import build_ann
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.shard import shard
from d2llm.store.index_manifest import Chunking, read_errors, write_chunking, write_errors
from d2llm.store.index_store import IndexStore
from d2llm.store.passage_table import bytes_at_rest
from d2llm.store.shards import Storage, read_sharded_manifest, shard_of
from fake_models import FakeStudent, Interruption
from sharded_index import BoundedStudent, random_passages, results_of

STUDENT = BoundedStudent()
ERRORS = {"teacher": {"slope": 2.0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index with deleted passages and its three shards; tests that change them make copies."""
    folder = tmp_path_factory.mktemp("made")
    one = Index.create(folder / "one", STUDENT, window_vectors="int3", token_vectors="int4")
    one.upsert(random_passages(50))
    one.delete([f"p{n}" for n in range(0, 50, 7)])
    write_chunking(folder / "one", Chunking(64))
    write_errors(folder / "one", ERRORS)
    report = shard(folder / "one", folder / "three", 3)
    return folder, report


@pytest.fixture
def three(made, tmp_path):
    return shutil.copytree(made[0] / "three", tmp_path / "three")


def contents(index):
    """Passages with their vectors and parts, by id."""
    values = {}
    for view in index.view.segments:
        rows = view.live_rows()
        windows, tokens = view.windows.take(rows), view.tokens.take(rows)
        ends = [np.cumsum(counts) for _, counts in (windows, tokens)]
        for position, passage in enumerate(view.passages(rows)):
            parts = [
                codes[end[position] - counts[position] : end[position]].tolist()
                for (codes, counts), end in zip((windows, tokens), ends, strict=True)
            ]
            values[passage.id] = (passage, view.vectors(rows[position : position + 1]).tolist(), parts)
    return values


def test_nothing_is_lost_or_encoded(made):
    folder, report = made
    one, three = Index.open(folder / "one", STUDENT), Index.open(folder / "three", STUDENT)
    assert contents(three) == contents(one)
    assert (report.num_passages, report.num_shards, report.num_resumed) == (len(one), 3, 0)
    sizes = [len(view) for view in three.view.segments]
    assert (report.fewest, report.most) == (min(sizes), max(sizes))
    assert three.chunking == Chunking(64)
    assert read_errors(three.folder) == ERRORS
    assert three.verify().problems == []
    assert three.storage.manifest["student_source"] is None
    assert sorted(path.name for path in folder.iterdir()) == ["one", "three"]


def test_a_document_stays_together_and_its_shard_is_stable(made):
    three = Index.open(made[0] / "three", STUDENT)
    shards = {}
    for number, view in enumerate(three.view.segments):
        for passage in view.passages(view.live_rows()):
            shards.setdefault(passage.document_id or passage.id, set()).add(number)
            assert shard_of(passage.id, passage.document_id, 3) == number
    assert all(len(numbers) == 1 for numbers in shards.values())
    # Fixed values: another hash would send changes to other shards.
    assert [shard_of(name, "", 1_000) for name in ("p0", "p1", "中文")] == [261, 148, 286]
    assert shard_of("p0", "d1", 7) == shard_of("d1", "", 7)


def test_each_shard_is_an_index_of_its_own(made):
    for store in Storage.open(made[0] / "three").stores:
        shard_index = Index.open(store.folder, STUDENT)
        assert len(shard_index.search("apple").passages) == min(10, len(shard_index))
        assert shard_index.verify().problems == []


def test_reading_a_sharded_index(made):
    one, three = (Index.open(made[0] / name, STUDENT) for name in ("one", "three"))
    ids = ["p8", "nowhere", "p1", "p8"]
    assert three.get(ids) == one.get(ids)
    assert three.missing(ids) == ["nowhere"]
    assert three.get_document("d1") == one.get_document("d1")
    assert three.list_passages("p2", 5) == one.list_passages("p2", 5)
    assert three.list_documents(limit=7) == one.list_documents(limit=7)
    rows = three.view.rows(["p9", "p1"])
    assert three.view.ids(rows) == ["p9", "p1"]
    np.testing.assert_array_equal(three.view.vectors(rows), one.view.vectors(one.view.rows(["p9", "p1"])))
    with pytest.raises(InputError, match="1 of 2 passages are not in the index, the first is 'nowhere'"):
        three.view.rows(["p1", "nowhere"])
    assert three.view.ids(three.view.match("apple", 5).rows) == one.view.ids(one.view.match("apple", 5).rows)
    mine, other = three.stats(), one.stats()
    assert (mine.num_passages, mine.num_shards, other.num_shards) == (other.num_passages, 3, None)
    assert (mine.metadata, mine.vector_format) == (other.metadata, other.vector_format)
    num_bytes = sum(bytes_at_rest(store.folder) for store in three.storage.stores)
    assert mine.bytes_per_passage == round(num_bytes / len(three), 1)


@pytest.mark.parametrize("copies", [1, 2])
def test_vectors_stored_once_or_twice_in_any_number_of_shards(tmp_path, copies):
    index = Index.create(tmp_path / "i", FakeStudent(), vector_copies=copies, vector_format="int8")
    index.upsert(random_passages(9))
    shard(tmp_path / "i", tmp_path / "s", 12)  # some are empty
    several = Index.open(tmp_path / "s", FakeStudent())
    assert several.stats().vector_copies == copies
    assert min(len(view) for view in several.view.segments) == 0
    assert results_of(several.search("apple", top_k=20)) == results_of(index.search("apple", top_k=20))
    shard(tmp_path / "s", tmp_path / "again", 2)
    again = Index.open(tmp_path / "again", FakeStudent())
    assert results_of(again.search("apple", exact=True)) == results_of(index.search("apple", exact=True))


def test_an_empty_index_can_be_sharded(tmp_path):
    Index.create(tmp_path / "i", FakeStudent())
    shard(tmp_path / "i", tmp_path / "s", 2)
    index = Index.open(tmp_path / "s", FakeStudent())
    assert index.search("apple").passages == ()
    assert index.search("apple", exact=True).certificate.num_left == 0
    index.upsert([Passage("a", "apple")])
    assert results_of(index.search("apple"))[0][0] == "a"


def test_an_interrupted_copy_continues(made, tmp_path, monkeypatch):
    folder = made[0]
    original, num_left = IndexStore.append_rows, 2  # then the first two shards are written

    def fails(*arguments):
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(IndexStore, "append_rows", fails)
        with pytest.raises(KeyboardInterrupt):
            shard(folder / "one", tmp_path / "s", 3)
    assert not (tmp_path / "s").exists()
    report = shard(folder / "one", tmp_path / "s", 3)
    assert 0 < report.num_resumed < report.num_passages
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    again = Index.open(tmp_path / "s", STUDENT)
    assert contents(again) == contents(Index.open(folder / "one", STUDENT))
    assert again.verify().problems == []


def test_an_approximate_index_in_each_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(build_ann_module, "MIN_PASSAGES", 5)
    monkeypatch.setattr(build_ann_module, "MAX_EFFORT", 1.0)
    index = Index.create(tmp_path / "i", STUDENT, num_shards=2, window_vectors=None, token_vectors=None)
    index.upsert(random_passages(600))
    for store in index.storage.stores:
        build_ann(store, STUDENT, recall=0.9, depth=3)
    index.refresh()
    assert all(view.ann is not None for view in index.view.segments)
    assert index.stats().ann_passages == len(index)
    exact = dict(results_of(index.search("apple pear", sources=("vectors",), score_features={}, top_k=99)))
    found = results_of(index.search("apple pear", sources=("ann",), score_features={}, top_k=4, num_candidates=4))
    assert len(found) == 4
    assert all(score == pytest.approx(exact[passage_id]) for passage_id, score in found)


class TestBadInput:
    def test_targets_and_numbers(self, made, tmp_path):
        folder = made[0]
        with pytest.raises(InputError, match="cannot have 0 shards; give 1 to 65,536"):
            shard(folder / "one", tmp_path / "s", 0)
        with pytest.raises(InputError, match="already holds an index"):
            shard(folder / "one", folder / "three", 3)
        with pytest.raises(InputError, match="holds a 'index'"):
            shard(folder / "one", folder / "one", 3)
        with pytest.raises(DataFormatError, match="not found"):
            shard(tmp_path / "none", tmp_path / "s", 3)

    def test_a_missing_shard(self, three):
        shutil.rmtree(three / "shard-0001")
        with pytest.raises(DataFormatError, match=r"shard-0001: is missing, but is .*three: shard 1 of 3; put it back"):
            Index.open(three)

    def test_a_shard_of_another_student(self, three, tmp_path):
        other = Index.create(tmp_path / "other", BoundedStudent(fingerprint="somebody-else"))
        shutil.rmtree(three / "shard-0001")
        shutil.copytree(other.folder, three / "shard-0001")
        with pytest.raises(IndexMismatchError, match="shard 1 of 3 in shard-0001 was made by student somebody-else"):
            Index.open(three)

    def test_shards_that_changed_places(self, three):
        (three / "shard-0001").rename(three / "x")
        (three / "shard-0002").rename(three / "shard-0001")
        (three / "x").rename(three / "shard-0002")
        with pytest.raises(IndexMismatchError, match="it is not the shard that was written there"):
            Index.open(three)

    def test_a_shard_of_another_sharded_index(self, three, made, tmp_path):
        shard(made[0] / "one", tmp_path / "second", 3)
        shutil.rmtree(three / "shard-0001")
        shutil.copytree(tmp_path / "second" / "shard-0001", three / "shard-0001")
        with pytest.raises(IndexMismatchError, match="it is not the shard that was written there"):
            Index.open(three)

    def test_an_old_copy_of_a_shard(self, three, tmp_path):
        shutil.copytree(three, tmp_path / "copy")
        index = Index.open(three, STUDENT)
        index.upsert(random_passages(30, start=100))
        shutil.rmtree(three / "shard-0001")
        shutil.copytree(tmp_path / "copy" / "shard-0001", three / "shard-0001")
        with pytest.raises(IndexMismatchError, match=r"shard 1 of 3 .* an older one than \d+, which the index lists"):
            Index.open(three)

    def test_a_damaged_manifest(self, three):
        path = three / "manifest.json"
        content = json.loads(path.read_text())
        content["shards"].pop()
        path.write_text(json.dumps(content))
        with pytest.raises(DataFormatError, match="is not what was written"):
            Index.open(three)

    def test_what_only_one_store_can_do_is_a_clear_error(self, three):
        index = Index.open(three, STUDENT)
        for action in (lambda: index.snapshot("a"), lambda: index.restore("a"), index.build_ann):
            with pytest.raises(
                InputError, match="not possible for a sharded index as a whole; do it for each of its 3"
            ):
                action()

    def test_a_store_that_is_not_sharded_is_needed(self, three):
        with pytest.raises(DataFormatError, match="three: is a sharded index, but one that is not sharded"):
            IndexStore.open(three)

    def test_a_missing_shard_can_be_allowed(self, three, made):
        shutil.rmtree(three / "shard-0001")
        index = Index.open(three, STUDENT, allow_missing=True)
        ranking = index.search("apple", top_k=50, exact=True)
        [missing] = ranking.missing_shards
        assert (missing.number, missing.address) == (1, "shard-0001")
        assert "is missing" in missing.problem
        whole = Index.open(made[0] / "three", STUDENT)
        there = [passage for number in (0, 2) for passage in whole.view.segments[number].list_passages(limit=99)]
        assert sorted(passage_id for passage_id, _ in results_of(ranking)) == sorted(there)
        index.search("apple", neighbours=1)
        with pytest.raises(InputError, match="cannot be changed while shard 1 is missing"):
            index.upsert([Passage("a", "apple")])
        for number in (0, 2):
            shutil.rmtree(three / f"shard-{number:04}")
        with pytest.raises(InputError, match="none of its 3 shards can be opened"):
            Index.open(three, allow_missing=True)

    @pytest.mark.parametrize("step", ["propose", "score", "certify"])
    def test_a_shard_that_fails_during_a_search(self, three, monkeypatch, step):
        from d2llm.retrieval.local_segment import LocalSearch

        original = getattr(LocalSearch, step)

        def fails(shard, *arguments, **options):
            if shard.view.store.folder.name == "shard-0002":
                raise OSError(5, "Input/output error")
            return original(shard, *arguments, **options)

        monkeypatch.setattr(LocalSearch, step, fails)
        exact = step == "certify"
        with pytest.raises(OSError, match="Input/output"):
            Index.open(three, STUDENT).search("apple", exact=exact)
        ranking = Index.open(three, STUDENT, allow_missing=True).search("apple", exact=exact, top_k=50)
        [missing] = ranking.missing_shards
        assert missing.number == 2
        assert "Input/output error" in missing.problem
        shards = {shard_of(one.passage.id, one.passage.document_id, 3) for one in ranking.passages}
        assert shards == {0, 1}


class TestChanges:
    def test_upserts_and_deletions_go_to_their_shards(self, three):
        index = Index.open(three, STUDENT)
        versions = [record.version for record in index.storage.records]
        one = Passage("p1", "apple apple pear", document_id="d0", position=1, metadata={"year": 2001})
        report = index.upsert([one])
        assert (report.num_added, report.num_updated) == (0, 1)
        assert index.get(["p1"]) == [one]
        changed = [
            record.version > before for record, before in zip(read_sharded_manifest(three)[1], versions, strict=True)
        ]
        assert changed[shard_of("p1", "d0", 3)]
        assert index.delete(["p1", "p2", "nowhere"]) == 2
        assert index.get(["p1", "p2"]) == []
        assert index.verify().problems == []

    def test_a_passage_that_changes_its_document_moves(self, three):
        index = Index.open(three, STUDENT)
        before = len(index)
        target = next(name for name in map(str, range(99)) if shard_of("", name, 3) != shard_of("p1", "d0", 3))
        report = index.upsert([Passage("p1", "apple", document_id=target)])
        assert (report.num_added, report.num_updated, len(index)) == (0, 1, before)
        assert index.get(["p1"])[0].document_id == target
        assert index.verify().problems == []

    def test_only_new_looks_into_all_shards(self, three):
        index = Index.open(three, STUDENT)
        target = next(name for name in map(str, range(99)) if shard_of("", name, 3) != shard_of("p1", "d0", 3))
        with pytest.raises(DuplicateIdError, match="already exist, such as 'p1'"):
            index.add([Passage("p1", "apple", document_id=target)])

    def test_a_new_field_is_in_every_shard(self, three):
        index = Index.open(three, STUDENT)
        index.upsert([Passage("new", "apple", metadata={"colour": "red"})])
        assert all(store.metadata.fields["colour"] == "string" for store in index.storage.stores)
        assert results_of(index.search("apple", filter="colour = 'red'"))[0][0] == "new"

    def test_verify_finds_passages_in_wrong_shards_and_in_two(self, three):
        index = Index.open(three, STUDENT)
        number = (shard_of("p1", "d0", 3) + 1) % 3
        Index.open(three / f"shard-{number:04}", STUDENT).upsert([Passage("p1", "apple", document_id="d0")])
        problems = index.verify().problems
        assert len(problems) == 2
        assert f"shard {number}: 1 passage belongs in other shards, the first is 'p1'" in problems[0]
        assert "1 id is in two shards" in problems[1]
        report = index.upsert(index.get(["p1"]))
        assert (report.num_added, report.num_updated) == (0, 1)
        assert Index.open(three, STUDENT).verify().problems == []

    def test_verify_names_the_damaged_shard_and_repairs_it(self, three):
        path = three / "shard-0001" / "vectors-0.bin"
        [path] = (three / "shard-0001").glob("vectors-*.bin")
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(bytes(content))
        [problem] = Index.open(three, STUDENT).verify().problems
        assert problem.startswith("shard 1: vectors-")
        Index.open(three, STUDENT).verify(repair=True)
        assert Index.open(three, STUDENT).verify().problems == []

    def test_compact(self, three, made):
        index = Index.open(three, STUDENT)
        index.delete([f"p{n}" for n in range(30)])
        before, after = index.compact()
        assert before > 0
        assert after > 0
        assert index.verify().problems == []
        assert results_of(index.search("apple"))


class TestEncode:
    def test_a_corpus_is_encoded_straight_into_shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 4)
        passages = random_passages(40)
        encode(passages, FakeStudent(), tmp_path / "one")
        report = encode(passages, FakeStudent(), tmp_path / "three", num_shards=3)
        assert (report.num_passages, report.folder) == (40, tmp_path / "three")
        one, three = (Index.open(tmp_path / name, FakeStudent()) for name in ("one", "three"))
        assert results_of(three.search("apple", top_k=40)) == results_of(one.search("apple", top_k=40))
        assert three.verify().problems == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]

    def test_it_resumes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 4)
        student = FakeStudent(fail_after=20)
        with pytest.raises(Interruption):
            encode(random_passages(40), student, tmp_path / "s", num_shards=3)
        assert not (tmp_path / "s").exists()
        report = encode(random_passages(40), FakeStudent(), tmp_path / "s", num_shards=3)
        assert report.num_resumed >= 12
        index = Index.open(tmp_path / "s", FakeStudent())
        assert Counter(index.list_passages(limit=99)) == Counter(f"p{n}" for n in range(40))

    def test_overwriting_needs_the_same_kind(self, tmp_path):
        encode(random_passages(4), FakeStudent(), tmp_path / "i")
        with pytest.raises(D2LLMError, match="holds a 'index'"):
            encode(random_passages(4), FakeStudent(), tmp_path / "i", num_shards=2, overwrite=True)
        encode(random_passages(4), FakeStudent(), tmp_path / "s", num_shards=2)
        encode(random_passages(6), FakeStudent(), tmp_path / "s", num_shards=2, overwrite=True)
        assert len(Index.open(tmp_path / "s", FakeStudent())) == 6
