"""The shipped student's answers to twenty fixed questions: the top three sentences for each, and their scores.

After a new student is shipped, ``python tests/golden/test_shipped_student.py`` (with src and tests on PYTHONPATH)
rewrites the rankings, so that the difference shows up in the review.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2llm import Passage, Student
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from e2e.small_corpus import QUESTIONS, SENTENCES
from searching import search

GOLDEN = Path(__file__).with_name("shipped_student.json")
MORE_QUESTIONS = (
    "How should a password look?",
    "Where do swallows live in the cold season?",
    "At what time can I catch the final train?",
    "How many hearts has an octopus?",
    "When are tulips planted?",
    "Does medicine make a cold go away sooner?",
    "How many goals decided the game?",
    "How often should one have a piano tuned?",
    "Why does salt help against ice in winter?",
    "When must I get my deposit back?",
    "What do bees tell by dancing?",
    "Why do stars twinkle?",
)
NEAR = 0.05  # logits closer than this may swap ranks on another CPU or version of torch


def rankings() -> list[dict[str, Any]]:
    """The top three sentences for each question, by the exact scan in float32."""
    import tempfile

    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    questions = [*QUESTIONS, *MORE_QUESTIONS]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "index"
        passages = [Passage(str(n), text) for n, text in enumerate(SENTENCES)]
        encode(passages, student, target, task="asymmetric", vector_format="float32")
        search_results = search(Index.open(target).view, student, questions, top_k=3, exact=True)
    return [
        {
            "question": ranking.query.text,
            "passages": [int(hit.passage.id) for hit in ranking.passages],
            "scores": [round(hit.score, 4) for hit in ranking.passages],
        }
        for ranking in search_results
    ]


@pytest.fixture(scope="module")
def actual_rankings() -> list[dict[str, Any]]:
    return rankings()


def test_the_shipped_student_ranks_as_recorded(actual_rankings: list[dict[str, Any]]) -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(recorded) == 20
    for actual, expected in zip(actual_rankings, recorded, strict=True):
        assert actual["question"] == expected["question"]
        assert actual["scores"] == pytest.approx(expected["scores"], abs=NEAR)
        for position, score in enumerate(expected["scores"]):
            tied = [
                p for p, s in zip(expected["passages"], expected["scores"], strict=True) if abs(s - score) < 2 * NEAR
            ]
            assert actual["passages"][position] in tied, f"{actual['question']}: place {position + 1}"


def test_the_shipped_student_answers_most_questions(actual_rankings: list[dict[str, Any]]) -> None:
    first = {entry["question"]: entry["passages"][0] for entry in actual_rankings}
    assert sum(first[question] == sentence for question, sentence in QUESTIONS.items()) >= 7


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(rankings(), indent=1) + "\n", encoding="utf-8")
