from __future__ import annotations

import pytest

from d2llm.data.same_text import SameText
from tiny_data import make_source


def same(texts: dict[str, str]) -> SameText:
    return SameText(make_source(texts, {}, []).dataset)


def repeats(first: str, second: str) -> bool:
    found = same({"first": first, "second": second})
    answers = (found.as_any_of(["first"]), found.as_any_of(["second"]))
    assert answers in [({"second"}, {"first"}), (set(), set())]  # it goes both ways
    return bool(answers[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The cat sat.", "the  CAT\nsat"),
        ("“Quoted”, she said", 'Quoted - she said!"'),
        ("ﬁne", "fine"),  # a ligature
        ("1２3", "123"),  # full-width digits
        ("cafe\u0301", "caf\u00e9"),  # composed and not
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
        ("कि", "की"),  # differ in a vowel sign alone
        ("มี", "มา"),
        ("version 1", "version 2"),
    ],
)
def test_other_words_are_another_text(first: str, second: str) -> None:
    assert not repeats(first, second)


def test_texts_without_letters_and_digits_equal_no_other() -> None:
    found = same({"a": "", "b": " ", "c": "...", "d": "!?"})
    assert found.as_any_of(["a", "b", "c"]) == set()


def test_repeats_of_several_passages_without_these_themselves() -> None:
    found = same({"a": "one", "a2": "One", "a3": "ONE!", "b": "two", "b2": "two.", "c": "three"})
    assert found.as_any_of(["a", "a3", "b"]) == {"a2", "b2"}
    assert found.as_any_of(["c"]) == set()
    assert found.as_any_of([]) == set()
