"""Vectors of windows in an index: written with passages, kept through every change, part of the score."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.models.evidence import EvidenceWeights
from d2llm.ops.words import windows
from d2llm.retrieval.index import Index
from d2llm.retrieval.reading import read_windows
from d2llm.store import index_store as store_module
from d2llm.store.index_store import IndexStore
from fake_models import FakeStudent

TEXTS = {
    "short": "One sentence alone.",
    "two": "First one. Then another.",
    "three": "A gem is here. It is blue. It was found in the river.",
    "empty": " ",
    "long": "The start of it. " * 5 + "A rare thing. The end.",
    "letters": "x" * 10_000,
}
WEIGHTS = {"words": 0.25, "window_vectors": 2.0}


class WindowStudent(FakeStudent):
    """A student whose score counts windows, if the index has them."""

    def evidence_weights(self, task, *, windows=True):
        if task != "asymmetric":
            return EvidenceWeights()
        return EvidenceWeights(terms=WEIGHTS if windows else {"words": 1.0})


def passages(**texts):
    return [Passage(name, text) for name, text in texts.items()]


@pytest.fixture
def index(tmp_path):
    made = Index.create(tmp_path / "index", WindowStudent(), vector_format="float32", window_vectors="float32")
    made.upsert(passages(**TEXTS))
    return made


def killed(*_arguments):
    raise KeyboardInterrupt


def expected(index, text, names):
    """By hand, from the texts: the best inner product with a window, or with the passage's own vector."""
    student = index.student
    anchor = student.anchor_queries(student.encode_queries([text]).vectors, "asymmetric")[0]
    found = []
    for passage in index.get(names):
        spans = windows(passage.full_text)
        parts = [passage.full_text[start:end] for start, end in spans] if len(spans) > 1 else [passage.full_text]
        found.append(float((student.encode_passages(parts).vectors @ anchor).max()))
    return found


def best(index, text, names):
    student = index.student
    anchor = student.anchor_queries(student.encode_queries([text]).vectors, "asymmetric")[0]
    return index.view.best_windows(anchor, index.view.rows(names)).tolist()


def assert_windows(index, names=tuple(TEXTS)):
    assert best(index, "a rare gem", names) == pytest.approx(expected(index, "a rare gem", names), rel=1e-5)


def test_each_passage_has_those_of_its_text(index):
    counts = index.view.windows.counts(index.view.rows(list(TEXTS))).tolist()
    assert counts[:4] == [0, 0, 2, 0]
    assert counts[4] == 6
    assert counts[5] > 10  # a sentence too long is cut
    assert_windows(index)
    assert index.stats().window_format == "float32"
    assert index.stats().window_bytes > sum(counts) * 4 * index.student.vector_dim


def test_the_score_counts_them(index):
    student = index.student
    (plain,) = index.search("a rare gem", evidence={}, sources=("vectors", "bm25"))
    (words,) = index.search("a rare gem", evidence={"words": 0.25})
    (found,) = index.search("a rare gem", explain=True)
    names = [place.passage.id for place in found.passages]
    assert set(names) == set(TEXTS)
    of_words = {place.passage.id: place.score for place in words.passages}
    added = dict(zip(names, best(index, "a rare gem", names), strict=True))
    for place in found.passages:
        assert place.score == pytest.approx(of_words[place.passage.id] + 2.0 * added[place.passage.id], rel=1e-4)
        why = place.explanation
        assert why.windows == pytest.approx(2.0 * added[place.passage.id], rel=1e-5)
        assert why.anchor + why.interaction + why.lexical + why.windows == pytest.approx(place.score, rel=1e-4)
    assert [place.score for place in plain.passages] != [place.score for place in found.passages]
    (exact,) = index.search("a rare gem", exact=True, top_k=3)
    assert [place.passage.id for place in exact.passages] == names[:3]
    assert exact.certificate.proved == 3
    assert not student.evidence_weights("symmetric")


def test_passages_that_change_come_and_go_have_theirs(index):
    index.upsert(passages(three="Now it is new. It is red. Nothing else.", added="Here. It. Is.", short="Still one."))
    index.delete(["two", "long"])
    left = ["short", "three", "empty", "letters", "added"]
    assert_windows(index, left)
    index.upsert([Passage("added", "Here. It. Is.", metadata={"year": 2020})])  # other metadata alone
    assert_windows(index, left)
    index.compact(dense=True)
    assert_windows(index, left)
    assert index.view.capacity == len(left)
    index.upsert(passages(later="One. Two. Three. Four."))
    assert_windows(index, [*left, "later"])
    assert index.verify().problems == []


def test_snapshots_keep_them(index):
    index.snapshot("before")
    index.delete(["long", "three"])
    index.compact(dense=True)
    assert_windows(Index.open(index.folder / "snapshots" / "before", WindowStudent()))
    index.restore("before")
    assert_windows(index)
    assert index.verify().problems == []


def test_a_writer_that_was_killed_between_vectors_and_windows_does_no_harm(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "append_windows", killed)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(passages(lost="Not there. Not here. Nowhere."))
    index.refresh()
    assert_windows(index)
    index.upsert(passages(lost="Now it. Is really. There."))
    assert_windows(index, [*TEXTS, "lost"])
    assert index.verify().problems == []


def test_rows_that_are_given_again_have_their_own(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "table_block", killed)  # its windows are written, no version names them
        with pytest.raises(KeyboardInterrupt):
            index.upsert(passages(lost="Not there. Not here. Nowhere."))
    for path in index.folder.glob("vectors-*"):
        path.unlink()  # written anew from the table, without the row that was lost
    again = Index.open(index.folder, WindowStudent())
    again.upsert(passages(other="Something else. It came later. By a lot."))
    assert_windows(again, [*TEXTS, "other"])


@pytest.mark.parametrize("name", ["window-vectors-0.bin", "window-places-0.bin", "window-places-0.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_found_and_repaired(index, name, how):
    path = index.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 3] if how == "cut" else content)
    if how == "gone":
        path.unlink()
    opened = Index.open(index.folder, WindowStudent())
    with pytest.raises(DataFormatError, match="verify --repair"):
        opened.search("a rare gem")
    opened.search("a rare gem", evidence={})  # who does not ask for windows goes without
    (problem,) = opened.verify().problems
    assert "verify --repair" in problem
    (problem,) = opened.verify(repair=True).problems
    assert problem.endswith("encoded again")
    assert opened.verify().problems == []
    assert_windows(opened)
    opened.upsert(passages(later="One. Two. Three. Four."))
    assert_windows(opened, [*TEXTS, "later"])


def test_a_version_from_before_a_repair_says_so(index):
    old = index.view
    (index.folder / "window-places-0.bin").unlink()
    index.upsert([Passage("short", TEXTS["short"], metadata={"year": 1})])  # nothing to encode, so nothing is missed
    Index.open(index.folder, WindowStudent()).verify(repair=True)
    with pytest.raises(DataFormatError, match="later version"):
        old.best_windows(np.ones(index.student.vector_dim, np.float32), np.arange(2))


def test_an_index_without_goes_by_other_weights(tmp_path):
    index = Index.create(tmp_path / "index", WindowStudent(), window_vectors=None)
    index.upsert(passages(**TEXTS))
    assert index.stats().window_format is None
    assert not list(index.folder.glob("window-*"))
    (found,) = index.search("a rare gem", explain=True)
    (words,) = index.search("a rare gem", evidence={"words": 1.0})
    assert [place.score for place in found.passages] == [place.score for place in words.passages]
    assert all(place.explanation.windows is None for place in found.passages)
    with pytest.raises(InputError, match="index the corpus again with --window-vectors"):
        index.search("a rare gem", evidence={"window_vectors": 1.0})


@pytest.mark.parametrize(("task", "stored"), [("asymmetric", "int3"), ("symmetric", None)])
def test_a_new_index_has_them_where_the_score_counts_them(tmp_path, task, stored):
    index = Index.create(tmp_path / "index", WindowStudent(), task=task)
    assert index.stats().window_format == stored
    assert Index.create(tmp_path / "plain", FakeStudent(), task=task).stats().window_format is None


def test_an_unknown_format(tmp_path):
    with pytest.raises(InputError, match="vector format 'int4' is unknown"):
        Index.create(tmp_path / "index", WindowStudent(), window_vectors="int4")
    assert not (tmp_path / "index").exists()


def test_the_store_wants_windows_with_passages(index):
    store = IndexStore.open(index.folder)
    changes = store.compare(passages(new="A. B. C."))
    with pytest.raises(InputError, match="give those of each"):
        store.write(changes, np.zeros((1, index.student.vector_dim), np.float32))


def test_windows_of_passages_in_parts_of_a_block(index, monkeypatch):
    monkeypatch.setattr("d2llm.retrieval.upserting._WINDOWS_AT_ONCE", 2)
    more = {f"more{n}": f"Number {n}. It goes on. And on." for n in range(5)}
    report = index.upsert(passages(**more))
    assert report.num_added == 5
    assert_windows(index, [*TEXTS, *more])


def test_reading_counts_tokens_and_windows():
    read = read_windows(FakeStudent(), ["", "One. Two. Three."])
    assert read.counts.tolist() == [0, 2]
    assert read.vectors.shape == (2, FakeStudent().vector_dim)
    assert read.num_tokens > 0
    assert read_windows(FakeStudent(), ["", "One."]).vectors.shape == (0, FakeStudent().vector_dim)
