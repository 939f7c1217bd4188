"""``d2llm run`` and ``d2llm ablate`` with a folder of recorded lists: the gate judges by them, and students learn."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from d2llm.data.beir import read_beir
from d2llm.data.labels import LabelStore, label_keys
from d2llm.data.plan import read_plan
from e2e.command_line import succeed, succeed_with_report, write_lines
from list_endpoint import grade, recipe_with_teacher


class RecordedRun:
    """A run with plans, and a folder with graded lists of train and dev queries."""

    def __init__(self, workspace: Path, folder: Path) -> None:
        self.folder, self.lists = folder, folder / "judgements"
        self.recipe = folder / "recipe.toml"
        text = recipe_with_teacher(workspace / "tiny.toml", 'kind = "graded"\nmodel = "large"')
        self.recipe.write_text(text.replace('when_closed = "teacher"', 'when_closed = "stop"\nalpha = 0.3'))
        self.where = (self.recipe, "--out", folder / "run", "--dtype", "float32")
        succeed("mine", *self.where)
        self.dataset = read_beir(workspace / "everyday")
        self.plan = read_plan(folder / "run" / "plans" / "everyday")
        self.lists.mkdir()
        (self.lists / "README.md").write_text("How they were made.")
        write_lines(self.lists / "other.jsonl", [{"query_id": "nobody", "passages": ["nothing"], "grades": [1]}])
        self.write(dev_passages=[*self.dataset.passages])

    def write(self, *, dev_passages: list[str]) -> None:
        """Record all of the plan, and so many passages for each dev query, in two judgings."""
        lists = [(entry.query_id, [*entry.passage_ids]) for entry in self.plan.entries]
        lists += [(query_id, dev_passages) for query_id in self.dataset.qrels["dev"]]
        lines: list[dict[str, Any]] = [
            {
                "query_id": query_id,
                "judging": judging,
                "task": "asymmetric",
                "passages": names[::judging],
                "grades": [self.grade(query_id, name) + judging for name in names[::judging]],
                "date": "2026-11-27",
            }
            for query_id, names in lists
            for judging in (-1, 1)
        ]
        write_lines(self.lists / "everyday.jsonl", lines)

    def grade(self, query_id: str, passage_id: str) -> int:
        query, passage = self.dataset.queries[query_id], self.dataset.passages[passage_id]
        return 1 + grade(query.text, passage.full_text) * 98 // 100


@pytest.fixture(scope="module")
def recorded(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RecordedRun, dict[str, Any]]:
    """A finished run with recorded grades, and the results of its steps."""
    run = RecordedRun(workspace, tmp_path_factory.mktemp("recorded"))
    _, report = succeed_with_report("run", *run.where, "--recorded", run.lists, folder=run.folder)
    return run, report["result"]


def test_a_run_judges_dev_and_teaches_by_recorded_lists(recorded: tuple[RecordedRun, dict[str, Any]]) -> None:
    run, steps = recorded
    gate = steps["gate"]
    (row,) = gate["sets"]
    assert (row["teacher"], row["is_open"]) == (1, True)  # a query is the beginning of its passage
    assert gate["num_scored"] > 0
    assert (gate["num_undecided"], gate["num_ungraded"], steps["label"]["num_undecided"]) == (0, 0, 0)
    manifest = json.loads((run.folder / "run" / "student" / "manifest.json").read_text())
    assert manifest["teacher"] == steps["label"]["teacher"]
    (key,) = label_keys(run.folder / "run" / "labels")
    labels = LabelStore(run.folder / "run" / "labels", **asdict(key))
    for entry in run.plan.entries:
        expected = {name: run.grade(entry.query_id, name) for name in entry.passage_ids}
        assert labels.grades(entry.query_id) == pytest.approx(expected)  # the mean of two judgings


def test_an_ablation_repeats_them_and_asks_nobody(recorded: tuple[RecordedRun, dict[str, Any]]) -> None:
    run, _ = recorded
    options = ("--variants", "cosine", "--seeds", 1, "--recorded", run.lists)
    _, report = succeed_with_report("ablate", *run.where, *options, folder=run.folder)
    comparison = report["result"]
    assert [row["name"] for row in comparison["rows"]] == ["cosine"]
    student = json.loads((run.folder / "run" / "student" / "manifest.json").read_text())
    assert comparison["base"]["runs"][0]["fingerprint"] == student["fingerprint"]


def test_a_gate_ranks_candidates_without_a_grade_last_for_both(recorded, tmp_path):
    run, steps = recorded
    shutil.copytree(run.folder / "run" / "plans", tmp_path / "run" / "plans")
    positives = run.dataset.positives("dev")
    relevant = [name for names in positives.values() for name in names]
    others = [name for name in run.dataset.passages if name not in relevant][:8]
    run.write(dev_passages=[*relevant, *others])
    where = (run.recipe, "--out", tmp_path / "run", "--dtype", "float32", "--recorded", run.lists)
    result, report = succeed_with_report("gate", *where, folder=tmp_path)
    gate = report["result"]
    (row,), (before,) = gate["sets"], steps["gate"]["sets"]
    assert gate["num_ungraded"] == gate["num_undecided"] > 0
    assert row["teacher"] == 1
    assert row["cosine"] >= before["cosine"]  # fewer candidates, for both
    said = " ".join(result.stderr.split())
    assert f"{gate['num_ungraded']:,} candidates have no grade of the teacher and come last in both rankings" in said
