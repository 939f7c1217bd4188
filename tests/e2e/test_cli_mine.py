"""``d2llm mine`` as a user runs it: the audit, ranking by a student, the teacher margin, resuming."""

from __future__ import annotations

import json

import numpy as np

from d2llm.data.labels import LabelStore
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


def test_the_audit_is_written_beside_the_plan(workspace, reports):
    folder = workspace / "run" / "plans" / "everyday"
    page = (folder / "audit.md").read_text()
    audit = json.loads((folder / "audit.json").read_text())
    assert len(audit["examples"]) == page.count("\n### ") == 12
    assert str(workspace) not in page + json.dumps(audit)
    for example in audit["examples"]:
        assert {negative["passage_id"] for negative in example["hard_negatives"]} == set(
            next(
                e.hard_negatives for e in read_run_plan(workspace / "run").entries if e.query_id == example["query_id"]
            )
        )
        assert set(example["positives"][0]["scores"]) == {"cosine"}
    assert list(folder.parent.iterdir()) == [folder]  # the work folder is gone


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


def test_the_teacher_margin_saves_its_judgements_as_labels(workspace, reports, tmp_path):
    recipe = write_mining_recipe(workspace, tmp_path / "r.toml", "teacher_margin = 0.0")
    run = tmp_path / "run"
    _, report = succeed_with_report("mine", recipe, "--out", run, "--dtype", "float32", folder=tmp_path)
    mined = report["result"]["everyday"]
    assert mined["teacher"]["scored"] >= 12 + mined["num_hard_negatives"]
    _, report = succeed_with_report("label", recipe, "--out", run, "--dtype", "float32", folder=tmp_path)
    # Positives and hard negatives were judged while mining; only the easy negatives are left to judge.
    full = [entry for entry in read_run_plan(run).entries if len(entry.hard_negatives) == 3]
    assert report["result"]["pairs"] == mined["num_easy_negatives"]
    labels = LabelStore(run / "labels", teacher=report["result"]["teacher"], **_label_key(run))
    for entry in full:
        odds = labels.log_odds(entry.query_id)
        assert max(odds[p] for p in entry.hard_negatives) <= odds[entry.positives[0]]
    _, report = succeed_with_report("mine", recipe, "--out", run, "--again", "--dtype", "float32", folder=tmp_path)
    assert report["result"]["everyday"]["teacher"]["scored"] == 0


def _label_key(run):
    import pyarrow.parquet as pq

    row = pq.read_table(next((run / "labels" / "labels").glob("*.parquet"))).slice(0, 1).to_pylist()[0]
    return {"prompt": row["prompt"], "dataset": "everyday"}
