"""Window vectors of an index: written with the passages, kept through every change, and part of the score."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import PART_KINDS, Passage
from d2llm.models.score_features import FeatureWeights
from d2llm.ops.bm25_words import windows
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
WEIGHTS = {"bm25": 0.25, "window_vectors": 2.0}


class WindowStudent(FakeStudent):
    """A student whose score counts windows, if the index has them."""

    def feature_weights(self, task, *, stored=PART_KINDS):
        if task != "asymmetric":
            return FeatureWeights()
        return FeatureWeights(terms=WEIGHTS if "window" in stored else {"bm25": 1.0})


def passages(**texts):
    return [Passage(name, text) for name, text in texts.items()]


@pytest.fixture
def index(tmp_path):
    index = Index.create(tmp_path / "index", WindowStudent(), vector_format="float32", window_vectors="float32")
    index.upsert(passages(**TEXTS))
    return index


def interrupt(*_arguments):
    raise KeyboardInterrupt


def expected_scores(index, text, names):
    """Computed from the texts: the best inner product with a window, or with the passage's vector if it has none."""
    student = index.student
    dot_query = student.query_vectors(student.encode_queries([text]).vectors, "asymmetric")[0]
    scores = []
    for passage in index.get(names):
        spans = windows(passage.full_text)
        parts = [passage.full_text[start:end] for start, end in spans] if len(spans) > 1 else [passage.full_text]
        scores.append(float((student.encode_passages(parts).vectors @ dot_query).max()))
    return scores


def stored_scores(index, text, names):
    student = index.student
    dot_query = student.query_vectors(student.encode_queries([text]).vectors, "asymmetric")[0]
    return index.unsharded_view.best_windows(dot_query, index.view.rows(names)).tolist()


def assert_windows(index, names=tuple(TEXTS)):
    assert stored_scores(index, "a rare gem", names) == pytest.approx(
        expected_scores(index, "a rare gem", names), rel=1e-5
    )


def test_each_passage_has_the_windows_of_its_text(index):
    counts = index.unsharded_view.windows.counts(index.view.rows(list(TEXTS))).tolist()
    assert counts[:4] == [0, 0, 2, 0]
    assert counts[4] == 6
    assert counts[5] > 10  # an overlong sentence is cut
    assert_windows(index)
    assert index.stats().window_format == "float32"
    assert index.stats().window_bytes > sum(counts) * 4 * index.student.vector_dim


def test_the_score_includes_window_vectors(index):
    student = index.student
    plain = index.search("a rare gem", score_features={}, sources=("vectors", "bm25"))
    words = index.search("a rare gem", score_features={"bm25": 0.25})
    ranking = index.search("a rare gem", explain=True)
    names = [hit.passage.id for hit in ranking.passages]
    assert set(names) == set(TEXTS)
    word_scores = {hit.passage.id: hit.score for hit in words.passages}
    window_scores = dict(zip(names, stored_scores(index, "a rare gem", names), strict=True))
    for hit in ranking.passages:
        assert hit.score == pytest.approx(word_scores[hit.passage.id] + 2.0 * window_scores[hit.passage.id], rel=1e-4)
        explanation = hit.explanation
        assert explanation.windows == pytest.approx(2.0 * window_scores[hit.passage.id], rel=1e-5)
        assert explanation.dot + explanation.interaction + explanation.lexical + explanation.windows == pytest.approx(
            hit.score, rel=1e-4
        )
    assert [hit.score for hit in plain.passages] != [hit.score for hit in ranking.passages]
    exact = index.search("a rare gem", exact=True, top_k=3)
    assert [hit.passage.id for hit in exact.passages] == names[:3]
    assert exact.certificate.proved == 3
    assert not student.feature_weights("symmetric")


def test_windows_follow_updates_deletions_and_compaction(index):
    index.upsert(passages(three="Now it is new. It is red. Nothing else.", added="Here. It. Is.", short="Still one."))
    index.delete(["two", "long"])
    remaining = ["short", "three", "empty", "letters", "added"]
    assert_windows(index, remaining)
    index.upsert([Passage("added", "Here. It. Is.", metadata={"year": 2020})])  # only the metadata changes
    assert_windows(index, remaining)
    index.compact(dense=True)
    assert_windows(index, remaining)
    assert index.unsharded_view.capacity == len(remaining)
    index.upsert(passages(later="One. Two. Three. Four."))
    assert_windows(index, [*remaining, "later"])
    assert index.verify().problems == []


def test_snapshots_keep_window_vectors(index):
    index.snapshot("before")
    index.delete(["long", "three"])
    index.compact(dense=True)
    assert_windows(Index.open(index.folder / "snapshots" / "before", WindowStudent()))
    index.restore("before")
    assert_windows(index)
    assert index.verify().problems == []


def test_a_writer_killed_between_vectors_and_windows_is_harmless(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "append_parts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(passages(lost="Not there. Not here. Nowhere."))
    index.refresh()
    assert_windows(index)
    index.upsert(passages(lost="Now it. Is really. There."))
    assert_windows(index, [*TEXTS, "lost"])
    assert index.verify().problems == []


def test_reused_row_numbers_get_the_windows_of_their_own_texts(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "record_of", interrupt)  # its windows are written, but no version refers to them
        with pytest.raises(KeyboardInterrupt):
            index.upsert(passages(lost="Not there. Not here. Nowhere."))
    for path in index.folder.glob("vectors-*"):
        path.unlink()  # rebuilt from the table, without the lost row
    reopened = Index.open(index.folder, WindowStudent())
    reopened.upsert(passages(other="Something else. It came later. By a lot."))
    assert_windows(reopened, [*TEXTS, "other"])


@pytest.mark.parametrize("name", ["window-vectors-0.bin", "window-places-0.bin", "window-places-0.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_is_found_and_repaired(index, name, damage):
    path = index.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 3] if damage == "cut" else content)
    if damage == "gone":
        path.unlink()
    opened = Index.open(index.folder, WindowStudent())
    with pytest.raises(DataFormatError, match="verify --repair"):
        opened.search("a rare gem")
    opened.search("a rare gem", score_features={})  # a search that does not count windows still works
    (problem,) = opened.verify().problems
    assert "verify --repair" in problem
    (problem,) = opened.verify(repair=True).problems
    assert problem.endswith("encoded again")
    assert opened.verify().problems == []
    assert_windows(opened)
    opened.upsert(passages(later="One. Two. Three. Four."))
    assert_windows(opened, [*TEXTS, "later"])


def test_a_version_from_before_a_repair_has_no_windows(index):
    old_view = index.unsharded_view
    (index.folder / "window-places-0.bin").unlink()
    # There is nothing to encode, so the missing file is not noticed.
    index.upsert([Passage("short", TEXTS["short"], metadata={"year": 1})])
    Index.open(index.folder, WindowStudent()).verify(repair=True)
    with pytest.raises(DataFormatError, match="later version"):
        old_view.best_windows(np.ones(index.student.vector_dim, np.float32), np.arange(2))


def test_an_index_without_windows_uses_other_weights(tmp_path):
    index = Index.create(tmp_path / "index", WindowStudent(), window_vectors=None)
    index.upsert(passages(**TEXTS))
    assert index.stats().window_format is None
    assert not list(index.folder.glob("window-*"))
    ranking = index.search("a rare gem", explain=True)
    words_ranking = index.search("a rare gem", score_features={"bm25": 1.0})
    assert [hit.score for hit in ranking.passages] == [hit.score for hit in words_ranking.passages]
    assert all(hit.explanation.windows is None for hit in ranking.passages)
    with pytest.raises(InputError, match="index the corpus again with --window-vectors"):
        index.search("a rare gem", score_features={"window_vectors": 1.0})


@pytest.mark.parametrize(("task", "expected"), [("asymmetric", "int3"), ("symmetric", None)])
def test_a_new_index_stores_windows_if_the_score_counts_them(tmp_path, task, expected):
    index = Index.create(tmp_path / "index", WindowStudent(), task=task)
    assert index.stats().window_format == expected
    assert Index.create(tmp_path / "plain", FakeStudent(), task=task).stats().window_format is None


def test_unknown_formats_are_rejected(tmp_path):
    with pytest.raises(InputError, match="vector format 'int5' is unknown"):
        Index.create(tmp_path / "index", WindowStudent(), window_vectors="int5")
    assert not (tmp_path / "index").exists()


def test_the_store_requires_windows_with_passages(index):
    store = IndexStore.open(index.folder)
    changes = store.compare(passages(new="A. B. C."))
    with pytest.raises(InputError, match="give those of each"):
        store.write(changes, np.zeros((1, index.student.vector_dim), np.float32))


def test_windows_may_be_encoded_in_parts_of_a_block(index, monkeypatch):
    monkeypatch.setattr("d2llm.retrieval.reading._WINDOWS_AT_ONCE", 2)
    added = {f"more{n}": f"Number {n}. It goes on. And on." for n in range(5)}
    report = index.upsert(passages(**added))
    assert report.num_added == 5
    assert_windows(index, [*TEXTS, *added])


def test_reading_counts_tokens_and_windows():
    result = read_windows(FakeStudent(), ["", "One. Two. Three."])
    assert result.counts.tolist() == [0, 2]
    assert result.vectors.shape == (2, FakeStudent().vector_dim)
    assert result.num_tokens > 0
    assert read_windows(FakeStudent(), ["", "One."]).vectors.shape == (0, FakeStudent().vector_dim)
