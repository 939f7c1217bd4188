"""Grades and rankings in what language models write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.models.teachers.list_answers import read_grades, read_ranking

ALL = {1: 90.0, 2: 0.0, 3: 45.0}


@pytest.mark.parametrize(
    "answer",
    [
        "[1] 90\n[2] 0\n[3] 45",
        "1: 90\n2: 0\n3: 45",
        "1. 90\n2. 0\n3. 45",
        "- [1] 90/100\n- [2] 0/100\n- [3] 45/100",
        "**[1]** 90\n**[2]** 0\n**[3]** 45",
        "Passage 1: 90\nPassage 2: 0\nPassage 3: 45",
        "[1] - 90\n[2] - 0\n[3] - 45",
        "[1] grade: 90\n[2] grade: 0\n[3] grade: 45.0",
        "段落1：90分\n段落2：0分\n段落3：45分",
        "【1】 90\n【2】 0\n【3】 45",
        "[3] 45\n[1] 90\n[2] 0",
        "Here are the grades:\n\n[1] 90\n[2] 0\n[3] 45\n\nPassage 1 answers it.",
        "<think>[1] could be 10 or 20.\n[1] 10\n[2] 99</think>\n[1] 90\n[2] 0\n[3] 45",
        "[90, 0, 45]",
        "```json\n[90, 0, 45]\n```",
        '{"1": 90, "2": 0, "3": 45}',
        'The grades: {"[1]": 90, "[2]": "0", "[3]": "45/100"}',
        '{"grades": [90, 0, 45]}',
        '{"scores": {"1": 90, "2": 0, "3": 45}}',
        '[{"passage": 1, "grade": 90}, {"passage": 2, "grade": 0}, {"passage": 3, "grade": 45}]',
        '{"results": [{"id": "[1]", "score": 90}, {"id": "[2]", "score": 0}, {"id": "[3]", "score": 45}]}',
        "| 1 | 90 |\n| 2 | 0 |\n| 3 | 45 |",
        "[1] 90\n[1] 90\n[2] 0\n[3] 45",
        "Passage 1 shares 2 words; 3 of 5 do.\n\n[1] 90\n[2] 0\n[3] 45",
    ],
)
def test_grades_are_read_in_every_usual_form(answer: str) -> None:
    assert read_grades(answer, 3) == ALL


@pytest.mark.parametrize(
    ("answer", "grades"),
    [
        ("", {}),
        ("I cannot score this.", {}),
        ("[1] 90\n[3] 45", {1: 90.0, 3: 45.0}),  # too few
        ("[1] 90\n[2] high\n[3] 45", {1: 90.0, 3: 45.0}),
        ("[1] 90\n[2] 101\n[3] 45", {1: 90.0, 3: 45.0}),
        ("[1] 90\n[2] -5\n[3] 45", {1: 90.0, 3: 45.0}),
        ("[1] 90\n[2] 0\n[2] 80\n[3] 45", {1: 90.0, 3: 45.0}),  # which one?
        ("[1] 90\n[2] 80\n[2] many\n[3] 45", ALL | {2: 80.0}),
        ("[1] 90\n[2] 0\n[3] 45\n[4] 70", {}),  # of another list
        ("[0] 90\n[1] 0\n[2] 45", {}),  # counts from 0
        ("[90, 0]", {}),
        ("[90, 0, 45, 3]", {}),
        ("[90, null, 45]", {1: 90.0, 3: 45.0}),
        ("[90, true, 45]", {1: 90.0, 3: 45.0}),
        ("[90, NaN, 45]", {1: 90.0, 3: 45.0}),
        (f"[90, {10**400}, 45]", {1: 90.0, 3: 45.0}),
        ("<think>[1] 90\n[2] 0", {}),  # never ended to think
        ("[1] 90\n[2]", {1: 90.0}),
        ("90\n0\n45", {}),
        ("[1] forty\n[2] forty-two\n[3] none", {}),
        ("90 to 100: it answers the query fully\n70 to 89: it answers indirectly", {}),
    ],
)
def test_what_is_missing_or_doubtful_has_no_grade(answer: str, grades: dict[int, float]) -> None:
    assert read_grades(answer, 3) == grades


@pytest.mark.parametrize(
    "answer",
    [
        "[2] > [3] > [1]",
        "2 > 3 > 1",
        "2, 3, 1",
        "[2, 3, 1]",
        '["2", "3", "1"]',
        '{"ranking": [2, 3, 1]}',
        '[{"passage": 2}, {"passage": 3}, {"passage": 1}]',
        "[2]\n[3]\n[1]",
        "Ranking: [2] > [3] > [1]",
        "The best order is:\n\n[2] > [3] > [1]\n\nPassage 2 answers the query.",
        "<think>[1] > [2] > [3]</think>[2] > [3] > [1]",
        "**[2] > [3] > [1]**",
        "[2]＞[3]＞[1]",
        "Passage 3 is about 2 animals. So the order is:\n\n[2] > [3] > [1]",
        "```json\n[2, 3, 1]\n```",
        "At first sight:\n[1] > [2] > [3]\nBut passage 2 alone answers it:\n[2] > [3] > [1]",
    ],
)
def test_rankings_are_read_in_every_usual_form(answer: str) -> None:
    assert read_ranking(answer, 3) == [2, 3, 1]


@pytest.mark.parametrize(
    ("answer", "ranking"),
    [
        ("", []),
        ("none of them", []),
        ("[2] > [1]", [2, 1]),
        ("[2] > [2] > [1]", []),
        ("[2] > [4] > [1]", []),
        ("[0] > [1] > [2]", []),
        ("[2] > [3] > [3]", []),
        ("first > second > third", []),
        ("[2] is the best, and I cannot tell the others apart.", []),
        ("<think>[1] > [2]", []),
    ],
)
def test_a_ranking_with_repeated_or_unknown_passages_is_none(answer: str, ranking: list[int]) -> None:
    assert read_ranking(answer, 3) == ranking


@given(st.text(alphabet=st.sampled_from('[]{}0123456789:,">/-\n abc<think>'), max_size=200), st.integers(1, 30))
def test_no_answer_breaks_the_readers(answer: str, number: int) -> None:
    assert all(1 <= rank <= number and 0 <= grade <= 100 for rank, grade in read_grades(answer, number).items())
    ranking = read_ranking(answer, number)
    assert len(set(ranking)) == len(ranking)
    assert all(1 <= rank <= number for rank in ranking)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=25))
def test_grades_in_lines_are_read_back(grades: list[int]) -> None:
    lines = [f"[{position}] {grade}" for position, grade in enumerate(grades, start=1)]
    assert list(read_grades("\n".join(lines), len(grades)).values()) == grades
    assert list(read_grades(str(grades), len(grades)).values()) == grades
