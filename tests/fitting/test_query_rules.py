"""The rules that a written query must keep."""

from __future__ import annotations

import pytest

from d2llm.fitting.critic import MAX_UNITS, query_fault

PASSAGE = "The index keeps two copies of each vector. A damaged copy is repaired from the other one, without encoding."
CHINESE = "索引为每个向量保存两份副本。损坏的副本会从另一份恢复，无需重新编码。"


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("How is a damaged vector repaired?", None),
        ("repair damaged vectors", None),
        ("keeps two copies", None),  # a few words in common are no copy
        ("", "empty"),
        ("?!", "empty"),
        ("vectors", "too short"),
        ("word " * (MAX_UNITS + 1), "too long"),
        ("What does this passage say about copies?", "about the text"),
        ("What is the main point of the text?", "about the text"),
        ("A damaged copy is repaired from the other one", "copied"),
        ("a DAMAGED copy is repaired, from the other one!", "copied"),  # case and punctuation do not matter
        ("向量有几份副本？", "other script"),
    ],
)
def test_queries_for_english(query, fault):
    assert query_fault(query, PASSAGE) == fault


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("损坏的向量怎样恢复？", None),
        ("How are damaged vectors repaired?", None),  # a query may be in another language than a Chinese passage
        ("本文讲了什么？", "about the text"),
        ("损坏的副本会从另一份恢复", "copied"),
        ("份", "too short"),
    ],
)
def test_queries_for_chinese(query, fault):
    assert query_fault(query, CHINESE) == fault


def test_a_passage_about_texts_may_be_asked_about_texts():
    assert query_fault("How long may the text of a field be?", "The text of a field may have 1,000 characters.") is None


def test_a_long_query_that_adds_words_to_a_copy_is_none():
    query = "Is it true that a damaged copy is repaired from the other one, even after a power cut at night?"
    assert query_fault(query, PASSAGE) is None
