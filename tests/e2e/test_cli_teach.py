"""``d2llm gate`` and ``d2llm ensemble`` as a user runs them."""

from __future__ import annotations

import json
import shutil

import pytest

from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe import TeacherConfig
from d2llm.training.gate import read_gate
from e2e.command_line import fail, succeed, succeed_with_report, write_lines


@pytest.fixture(scope="module")
def run(workspace, reports, tmp_path_factory):
    """A copy of the finished run, and the arguments that name it."""
    folder = tmp_path_factory.mktemp("teach")
    shutil.copytree(workspace / "run", folder / "run")
    return folder, (workspace / "tiny.toml", "--out", folder / "run", "--dtype", "float32")


def test_the_gate_is_evaluated_on_dev_and_saved(run):
    folder, arguments = run
    result, report = succeed_with_report("gate", *arguments, folder=folder)
    gate_report = report["result"]
    assert [(row["name"], row["num_items"]) for row in gate_report["sets"]] == [("everyday", 4)]
    # Four queries cannot give a p-value below 0.05, however good the teacher is.
    assert gate_report["sets"][0]["is_open"] is False
    for text in (
        "everyday",
        "closed",
        f"{gate_report['sets'][0]['teacher']:.4f}",
        f"{gate_report['sets'][0]['p_value']:.4f}",
    ):
        assert text in result.stdout
    assert "gate: closed for everyday" in result.stderr
    assert "its labels are used anyway" in result.stderr
    teacher = identify_teacher(TeacherConfig(model=str(folder / "run" / "teacher")))
    assert read_gate(folder / "run", teacher.fingerprint) == {"everyday": False}
    _, repeated = succeed_with_report("gate", *arguments, folder=folder)
    assert repeated["result"]["num_scored"] == 0
    assert repeated["result"]["sets"] == gate_report["sets"]


def test_gate_accepts_another_teacher_and_student(run, workspace):
    folder, arguments = run
    options = ("--teacher", f"cosine:{folder / 'run' / 'student'}", "--student", folder / "run" / "student")
    _, report = succeed_with_report("gate", *arguments, *options, folder=folder)
    assert report["result"]["sets"][0]["difference"] == 0
    assert len(json.loads((folder / "run" / "gate.json").read_text())["gates"]) >= 1


def test_a_closed_gate_can_stop_the_run(run, workspace, tmp_path):
    _, arguments = run
    recipe = write_closed_gate_recipe(tmp_path / "stop.toml", workspace, "stop")
    fail("gate", recipe, *arguments[1:], containing=["closed for everyday", "when_closed is 'stop'"])
    fail(
        "distill", recipe, *arguments[1:], "--variant", "concat", containing=["on everyday (gate.json)", "says to stop"]
    )


def test_behind_a_closed_gate_the_student_learns_from_data_alone(run, workspace, tmp_path):
    folder, arguments = run
    succeed("gate", *arguments)
    recipe = write_closed_gate_recipe(tmp_path / "labels.toml", workspace, "labels")
    options = ("--out", tmp_path / "run", "--dtype", "float32")
    shutil.copytree(folder / "run" / "plans", tmp_path / "run" / "plans")
    shutil.copytree(folder / "run" / "teacher", tmp_path / "run" / "teacher")
    shutil.copy(folder / "run" / "gate.json", tmp_path / "run")
    result, report = succeed_with_report("distill", recipe, *options, folder=tmp_path)  # there are no labels at all
    assert "the gate is closed for everyday: using the data sets' own judgements" in result.stderr
    assert report["result"]["unlabelled_queries"] == report["result"]["queries"] == 12
    manifest = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
    assert manifest["closed_gates"] == ["everyday"]
    ablating = ("ablate", recipe, *options, "--seeds", 1, "--variants", "no-imitation")
    compared = succeed_with_report(*ablating, folder=tmp_path)[1]["result"]
    assert compared["settings"]["closed_gates"] == ["everyday"]
    assert compared["base"]["runs"][0]["fingerprint"] == report["result"]["fingerprint"]  # trained like the run's own
    result, report = succeed_with_report("run", recipe, *options, folder=tmp_path)
    assert "closed for every data set" in report["result"]["label"]["skipped"]
    assert "tuning has begun or is finished" in report["result"]["precheck"]["skipped"]
    assert "The run, step by step" in result.stdout
    assert "closed for everyday" in result.stdout


def test_labelled_pairs_are_gated_too_and_keep_their_own_labels(run, workspace, tmp_path):
    folder, _ = run
    (tmp_path / "couples").mkdir()
    for split, count in (("train", 8), ("dev", 4)):
        pairs = [{"query": f"say {split} {n}", "document": f"word {n % 3}", "label": n % 2} for n in range(count)]
        write_lines(tmp_path / "couples" / f"{split}.jsonl", pairs)
    recipe = write_closed_gate_recipe(tmp_path / "pairs.toml", workspace, "labels")
    data = f'[[data]]\npath = "{tmp_path / "couples"}"\ntask = "symmetric"\n[mining]'
    recipe.write_text(recipe.read_text().replace("[mining]", data))
    options = ("--out", tmp_path / "run", "--dtype", "float32")
    succeed("gate", *run[1])
    shutil.copytree(folder / "run" / "plans", tmp_path / "run" / "plans")
    shutil.copytree(folder / "run" / "teacher", tmp_path / "run" / "teacher")
    shutil.copy(folder / "run" / "gate.json", tmp_path / "run")
    # The saved verdict does not cover the pairs, so the gate is evaluated again.
    result, report = succeed_with_report("run", recipe, *options, folder=tmp_path)
    gate_report = report["result"]["gate"]
    assert [(row["name"], row["measure"], row["num_items"]) for row in gate_report["sets"]] == [
        ("everyday", "nDCG@10", 4),
        ("couples", "AP", 4),
    ]
    assert [(row["name"], row["measure"]) for row in gate_report["tasks"]] == [
        ("asymmetric", "nDCG@10"),
        ("symmetric", "AP"),
    ]
    assert not any(row["is_open"] for row in gate_report["sets"])  # four items each cannot give a p-value below 0.05
    assert "the gate is closed for couples, everyday: using the data sets' own judgements" in result.stderr
    assert "closed for every data set" in report["result"]["label"]["skipped"]
    assert "closed for everyday, couples" in result.stdout
    manifest = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
    assert manifest["closed_gates"] == ["couples", "everyday"]
    assert report["result"]["distill"]["unlabelled_queries"] == report["result"]["distill"]["queries"] == 12 + 8
    repeated = succeed("run", recipe, *options)
    assert "gate: the verdict on this teacher is in" in repeated.stderr
    assert "closed for" in repeated.stdout


def write_closed_gate_recipe(path, workspace, when_closed):
    text = (workspace / "tiny.toml").read_text()
    assert 'when_closed = "teacher"' in text
    path.write_text(text.replace('when_closed = "teacher"', f'when_closed = "{when_closed}"'))
    return path


def test_an_ensemble_of_teachers_is_itself_a_teacher(run):
    folder, arguments = run
    members = ("--member", folder / "run" / "teacher", "--member", f"cosine:{folder / 'run' / 'student'}")
    page = folder / "ensemble.html"
    result, report = succeed_with_report("ensemble", *arguments, *members, "--depth", 5, "--html", page, folder=folder)
    rows = report["result"]["tasks"]["asymmetric"]["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student", "ensemble"]
    assert report["result"]["folder"] == str(folder / "run" / "ensemble")
    for row in rows:
        assert f"{row['after']['log_loss']:.4f}" in result.stdout
    assert "<svg" in page.read_text()
    manifest = json.loads((folder / "run" / "ensemble" / "manifest.json").read_text())
    assert {member["relative"] for member in manifest["members"]} <= {"../teacher", "../student"}
    _, gated = succeed_with_report("gate", *arguments, "--teacher", folder / "run" / "ensemble", folder=folder)
    assert gated["result"]["teacher"] == manifest["fingerprint"]
    assert gated["result"]["num_seen"] == 4
    assert "optimistic" in succeed("gate", *arguments, "--teacher", folder / "run" / "ensemble").stderr


def test_an_unknown_member_is_an_error(run):
    _, arguments = run
    fail("ensemble", *arguments, "--member", "cosine:no-such-place", containing=["no-such-place"])


def test_a_run_can_ensemble_its_teacher_with_the_tuned_cosine(run, workspace, tmp_path):
    folder, _ = run
    recipe = tmp_path / "ensemble.toml"
    text = (workspace / "tiny.toml").read_text()
    recipe.write_text(text.replace("max_tokens = 200", "max_tokens = 200\nensemble_with_cosine = true"))
    shutil.copytree(folder / "run" / "plans", tmp_path / "run" / "plans")
    shutil.copytree(folder / "run" / "teacher", tmp_path / "run" / "teacher")
    _, report = succeed_with_report("run", recipe, "--out", tmp_path / "run", "--dtype", "float32", folder=tmp_path)
    ensemble = json.loads((tmp_path / "run" / "ensemble" / "manifest.json").read_text())
    assert (tmp_path / "run" / "student-cosine" / "manifest.json").is_file()
    assert report["result"]["label"]["teacher"] == ensemble["fingerprint"]
    student = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
    assert student["teacher"] == ensemble["fingerprint"]
    assert list(read_gate(tmp_path / "run", ensemble["fingerprint"])) == ["everyday"]
