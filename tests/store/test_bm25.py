"""BM25 of passages and windows against the formula in float64; terms and sentences in several languages."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_loops import compiled
from d2llm.ops.bm25_words import sentences, terms, windows
from d2llm.store import bm25
from d2llm.store.bm25 import WordIndex, rank_passages
from d2llm.store.word_segment import WordSegment

TEXTS = {
    "d": "the cat sat on the mat",
    "b": "the dog chased the cat, the cat ran",
    "c": "birds sing",
    "a": "the dog chased the cat, the cat ran",
    "e": "",
}
VOCABULARY = ["cat", "dog", "mat", "zebra", "猫", "北京", "9", "naïve"]


@pytest.fixture(scope="module", params=["numpy", "compiled"], autouse=True)
def way(request):
    """Every test is run both ways; each must give the same bits."""
    with compiled(request.param == "compiled"):
        yield request.param


texts = st.lists(
    st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=6).map(" ".join), max_size=5).map(". The ".join),
    min_size=1,
    max_size=12,
)
queries = st.lists(st.sampled_from([*VOCABULARY, "unknown"]), max_size=8).map(" ".join)


def by_formula(query: str, collection: list[str], parts: list[str]) -> list[float]:
    """Lucene's BM25 of each part, term by term: idf of the collection, mean length of the parts."""
    words = [terms(text) for text in collection]
    part_terms = [terms(part) for part in parts]
    mean = sum(map(len, part_terms)) / max(len(part_terms), 1)
    scores: list[float] = []
    for part in part_terms:
        score = 0.0
        for term in terms(query):
            containing = sum(term in text_terms for text_terms in words)
            count = part.count(term)
            if count:
                idf = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
                score += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(part) / mean))
        scores.append(score)
    return scores


def by_windows(query: str, collection: list[str]) -> list[float]:
    """The score of the best window of each text, by the formula."""
    parts = [[text[start:end] for start, end in windows(text)] for text in collection]
    # Only windows that contain a sentence count; an empty text has none.
    flat = [part for text_parts, text in zip(parts, collection, strict=True) if sentences(text) for part in text_parts]
    scores = iter(by_formula(query, collection, flat))
    return [
        max(next(scores) for _ in text_parts) if sentences(text) else 0.0
        for text_parts, text in zip(parts, collection, strict=True)
    ]


def ranked(passages: dict[str, str], query: str, top_k: int = 10) -> list[tuple[str, float]]:
    [ranking] = rank_passages(WordIndex.from_texts(passages.values()), list(passages), [query], top_k)
    return [(candidate.passage_id, candidate.score) for candidate in ranking]


class TestScores:
    @pytest.mark.parametrize(
        ("query", "order"),
        [
            ("cat", ["a", "b", "d"]),
            ("The dog, the CAT!", ["a", "b", "d"]),
            ("sitting bird unknownword", ["c"]),
            ("mat chase", ["d", "a", "b"]),
        ],
    )
    def test_order_and_values(self, query, order):
        ranking = ranked(TEXTS, query)
        assert [name for name, _ in ranking] == order
        expected = dict(zip(TEXTS, by_formula(query, list(TEXTS.values()), list(TEXTS.values())), strict=True))
        for name, score in ranking:
            assert score == pytest.approx(expected[name], rel=1e-5)

    def test_ties_are_ordered_by_id_and_top_k_is_a_prefix(self):
        full_ranking = ranked(TEXTS, "the dog and the cat", 100)
        assert [name for name, _ in full_ranking[:2]] == ["a", "b"]
        assert full_ranking[0][1] == full_ranking[1][1]
        for top_k in (1, 2, 3):
            assert ranked(TEXTS, "the dog and the cat", top_k) == full_ranking[:top_k]

    @given(texts, queries)
    def test_scores_match_the_formula(self, collection, query):
        index = WordIndex.from_texts(collection)
        words = index.query(query)
        np.testing.assert_allclose(index.scores(words), by_formula(query, collection, collection), rtol=1e-5, atol=1e-6)
        passages, best_windows = index.score(words, np.arange(len(collection)))
        np.testing.assert_array_equal(passages, index.scores(words))
        np.testing.assert_allclose(best_windows, by_windows(query, collection), rtol=1e-5, atol=1e-6)
        assert passages.max(initial=0) <= words.limit
        assert best_windows.max(initial=0) <= words.limit

    @given(texts, queries, st.data())
    def test_scores_do_not_depend_on_segments_or_deletions(self, collection, query, data):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(collection)), max_size=3)))
        live = np.array(data.draw(st.lists(st.booleans(), min_size=len(collection), max_size=len(collection))))
        bounds = [0, *cuts, len(collection)]
        segments = [WordSegment.from_texts(collection[a:b]) for a, b in pairwise(bounds)]
        index = WordIndex(segments, live=live)
        remaining = [text for text, alive in zip(collection, live, strict=True) if alive]
        rebuilt = WordIndex.from_texts(remaining)
        words, rebuilt_words = index.query(query), rebuilt.query(query)
        np.testing.assert_array_equal(words.statistics, rebuilt_words.statistics)
        np.testing.assert_array_equal(index.scores(words)[live], rebuilt.scores(rebuilt_words))
        rows = np.flatnonzero(live)[::-1]
        for actual, expected in zip(
            index.score(words, rows), rebuilt.score(rebuilt_words, np.arange(len(remaining))[::-1]), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)
        joined = WordIndex([WordSegment.join(segments)], live=live)
        np.testing.assert_array_equal(joined.scores(joined.query(query)), index.scores(words))

    @given(texts, queries, st.integers(1, 6), st.data())
    def test_best_rows_are_those_of_all_scores(self, collection, query, num, data):
        allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(collection), max_size=len(collection))))
        half = len(collection) // 2
        index = WordIndex([WordSegment.from_texts(collection[:half]), WordSegment.from_texts(collection[half:])])
        words = index.query(query)
        scores = np.where(allowed, index.scores(words), 0)
        rows, best_scores = index.best(words, num, allowed=allowed)
        floor = np.sort(scores)[::-1][:num].min(initial=np.inf)
        np.testing.assert_array_equal(np.sort(rows), np.flatnonzero((scores >= floor) & (scores > 0)))
        np.testing.assert_array_equal(best_scores, scores[rows])

    def test_scores_of_an_earlier_query_are_not_those_of_the_next(self):
        index = WordIndex.from_texts(TEXTS.values())
        first, second = index.query("cat"), index.query("birds")
        both = [index.scores(query).tolist() for query in (first, second)]
        assert [index.scores(query).tolist() for query in (first, second, first)] == [*both, both[0]]
        assert both[0] != both[1]

    def test_postings_of_rows_that_do_not_exist(self):
        segment = WordSegment.from_texts(TEXTS.values())
        damaged = WordIndex([dataclasses.replace(segment, rows=segment.rows + np.uint32(100))])
        for method in (damaged.scores, damaged.window_limits):
            with pytest.raises(IndexError):
                method(damaged.query("cat"))

    @pytest.mark.parametrize("query", ["", "  ", "?!", "zebra"])
    def test_a_query_that_matches_nothing(self, query):
        index = WordIndex.from_texts(TEXTS.values())
        words = index.query(query)
        assert not index.scores(words).any()
        assert index.best(words, 3)[0].tolist() == []
        assert words.limit == 0
        assert words.statistics.tolist() == pytest.approx([math.log(1 + len(terms(query))), 0, 0, 1])

    @pytest.mark.parametrize("collection", [[], ["..."], ["", ""]])
    def test_a_corpus_without_words(self, collection):
        index = WordIndex.from_texts(collection)
        words = index.query("cat")
        assert index.scores(words).tolist() == [0.0] * len(collection)
        assert [part.tolist() for part in index.score(words, np.arange(len(collection)))] == [
            [0.0] * len(collection)
        ] * 2
        assert WordIndex([]).scores(WordIndex([]).query("cat")).tolist() == []

    def test_scoring_no_rows(self):
        index = WordIndex.from_texts(TEXTS.values())
        assert [len(part) for part in index.score(index.query("cat"), np.zeros(0, np.int64))] == [0, 0]

    @given(texts, queries)
    def test_scores_do_not_depend_on_how_many_terms_are_counted_at_once(self, collection, query):
        index = WordIndex.from_texts(collection)
        rows = np.arange(len(index))
        together = index.score(index.query(query), rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bm25, "_MAX_COUNTS", 1)
            one_by_one = index.score(index.query(query), rows)
        assert [part.tobytes() for part in one_by_one] == [part.tobytes() for part in together]

    def test_a_query_of_more_terms_than_16_bits_count(self):
        words = [f"word{number}" for number in range(33_000)]
        index = WordIndex.from_texts(["\n".join(words[start : start + 20]) for start in range(0, len(words), 20)])
        rows = np.array([0, 1, 1_637, 1_638, 1_639, 1_649])  # the terms 32,767 and 32,768 are in two of them
        query = index.query(" ".join(words))
        passages, best_windows = index.score(query, rows)
        assert passages.tobytes() == index.scores(query)[rows].tobytes()
        assert (best_windows > 0).all()

    def test_a_long_query_takes_little_memory(self):
        words = [f"word{number}" for number in range(2_000)]
        index = WordIndex.from_texts(["\n".join(words[start : start + 20]) for start in range(0, len(words), 20)] * 5)
        query = index.query(" ".join(words + [f"unknown{number}" for number in range(2_000)]))
        tracemalloc.start()
        try:
            index.score(query, np.arange(len(index)))
            assert tracemalloc.get_traced_memory()[1] < 150_000_000  # 10,000 sentences x 4,000 terms: 320 MB
        finally:
            tracemalloc.stop()

    def test_statistics_of_a_query(self):
        words = WordIndex.from_texts(TEXTS.values()).query("cat mat mat zebra")
        cat, mat = math.log(1 + (5 - 3 + 0.5) / 3.5), 2 * math.log(1 + (5 - 1 + 0.5) / 1.5)
        assert words.statistics.tolist() == pytest.approx(
            [math.log(5), math.log(1 + cat + mat), mat / (cat + mat), 0.25]
        )

    def test_taking_rows_equals_indexing_their_texts(self):
        texts = [*TEXTS.values()]
        rows = np.array([3, 0, 4])
        taken = WordIndex([WordSegment.from_texts(texts[:2]), WordSegment.from_texts(texts[2:])]).take(rows)
        built = WordSegment.from_texts([texts[row] for row in rows])
        for name in WordSegment.__slots__:
            np.testing.assert_array_equal(getattr(taken, name), getattr(built, name), err_msg=name)


class TestTerms:
    @pytest.mark.parametrize(
        ("query", "best"),
        [
            ("猫在哪里睡觉?", "zh-cat"),
            ("北京的天气怎么样", "zh-beijing"),
            ("東京タワーの高さ", "ja"),
            ("한국어 문법은 어렵다", "ko"),
            ("сколько стоит билет", "ru"),
        ],
    )
    def test_queries_in_other_scripts(self, query, best):
        passages = {
            "zh-cat": "小猫喜欢睡觉。",
            "zh-beijing": "今天北京天气晴朗。",
            "ja": "東京タワーは333メートルの高さです。",
            "ko": "한국어 문법 입문",
            "ru": "Билет стоит сто рублей.",
        }
        assert ranked(passages, query)[0][0] == best

    def test_a_single_character_matches_longer_words(self):
        assert [name for name, _ in ranked({"a": "今天天气晴朗。", "b": "小猫喜欢睡觉。"}, "猫")] == ["b"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Running, RAN!", ["run", "ran"]),
            ("naïve Füße", ["naiv", "fuss"]),
            ("猫咪", ["猫", "咪", "猫咪"]),
            ("GPT-4o_mini", ["gpt", "4o", "mini"]),
            ("", []),
            ("\ud800 cat", ["cat"]),
        ],
    )
    def test_terms(self, text, expected):
        assert terms(text) == expected


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", []),
            (" \n ", []),
            ("One sentence", ["One sentence"]),
            ("First one. Second one! Third?", ["First one.", "Second one!", "Third?"]),
            ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
            ("Use e.g. this one. Next.", ["Use e.g. this one.", "Next."]),
            ("Title\n\nText here.", ["Title", "Text here."]),
            ("第一句。第二句！第三句", ["第一句。", "第二句！", "第三句"]),
        ],
    )
    def test_sentences(self, text, expected):
        assert [text[start:end] for start, end in sentences(text)] == expected

    def test_windows_are_pairs_of_neighbouring_sentences(self):
        text = "One here. Two here. Three here. Four here."
        window_texts = [text[start:end] for start, end in windows(text)]
        assert window_texts == ["One here. Two here.", "Two here. Three here.", "Three here. Four here."]
        assert windows("One here. Two here.") == [(0, 19)]
        assert windows("") == [(0, 0)]

    @given(st.text(alphabet="ab .\n。!", max_size=300))
    def test_sentences_cover_everything_but_white_space(self, text):
        spans = sentences(text)
        assert all(start < end for start, end in spans)
        assert all(end <= following for (_, end), (following, _) in pairwise(spans))
        assert "".join(text[start:end] for start, end in spans).split() == text.split() or "".join(
            "".join(text[start:end].split()) for start, end in spans
        ) == "".join(text.split())

    def test_overlong_sentences_are_cut(self):
        word = "x" * 10_000
        assert max(end - start for start, end in sentences(word)) == 400
        assert "".join(word[start:end] for start, end in sentences(word)) == word
        table = "cell " * 1000
        assert all(200 <= end - start <= 400 for start, end in sentences(table)[:-1])
        assert all(
            table[start:end].split() == ["cell"] * len(table[start:end].split()) for start, end in sentences(table)
        )


@st.composite
def with_added(draw: st.DrawFn) -> tuple[list[str], list[dict[str, float]]]:
    """Texts, and words that each of them lacks with counts in hundredths."""
    collection = draw(texts)
    counts = st.integers(1, 400).map(lambda number: number / 100)
    added = [
        draw(st.dictionaries(st.sampled_from([w for w in ("cat", "dog", "ship", "sail") if w not in text]), counts))
        if text
        else {}
        for text in collection
    ]
    return collection, added


class TestAddedWords:
    @given(with_added(), queries)
    def test_they_count_in_the_passage_and_in_its_length(self, both, query):
        collection, added = both
        index = WordIndex([WordSegment.from_texts(collection).with_added(added)])
        words = index.query(query)
        lengths = [len(terms(text)) + sum(own.values()) for text, own in zip(collection, added, strict=True)]
        mean = sum(lengths) / len(lengths)
        expected = []
        for text, own, length in zip(collection, added, lengths, strict=True):
            score = 0.0
            for term in terms(query):
                containing = sum(term in terms(other) for other in collection)  # of the texts alone
                count = terms(text).count(term) or own.get(term, 0)
                if count and containing:
                    idf = math.log(1 + (len(collection) - containing + 0.5) / (containing + 0.5))
                    score += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * length / mean))
            expected.append(score)
        np.testing.assert_allclose(index.scores(words), expected, rtol=1e-5, atol=1e-6)
        rows = np.arange(len(collection))[::-1]
        passages, best_windows = index.score(words, rows)
        np.testing.assert_array_equal(passages, index.scores(words)[::-1])
        np.testing.assert_allclose(best_windows[::-1], by_windows(query, collection), rtol=1e-5, atol=1e-6)
        assert passages.max(initial=0) <= words.limit

    @given(with_added(), queries, st.data())
    def test_scores_do_not_depend_on_segments_or_deletions(self, both, query, data):
        collection, added = both
        cut = data.draw(st.integers(0, len(collection)))
        live = np.array(data.draw(st.lists(st.booleans(), min_size=len(collection), max_size=len(collection))))
        segments = [
            WordSegment.from_texts(collection[part]).with_added(added[part]) for part in (slice(cut), slice(cut, None))
        ]
        index = WordIndex(segments, live=live)
        kept = np.flatnonzero(live)
        rebuilt = WordIndex([WordSegment.from_texts(collection[n] for n in kept).with_added([added[n] for n in kept])])
        words, rebuilt_words = index.query(query), rebuilt.query(query)
        assert index.statistics == rebuilt.statistics
        np.testing.assert_array_equal(words.weights, rebuilt_words.weights)
        np.testing.assert_array_equal(index.scores(words)[live], rebuilt.scores(rebuilt_words))
        taken = [WordIndex([index.take(kept)])] if len(kept) else []
        for other in (WordIndex([WordSegment.join(segments)], live=live), *taken):
            scores = other.scores(other.query(query))
            np.testing.assert_array_equal(
                scores[live] if len(other) > len(kept) else scores, rebuilt.scores(rebuilt_words)
            )

    def test_a_passage_is_found_by_a_word_that_it_lacks(self):
        index = WordIndex([WordSegment.from_texts(["the sea", "a ship"]).with_added([{"ship": 0.5}, {}])])
        words = index.query("ship")
        assert (index.scores(words) > 0).all()
        assert sorted(index.best(words, 2)[0].tolist()) == [0, 1]
        assert index.window_limits(words)[0] == 0

    def test_without_any_the_segment_is_as_before(self):
        segment = WordSegment.from_texts(TEXTS.values())
        assert segment.with_added([{}] * len(TEXTS)).added is None
        more = segment.with_added([{"ship": 1.0}, *[{}] * (len(TEXTS) - 1)])
        assert more.num_bytes == segment.num_bytes + 8 + 2 * 8 + 4 + 2
