"""Word files of an index: damage, rebuilding from the texts, joining of segments, and snapshots."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.types import Passage
from d2llm.ops import words
from d2llm.store import word_files
from d2llm.store.bm25 import WordIndex, bounds_of_segment
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.view import PassageView
from d2llm.store.word_files import open_words, update_word_files, write_segment
from d2llm.store.word_segment import WordSegment
from tiny_store import few_passages, new_store, put

TEXTS = [f"common words and own{n}. A second sentence {n % 3}" for n in range(40)]
QUERY = "common own7 sentence 2"


def segment_of(first: int, end: int) -> WordSegment:
    return WordSegment.from_texts(TEXTS[first:end])


def unreadable(first: int, end: int) -> WordSegment:
    raise AssertionError(f"rows {first} to {end} are in files")


def scores(words: WordIndex) -> list[float]:
    return words.scores(words.query(QUERY)).tolist()


EXPECTED = scores(WordIndex.from_texts(TEXTS))


def write(folder: Path, *bounds: int) -> None:
    for first, end in itertools.pairwise(bounds):
        write_segment(folder, 0, first, WordSegment.from_texts(TEXTS[first:end]))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("words-*.bin"))


def test_segments_survive_a_round_trip(tmp_path):
    write(tmp_path, 0, 20, 33, 40)
    opened = open_words(tmp_path, 0, 40, unreadable, whole=True)
    assert opened.problems == []
    assert scores(opened.words) == EXPECTED


def test_bounds_of_frequent_terms_survive_a_round_trip(tmp_path):
    segment = WordSegment.from_texts(["ship anchor", "ship harbour harbour"] * 300)
    write_segment(tmp_path, 0, 0, segment)
    stored = open_words(tmp_path, 0, 600, unreadable, whole=True).words._segments[0].bounds
    computed = bounds_of_segment(segment)
    assert stored is not None
    assert stored.mean_length == computed.mean_length == 2.5
    assert stored.shares.tolist() == computed.shares.tolist()
    assert stored.terms.tolist() == computed.terms.tolist() == [0, 1, 2]


def test_added_words_survive_a_round_trip_and_joining(tmp_path):
    added = [{"ship": n / 100 + 0.01} if n % 3 else {} for n in range(40)]
    for first, end in ((0, 20), (20, 21), (21, 33), (33, 40)):
        write_segment(tmp_path, 0, first, WordSegment.from_texts(TEXTS[first:end]).with_added(added[first:end]))
    expected = WordIndex([WordSegment.from_texts([*TEXTS, "ship"]).with_added([*added, {}])])
    for _ in range(2):
        opened = open_words(tmp_path, 0, 40, unreadable, whole=True)
        words = expected.query("ship own7")
        np.testing.assert_array_equal(
            opened.words.within(expected.statistics).scores(words), expected.scores(words)[:40]
        )
        update_word_files(tmp_path, 0, 40, unreadable)
    assert len(files(tmp_path)) < 4


@pytest.mark.parametrize("bounds", [(0,), (0, 20), (20, 40), (0, 5, 9)])
def test_missing_rows_are_read_again_and_counted(tmp_path, bounds):
    write(tmp_path, *bounds)
    opened = open_words(tmp_path, 0, 40, segment_of)
    missing = 40 - (bounds[-1] - bounds[0])
    assert opened.problems == [f"the words of {missing} passages are in no file"]
    assert scores(opened.words) == EXPECTED
    update_word_files(tmp_path, 0, 40, segment_of)
    opened = open_words(tmp_path, 0, 40, unreadable)
    assert (opened.problems, scores(opened.words)) == ([], EXPECTED)


def test_rows_without_a_passage_do_not_count_as_missing(tmp_path):
    write(tmp_path, 0, 38)
    texts = [*TEXTS[:38], "", ""]
    opened = open_words(tmp_path, 0, 40, lambda first, end: WordSegment.from_texts(texts[first:end]))
    assert opened.problems == []
    assert len(opened.words) == 40


def test_generations_have_separate_files(tmp_path):
    write(tmp_path, 0, 40)
    assert "40 passages" in open_words(tmp_path, 1, 40, segment_of).problems[0]


@pytest.mark.parametrize("name", ["bin", "json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damage_is_reported_and_the_words_are_read_again(tmp_path, name, damage):
    write(tmp_path, 0, 20, 40)
    path = tmp_path / f"words-0-20-40.{name}"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    changed = {"flip": content, "cut": content[:-3], "empty": b""}.get(damage)
    path.unlink() if changed is None else path.write_bytes(changed)
    opened = open_words(tmp_path, 0, 40, segment_of)
    assert "20 passages are in no file" in opened.problems[-1]
    assert scores(opened.words) == EXPECTED
    word_files.remove_damaged(tmp_path, 0)
    update_word_files(tmp_path, 0, 40, segment_of)
    opened = open_words(tmp_path, 0, 40, unreadable, whole=True)
    assert (opened.problems, scores(opened.words)) == ([], EXPECTED)


def test_words_by_another_rule_are_never_used(tmp_path, monkeypatch):
    """They are made again when they are read, and written at the next opportunity."""
    write(tmp_path, 0, 20)
    monkeypatch.setattr(words, "WORD_RULE", words.WORD_RULE + 1)
    write(tmp_path, 20, 40)
    opened = open_words(tmp_path, 0, 40, segment_of)
    rules = f"by rule {words.WORD_RULE - 1}, but this d2llm makes them by rule {words.WORD_RULE}"
    assert opened.problems == [f"words-0-0-20.bin has words {rules}", "the words of 20 passages are in no file"]
    assert scores(opened.words) == EXPECTED
    update_word_files(tmp_path, 0, 40, segment_of)
    assert open_words(tmp_path, 0, 40, unreadable).problems == []


def test_another_dictionary_makes_other_words_of_some_scripts_only(tmp_path, monkeypatch):
    texts = ["english words", "ภาษาไทย", "more words"]

    def made(first: int, end: int) -> WordSegment:
        return WordSegment.from_texts(texts[first:end])

    for row in range(3):
        write_segment(tmp_path, 0, row, made(row, row + 1))
    import icu4py

    monkeypatch.setattr(icu4py, "icu_version", "99.9", raising=False)
    (problem, missing) = open_words(tmp_path, 0, 3, made).problems
    assert problem.startswith("words-0-1-2.bin has words by rule 1, ICU ")
    assert missing == "the words of 1 passage is in no file"
    update_word_files(tmp_path, 0, 3, made)
    assert open_words(tmp_path, 0, 3, unreadable).problems == []
    assert open_words(tmp_path, 0, 3, unreadable).words.take(np.arange(3)).by_dictionary


def test_small_neighbouring_segments_are_joined(tmp_path, monkeypatch):
    """A row is rewritten only as often as the number of rows doubles."""
    written = []
    write_file = word_files._write
    monkeypatch.setattr(word_files, "_write", lambda *args: (written.append(len(args[3])), write_file(*args)))
    for row in range(40):
        write(tmp_path, row, row + 1)
        update_word_files(tmp_path, 0, row + 1, unreadable)
    opened = open_words(tmp_path, 0, 40, unreadable)
    assert (opened.problems, scores(opened.words)) == ([], EXPECTED)
    assert len(files(tmp_path)) <= 6
    assert sum(written) <= 40 * 8


def test_no_segment_gets_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(word_files, "SEGMENT_ROWS", 16)
    write(tmp_path, *range(0, 41, 4))
    update_word_files(tmp_path, 0, 40, unreadable)
    assert files(tmp_path) == ["words-0-0-16.bin", "words-0-16-32.bin", "words-0-32-40.bin"]
    update_word_files(tmp_path, 1, 40, segment_of)
    assert files(tmp_path)[3:] == ["words-1-0-16.bin", "words-1-16-32.bin", "words-1-32-40.bin"]


def test_words_of_reused_row_numbers_are_dropped(tmp_path):
    write(tmp_path, 0, 20)
    write_segment(tmp_path, 0, 20, WordSegment.from_texts(["other"] * 20))  # left by a writer that did not commit
    write(tmp_path, 20, 40)
    assert scores(open_words(tmp_path, 0, 40, unreadable).words) == EXPECTED


def test_rows_of_later_versions_are_ignored(tmp_path):
    write(tmp_path, 0, 40)
    opened = open_words(tmp_path, 0, 12, unreadable)
    restricted = opened.words.only(np.ones(12, np.bool_))
    assert scores(restricted)[:12] == scores(WordIndex.from_texts(TEXTS[:12]))
    rows, _ = restricted.best(restricted.query("sentence"), 100)
    assert sorted(rows) == list(range(12))


class TestStore:
    @pytest.fixture
    def store(self, tmp_path) -> IndexStore:
        store = new_store(tmp_path / "index")
        put(store, few_passages(20).values())
        put(store, [Passage("p3", "changed own3 own3"), Passage("later", "common words")])
        store.delete(["p7", "p8"])
        return store

    def matches(self, store: IndexStore, text: str = "common own3 word") -> dict[str, float]:
        view = PassageView(store)
        ranking = view.match(text, 99)
        return dict(zip(view.ids(ranking.rows), ranking.scores.tolist(), strict=True))

    def expected(self, store: IndexStore, text: str = "common own3 word") -> dict[str, float]:
        view = PassageView(store)
        passages = view.passages(view.live_rows())
        words = WordIndex.from_texts(passage.full_text for passage in passages)
        scored = zip(passages, words.scores(words.query(text)).tolist(), strict=True)
        return {passage.id: score for passage, score in scored if score}

    def test_scores_equal_those_of_a_freshly_built_index(self, store):
        assert self.matches(store) == pytest.approx(self.expected(store))
        assert {"later", "p3"} <= self.matches(store).keys()
        assert not {"p7", "p8"} & self.matches(store).keys()

    def test_words_survive_compaction_and_restore(self, store, caplog):
        before = self.matches(store)
        store.snapshot("kept")
        store.compact(dense=True)
        assert self.matches(store) == pytest.approx(before)
        put(store, [Passage("p9", "something else")])
        assert self.matches(store).keys() == before.keys() - {"p9"}
        assert self.matches(IndexStore.open(store.snapshot_folder("kept"))) == pytest.approx(before)
        store.restore("kept")
        assert self.matches(store) == pytest.approx(before)
        assert caplog.records == []  # nothing was read again

    def test_an_old_view_still_matches_its_passages(self, store):
        view = PassageView(store)
        put(store, few_passages(30, 50).values())
        store.compact(dense=True)
        assert len(view.match("common", 99).rows) == 18

    def test_stats_and_verify_cover_word_files(self, store):
        assert stats(store).word_bytes == sum(path.stat().st_size for path in store.folder.glob("words-*"))
        assert verify(store).problems == []
        expected = self.expected(store)
        for path in store.folder.glob("words-*.bin"):
            path.write_bytes(bytes(path.stat().st_size))
        assert any("words-0-" in problem for problem in verify(store).problems)
        assert self.matches(store) == pytest.approx(expected)
        assert "read again" in " ".join(verify(store, repair=True).problems)
        assert verify(store).problems == []
        assert self.matches(store) == pytest.approx(expected)

    def test_reading_words_again_is_logged(self, store, caplog):
        for path in store.folder.glob("words-*"):
            path.unlink()
        assert self.matches(store)
        assert "the words of 19 passages are in no file" in caplog.text
