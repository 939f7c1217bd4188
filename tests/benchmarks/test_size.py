"""What `d2llm size` predicts, against the indexes that were measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from size import GOAL, KINDS, STUDENT

from d2llm import Student
from d2llm.models.score_features import FeatureWeights
from d2llm.sizing.index_bytes import StudentFacts
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.search_time import AnnFacts, search_stages, total_ms
from d2llm.sizing.speeds import Speeds
from d2llm.sizing.texts import TextFacts


@pytest.fixture(scope="module")
def measured(repository):
    return json.loads((repository / "benchmarks" / "results" / "size.json").read_text(encoding="utf-8"))["sizes"]


def test_sizes_up_to_a_million_were_measured(measured):
    assert max(one["passages"] for one in measured) == 1_000_000


def test_bytes_are_within_the_goal(measured):
    for one in measured:
        for part, row in one["bytes"].items():
            assert 1 / GOAL <= row["predicted"] / row["measured"] <= GOAL, (one["passages"], part)


def test_times_are_within_the_goal(measured):
    """With today's model, from the speeds and texts of the run."""
    student = Student.load(STUDENT)
    for one in measured:
        texts = TextFacts.model_validate(one["predicted from"]["texts"])
        speeds = Speeds.model_validate(one["predicted from"]["speeds"])
        windows = "int3" if "vectors of windows" in one["bytes"] else "none"
        plan = SizePlan(
            passages=one["passages"], tokens=round(texts.tokens), window_vectors=windows, token_vectors="int4"
        )
        facts = StudentFacts.of_student(student, plan)
        ann = AnnFacts.model_validate(one["predicted from"]["ann"]) if "approximate" in one["ms"] else None
        for kind, row in one["ms"].items():
            weighted = replace(facts, weights=FeatureWeights(terms=KINDS.get(kind, {})))
            built = ann if kind == "approximate" else None
            predicted = total_ms(search_stages(plan, weighted, texts, speeds, one["passages"], ann=built)[1:])
            assert 1 / GOAL <= predicted / row["measured"] <= GOAL, (one["passages"], kind)
