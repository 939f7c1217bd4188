from __future__ import annotations

import pytest

from d2llm.data.same_text import SameText
from tiny_data import make_source


def make_same_text(texts: dict[str, str]) -> SameText:
    return SameText(make_source(texts, {}, []).dataset)


def repeats(first: str, second: str) -> bool:
    same_text = make_same_text({"first": first, "second": second})
    matches = (same_text.duplicates_of(["first"]), same_text.duplicates_of(["second"]))
    assert matches in [({"second"}, {"first"}), (set(), set())]  # the relation is symmetric
    return bool(matches[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The cat sat.", "the  CAT\nsat"),
        ("“Quoted”, she said", 'Quoted - she said!"'),
        ("ﬁne", "fine"),  # a ligature
        ("1２3", "123"),  # full-width digits
        ("cafe\u0301", "caf\u00e9"),  # decomposed and composed
        ("STRASSE", "straße"),
        ("你好，世界", "你好 世界。"),
    ],
)
def test_case_spaces_and_punctuation_do_not_matter(first: str, second: str) -> None:
    assert repeats(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the cat sat", "the cat sits"),
        ("one two", "onetwo"),
        ("one two", "two one"),
        ("कि", "की"),  # differ only in a vowel sign
        ("มี", "มา"),
        ("version 1", "version 2"),
    ],
)
def test_different_words_make_different_texts(first: str, second: str) -> None:
    assert not repeats(first, second)


def test_texts_without_letters_and_digits_match_no_other() -> None:
    same_text = make_same_text({"a": "", "b": " ", "c": "...", "d": "!?"})
    assert same_text.duplicates_of(["a", "b", "c"]) == set()


def test_repeats_of_several_passages_exclude_those_passages() -> None:
    same_text = make_same_text({"a": "one", "a2": "One", "a3": "ONE!", "b": "two", "b2": "two.", "c": "three"})
    assert same_text.duplicates_of(["a", "a3", "b"]) == {"a2", "b2"}
    assert same_text.duplicates_of(["c"]) == set()
    assert same_text.duplicates_of([]) == set()
