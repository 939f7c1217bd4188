"""``d2llm mine`` as a user runs it: the audit, ranking by a student, the teacher margin, resuming."""

from __future__ import annotations

import json

import numpy as np

from d2llm.data.plan import read_plan
from d2llm.models.student import Student
from e2e.command_line import fail, succeed_with_report, write_recipe


def read_run_plan(run):
    return read_plan(run / "plans" / "everyday")


def write_mining_recipe(workspace, path, extra):
    """The shared recipe with extra lines in its [mining] section."""
    write_recipe(path, workspace, workspace / "everyday")
    path.write_text(path.read_text().replace("[mining]", f"[mining]\n{extra}"))
    return path


def test_a_trained_student_can_rank_the_candidates(workspace, reports, tmp_path):
    student = workspace / "run" / "student"
    arguments = (workspace / "tiny.toml", "--out", tmp_path / "run", "--dtype", "float32")
    _, report = succeed_with_report("mine", *arguments, "--student", student, folder=tmp_path)
    assert set(report["result"]["everyday"]["hard_negatives_from"]) <= {"bm25", "student", "bm25+student"}
    recipe = write_mining_recipe(
        workspace, tmp_path / "r.toml", f'student = "{student}"\nsources = ["encoder"]\nsampling = "top"'
    )
    succeed_with_report("mine", recipe, "--out", tmp_path / "other", "--dtype", "float32", folder=tmp_path)
    entry = read_run_plan(tmp_path / "other").entries[0]
    model = Student.load(student, dtype="float32")
    lines = [json.loads(line) for line in (workspace / "everyday" / "corpus.jsonl").read_text().splitlines()]
    query = " ".join(lines[0]["text"].split()[:5])
    others = [line for line in lines if line["_id"] not in entry.positives]
    vectors = model.encode_passages([line["text"] for line in others]).vectors
    scores = model.score(model.encode_queries([query]).vectors[0], vectors, "asymmetric")
    assert list(entry.hard_negatives) == [others[row]["_id"] for row in np.argsort(-scores)[:3]]
    fail("mine", recipe, "--out", tmp_path / "x", "--student", "nobody", containing=["no student at 'nobody'"])
