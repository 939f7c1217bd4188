"""BM25 against the formula in float64, and what the tokenizer makes of several languages."""

from __future__ import annotations

import logging
import math

import pytest

from d2llm.core.types import Passage
from d2llm.index.lexical import LexicalIndex, tokenize

TEXTS = {
    "d": "the cat sat on the mat",
    "b": "the dog chased the cat, the cat ran",
    "c": "birds sing",
    "a": "the dog chased the cat, the cat ran",
    "e": "",
}
PASSAGES = [Passage(passage_id, text) for passage_id, text in TEXTS.items()]


def bm25(query: list[str], passage_id: str) -> float:
    """The formula of LexicalIndex's docstring, term by term; no word of TEXTS changes by stemming but those mapped."""
    stems = {"chased": "chase", "birds": "bird"}
    words = {key: [stems.get(word, word) for word in text.replace(",", "").split()] for key, text in TEXTS.items()}
    mean_length = sum(map(len, words.values())) / len(words)
    score = 0.0
    for term in query:
        containing = sum(term in found for found in words.values())
        count = words[passage_id].count(term)
        idf = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
        score += idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(words[passage_id]) / mean_length))
    return score


@pytest.mark.parametrize(
    ("text", "terms", "order"),
    [
        ("cat", ["cat"], ["a", "b", "d"]),
        ("The dog, the CAT!", ["the", "dog", "the", "cat"], ["a", "b", "d"]),
        ("sitting bird unknownword", ["bird"], ["c"]),
        ("mat chase", ["mat", "chase"], ["d", "a", "b"]),
    ],
)
def test_scores_and_order(text: str, terms: list[str], order: list[str]) -> None:
    [found] = LexicalIndex(PASSAGES).search([text], 10)
    assert [candidate.passage_id for candidate in found] == order
    for candidate in found:
        assert candidate.score == pytest.approx(bm25(terms, candidate.passage_id), rel=1e-5)
    scores = [candidate.score for candidate in found]
    assert scores == sorted(scores, reverse=True)


def test_top_k_is_a_prefix_and_ties_go_by_id() -> None:
    index = LexicalIndex(PASSAGES)
    [everything] = index.search(["the dog and the cat"], 100)
    for top_k in (1, 2, 3):
        assert index.search(["the dog and the cat"], top_k) == [everything[:top_k]]
    assert [candidate.passage_id for candidate in everything[:2]] == ["a", "b"]
    assert everything[0].score == everything[1].score


def test_order_of_the_passages_changes_nothing() -> None:
    queries = ["cat", "the dog", "birds on the mat"]
    assert LexicalIndex(PASSAGES[::-1]).search(queries, 3) == LexicalIndex(PASSAGES).search(queries, 3)


@pytest.mark.parametrize("text", ["", "  ", "?!", "zebra"])
def test_query_that_matches_nothing_gives_an_empty_list(text: str) -> None:
    assert LexicalIndex(PASSAGES).search([text, "cat"], 1)[0] == []


def test_corpus_without_terms() -> None:
    for passages in ([], [Passage("p", "...")]):
        index = LexicalIndex(passages)
        assert len(index) == len(passages)
        assert index.search(["cat", ""], 5) == [[], []]


def test_title_is_searched_too() -> None:
    [found] = LexicalIndex([Passage("p", "They bark.", title="Dogs")]).search(["dog"], 5)
    assert [candidate.passage_id for candidate in found] == ["p"]


def test_top_k_below_one_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        LexicalIndex(PASSAGES).iterate(["cat"], 0)


def test_logging_of_the_library_stays_out_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LexicalIndex(PASSAGES)
    assert [record.name for record in caplog.records if record.name.startswith("bm25s")] == []


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
def test_queries_in_other_scripts_find(query: str, best: str) -> None:
    passages = [
        Passage("zh-cat", "小猫喜欢睡觉。"),
        Passage("zh-beijing", "今天北京天气晴朗。"),
        Passage("ja", "東京タワーは333メートルの高さです。"),
        Passage("ko", "한국어 문법 입문"),
        Passage("ru", "Билет стоит сто рублей."),
    ]
    [found] = LexicalIndex(passages).search([query], 3)
    assert found[0].passage_id == best


def test_one_character_finds_longer_words() -> None:
    [found] = LexicalIndex([Passage("a", "今天天气晴朗。"), Passage("b", "小猫喜欢睡觉。")]).search(["猫"], 3)
    assert [candidate.passage_id for candidate in found] == ["b"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Cats, RUNNING_fast!", ["cat", "run", "fast"]),
        ("connect connected CONNECTING connection connections", ["connect"] * 5),
        ("as is, it's a 2s 1858", ["as", "is", "it", "s", "a", "2s", "1858"]),  # short words stay
        ("Straße Ünited naïves", ["straße", "ünited", "naïves"]),  # only words of a-z are stemmed
        ("战国无双3", ["战", "国", "无", "双", "战国", "国无", "无双", "3"]),
        ("我", ["我"]),
        ("GPT模型ok 的", ["gpt", "模", "型", "模型", "ok", "的"]),
        ("カメラ한국", ["カ", "メ", "ラ", "한", "국", "カメ", "メラ", "ラ한", "한국"]),
        ("𠮷野家", ["𠮷", "野", "家", "𠮷野", "野家"]),
        ("", []),
    ],
)
def test_tokenize(text: str, terms: list[str]) -> None:
    assert tokenize(text) == terms
