"""What the shipped student answers to twenty fixed questions: the first three sentences of each, and their scores.

After a new student is shipped: ``python tests/golden/test_shipped_student.py`` (with src and tests on PYTHONPATH)
writes the rankings anew; the difference then stands in the review.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2llm import Passage, Student
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import search
from e2e.small_corpus import QUESTIONS, SENTENCES

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
NEAR = 0.05  # logits closer than this may change places with another processor or version of torch


def rankings() -> list[dict[str, Any]]:
    """The first three sentences of each question, by the exact scan in float32."""
    import tempfile

    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    questions = [*QUESTIONS, *MORE_QUESTIONS]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "index"
        passages = [Passage(str(n), text) for n, text in enumerate(SENTENCES)]
        encode(passages, student, target, task="asymmetric", vector_format="float32")
        found = search(Index.open(target).view, student, questions, top_k=3, exact=True)
    return [
        {
            "question": ranking.query.text,
            "passages": [int(place.passage.id) for place in ranking.passages],
            "scores": [round(place.score, 4) for place in ranking.passages],
        }
        for ranking in found
    ]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return rankings()


def test_the_shipped_student_ranks_as_recorded(found: list[dict[str, Any]]) -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(recorded) == 20
    for now, then in zip(found, recorded, strict=True):
        assert now["question"] == then["question"]
        assert now["scores"] == pytest.approx(then["scores"], abs=NEAR)
        for place, score in enumerate(then["scores"]):
            tied = [p for p, s in zip(then["passages"], then["scores"], strict=True) if abs(s - score) < 2 * NEAR]
            assert now["passages"][place] in tied, f"{now['question']}: place {place + 1}"


def test_the_shipped_student_finds_the_right_sentence_of_most_questions(found: list[dict[str, Any]]) -> None:
    first = {entry["question"]: entry["passages"][0] for entry in found}
    assert sum(first[question] == sentence for question, sentence in QUESTIONS.items()) >= 7


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(rankings(), indent=1) + "\n", encoding="utf-8")
