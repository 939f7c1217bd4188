"""Runs with a teacher margin in the recipe: mine, tune the teacher, then mine again with the tuned teacher's scores."""

from __future__ import annotations

import json
import shutil

import pytest

from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe import TeacherConfig
from e2e.command_line import d2llm, succeed, succeed_with_report, write_lines, write_recipe

MARGIN = "teacher_margin = 0.0"


def recipe_with_margin(workspace, path, *changes):
    text = write_recipe(path, workspace, workspace / "everyday").read_text()
    for old, new in (("[mining]", f"[mining]\n{MARGIN}"), *changes):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def edit(recipe, old, new):
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def mined_plan(run):
    return read_plan(run / "plans" / "everyday")


def filtered_plan(run):
    return read_plan(run / "filtered" / "everyday")


def training_plan_hash(folder):
    """The hash of the plan that a teacher or student was trained on."""
    return manifest(folder)["settings"]["plans"]["everyday"]


def warnings_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]


def stale_warnings_of(result):
    return [line for line in warnings_of(result) if "is kept" in line]


@pytest.fixture(scope="module")
def finished_run(workspace, tmp_path_factory):
    """A finished run with a teacher margin: its folder, the command's output, and the reported result."""
    folder = tmp_path_factory.mktemp("margin")
    recipe = recipe_with_margin(workspace, folder / "tiny.toml")
    result, report = succeed_with_report("run", recipe, "--out", folder / "run", "--dtype", "float32", folder=folder)
    return folder, result, report["result"]


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, and the arguments that name its recipe and folder."""
    shutil.copytree(finished_run[0] / "run", tmp_path / "run")
    recipe = shutil.copy(finished_run[0] / "tiny.toml", tmp_path / "tiny.toml")
    return tmp_path, (recipe, "--out", tmp_path / "run", "--dtype", "float32")


class TestFinishedRun:
    def test_teacher_trains_on_the_mined_plan_student_on_filtered(self, finished_run):
        folder, _, result = finished_run
        run = folder / "run"
        teacher = manifest(run / "teacher")["fingerprint"]
        assert result["mine"]["everyday"]["num_dropped"]["teacher_margin"] == 0
        assert mined_plan(run).manifest["settings"]["mining"]["teacher_margin"] is None
        assert "teacher" not in mined_plan(run).manifest
        assert result["filter"]["everyday"]["num_dropped"]["teacher_margin"] > 0
        assert filtered_plan(run).manifest["settings"]["mining"]["teacher_margin"] == 0.0
        assert filtered_plan(run).manifest["teacher"] == teacher
        assert filtered_plan(run).entries != mined_plan(run).entries
        assert training_plan_hash(run / "teacher") == mined_plan(run).manifest["content_hash"]
        assert training_plan_hash(run / "student") == filtered_plan(run).manifest["content_hash"]

    def test_tuned_teacher_ranks_no_negative_above_the_positives(self, finished_run):
        run = finished_run[0] / "run"
        identity = identify_teacher(TeacherConfig(model=str(run / "teacher")))
        key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"], "dataset": "everyday"}
        labels = LabelStore(run / "labels", **key)
        for entry in filtered_plan(run).entries:
            odds = labels.log_odds(entry.query_id)
            limit = odds[entry.positives[0]]
            assert all(odds[passage_id] <= limit for passage_id in entry.hard_negatives)

    def test_pairs_judged_by_the_filter_are_not_judged_again(self, finished_run):
        _, _, result = finished_run
        filter_report = result["filter"]["everyday"]
        assert filter_report["teacher"]["scored"] >= 12 + filter_report["num_hard_negatives"]
        assert result["label"]["pairs"] == filter_report["num_easy_negatives"]
        assert result["label"]["finished_pairs"] == 12 + filter_report["num_hard_negatives"]

    def test_the_steps_are_shown_and_work_files_removed(self, finished_run):
        folder, result, _ = finished_run
        assert [path.name for path in (folder / "run" / "plans").iterdir()] == ["everyday"]
        assert [path.name for path in (folder / "run" / "filtered").iterdir()] == ["everyday"]
        assert "passages dropped by the teacher's margin" in result.stdout
        assert (folder / "run" / "filtered" / "everyday" / "audit.md").is_file()

    def test_a_rerun_does_nothing_and_warns_of_nothing(self, run):
        folder, arguments = run
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".jsonl", ".json")}
        result, report = succeed_with_report("run", *arguments, folder=folder)
        assert warnings_of(result) == []
        assert "run with --again filter rebuilds it" in report["result"]["filter"]["everyday"]["skipped"]
        for step in ("tune-teacher", "gate", "distill"):
            assert "skipped" in report["result"][step]
        assert report["result"]["label"]["pairs"] == 0
        report_file = folder / "report.json"
        assert {p: p.stat().st_mtime_ns for p in before if p != report_file} == {
            p: time for p, time in before.items() if p != report_file
        }


class TestInterruptedRun:
    def test_it_resumes_anywhere_and_encodes_the_corpus_once(self, finished_run, workspace, tmp_path, monkeypatch):
        arguments = (
            "run",
            recipe_with_margin(workspace, tmp_path / "tiny.toml"),
            "--out",
            tmp_path / "run",
            "--dtype",
            "float32",
        )

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:  # between the two mining passes
            patch.setattr("d2llm.training.mining.plans.filter_plans", interrupt)
            assert d2llm(*arguments).exit_code != 0
        assert sorted(path.name for path in (tmp_path / "run" / "plans").iterdir()) == [".everyday.mining", "everyday"]
        tuned_at = (tmp_path / "run" / "teacher" / "manifest.json").stat().st_mtime_ns

        def refuse(*_, **__):
            raise AssertionError("encoded again")

        with monkeypatch.context() as patch:  # in the second mining pass, which has its vectors already
            patch.setattr("d2llm.training.mining.mine.choose", interrupt)
            patch.setattr(Student, "encode_passages", refuse)
            result = d2llm(*arguments)
        assert result.exit_code != 0
        assert not isinstance(result.exception, AssertionError)
        assert stale_warnings_of(result) == []
        assert not (tmp_path / "run" / "filtered" / "everyday").exists()
        with monkeypatch.context() as patch:  # after the second mining pass
            patch.setattr("d2llm.training.label.label", interrupt)
            assert d2llm(*arguments).exit_code != 0
        filtered_at = (tmp_path / "run" / "filtered" / "everyday" / "manifest.json").stat().st_mtime_ns
        assert stale_warnings_of(succeed(*arguments)) == []
        assert (tmp_path / "run" / "filtered" / "everyday" / "manifest.json").stat().st_mtime_ns == filtered_at
        assert (tmp_path / "run" / "teacher" / "manifest.json").stat().st_mtime_ns == tuned_at
        assert filtered_plan(tmp_path / "run").entries == filtered_plan(finished_run[0] / "run").entries
        assert mined_plan(tmp_path / "run").entries == mined_plan(finished_run[0] / "run").entries

    def test_stopped_after_retuning_it_filters_with_the_new_teacher(self, run, monkeypatch):
        folder, arguments = run
        edit(folder / "tiny.toml", "num_negatives = 2", "num_negatives = 1")

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("d2llm.training.mining.plans.filter_plans", interrupt)
            assert d2llm("run", *arguments, "--again", "tune-teacher").exit_code != 0
        assert not (folder / "run" / "filtered" / "everyday").exists()
        succeed("run", *arguments)
        assert filtered_plan(folder / "run").manifest["teacher"] == manifest(folder / "run" / "teacher")["fingerprint"]


class TestAgain:
    def test_again_filter_rebuilds_the_plan_and_the_student(self, run):
        folder, arguments = run
        edit(folder / "tiny.toml", MARGIN, "teacher_margin = 1.0")
        (warning,) = warnings_of(succeed("run", *arguments))
        assert "everyday was made with settings that differ from the recipe (mining), and is kept" in warning
        assert "run with --again filter rebuilds it" in warning
        teacher = manifest(folder / "run" / "teacher")
        result, report = succeed_with_report("run", *arguments, "--again", "filter", folder=folder)
        assert "skipped" in report["result"]["mine"]["everyday"]
        assert "skipped" in report["result"]["tune-teacher"]
        assert "skipped" in report["result"]["gate"]
        assert report["result"]["filter"]["everyday"]["num_dropped"]["teacher_margin"] > 0
        assert report["result"]["distill"]["steps"] == 3
        assert manifest(folder / "run" / "teacher") == teacher
        for name in ("filtered/everyday.old-1", "student.old-1"):
            assert (folder / "run" / name / "manifest.json").is_file()
        assert stale_warnings_of(result) == []
        assert stale_warnings_of(succeed("run", *arguments)) == []

    def test_again_mine_rebuilds_both_plans(self, run):
        folder, arguments = run
        edit(folder / "tiny.toml", "num_hard = 3", "num_hard = 4")
        warnings = warnings_of(succeed("run", *arguments))
        assert ["plans" in warning or "filtered" in warning for warning in warnings] == [True, True]
        _, report = succeed_with_report("run", *arguments, "--again", "mine", folder=folder)
        for step in ("mine", "filter"):
            assert report["result"][step]["everyday"]["num_entries"] == 12
        assert (folder / "run" / "filtered" / "everyday.old-1").is_dir()
        assert warnings_of(succeed("run", *arguments)) == []


class TestSeparateSteps:
    def test_separate_steps_filter_and_a_run_continues_them(self, finished_run, workspace, tmp_path):
        recipe = recipe_with_margin(workspace, tmp_path / "tiny.toml")
        arguments = (recipe, "--out", tmp_path / "run", "--dtype", "float32")
        run = tmp_path / "run"
        _, first = succeed_with_report("mine", *arguments, folder=tmp_path)
        untuned = mined_plan(run).manifest["teacher"]
        assert first["result"]["everyday"]["teacher"]["scored"] > 0
        succeed("tune-teacher", *arguments)
        succeed("mine", *arguments, "--again")
        teacher = manifest(run / "teacher")["fingerprint"]
        assert mined_plan(run).manifest["teacher"] == teacher != untuned
        # The plan has changed only because this teacher filtered it.
        assert warnings_of(succeed("tune-teacher", *arguments)) == []
        result, report = succeed_with_report("run", *arguments, folder=tmp_path)
        assert stale_warnings_of(result) == []
        assert "was mined with this teacher's margin" in report["result"]["filter"]["everyday"]["skipped"]
        assert not (run / "filtered").exists()
        assert training_plan_hash(run / "student") == mined_plan(run).manifest["content_hash"]

    def test_mine_again_sets_the_filtered_plan_aside(self, run):
        folder, arguments = run
        before = filtered_plan(folder / "run").entries
        result = succeed("mine", *arguments, "--again")
        assert "the earlier result is now in" in result.stderr
        assert not (folder / "run" / "filtered" / "everyday").exists()
        # The tuned teacher exists, so mine filters at once; its plan is the one that the student was trained on.
        assert mined_plan(folder / "run").entries == before
        assert warnings_of(succeed("run", *arguments)) == []

    def test_retuning_warns_that_another_teacher_filtered_the_plan(self, run):
        folder, arguments = run
        edit(folder / "tiny.toml", "num_negatives = 2", "num_negatives = 1")
        (warning,) = warnings_of(succeed("tune-teacher", *arguments, "--again"))
        assert "everyday was filtered with another teacher and is kept; to filter with this one, use run" in warning
        warnings = stale_warnings_of(succeed("run", *arguments))
        assert "with settings that differ from the recipe (teacher)" in warnings[0]
        assert "the teacher; distill with --again" in warnings[1]

    def test_mine_skips_the_margin_while_a_new_head_is_untuned(self, workspace, tmp_path):
        recipe = recipe_with_margin(
            workspace,
            tmp_path / "tiny.toml",
            (
                f'model = "{workspace / "decoder"}"',
                f'model = "{workspace / "encoder"}"\nkind = "classifier"\nnew_head = true',
            ),
            ('prompt = "short"\n', ""),
            ("[teacher_tuning]\nlora = { rank = 2, alpha = 2, dropout = 0 }", '[teacher_tuning]\ntuning = "full"'),
        )
        arguments = (recipe, "--out", tmp_path / "run", "--dtype", "float32")
        assert (
            "the teacher's margin is not used, because the teacher's new head is not tuned"
            in succeed("mine", *arguments).stderr
        )
        assert "teacher" not in mined_plan(tmp_path / "run").manifest
        succeed("tune-teacher", *arguments)
        _, report = succeed_with_report("run", *arguments, folder=tmp_path)
        assert report["result"]["filter"]["everyday"]["teacher"]["scored"] > 0
        assert (
            filtered_plan(tmp_path / "run").manifest["teacher"] == manifest(tmp_path / "run" / "teacher")["fingerprint"]
        )


class TestOtherRecipes:
    def test_without_a_margin_nothing_is_mined_twice(self, workspace, reports, tmp_path):
        shutil.copytree(workspace / "run", tmp_path / "run")
        arguments = (workspace / "tiny.toml", "--out", tmp_path / "run", "--dtype", "float32")
        result, report = succeed_with_report("run", *arguments, folder=tmp_path)
        assert "has no teacher's margin" in report["result"]["filter"]["skipped"]
        assert not (tmp_path / "run" / "filtered").exists()
        assert stale_warnings_of(result) == []

    def test_a_teacher_without_tuning_filters_at_once(self, workspace, tmp_path):
        recipe = recipe_with_margin(
            workspace, tmp_path / "tiny.toml", ("[teacher_tuning]", "[teacher_tuning]\nepochs = 0")
        )
        arguments = ("run", recipe, "--out", tmp_path / "run", "--dtype", "float32")
        _, report = succeed_with_report(*arguments, folder=tmp_path)
        assert report["result"]["mine"]["everyday"]["num_dropped"]["teacher_margin"] > 0
        assert "mine has filtered already" in report["result"]["filter"]["skipped"]
        assert not (tmp_path / "run" / "filtered").exists()

    def test_closed_gates_and_labelled_pairs_skip_the_filter(self, workspace, tmp_path):
        (tmp_path / "couples").mkdir()
        for split, count in (("train", 8), ("dev", 4)):
            pairs = [{"query": f"say {n}", "document": f"word {n % 3}", "label": n % 2} for n in range(count)]
            write_lines(tmp_path / "couples" / f"{split}.jsonl", pairs)
        recipe = recipe_with_margin(
            workspace,
            tmp_path / "tiny.toml",
            ('when_closed = "teacher"', 'when_closed = "labels"'),  # four dev queries are too few to open a gate
            ("[mining]", f'[[data]]\npath = "{tmp_path / "couples"}"\ntask = "symmetric"\n[mining]'),
        )
        arguments = ("run", recipe, "--out", tmp_path / "run", "--dtype", "float32")
        result, report = succeed_with_report(*arguments, folder=tmp_path)
        filter_report = report["result"]["filter"]
        assert "the mined plan is used, because the gate is closed" in filter_report["everyday"]["skipped"]
        assert "labelled pairs are not mined" in filter_report["couples"]["skipped"]
        assert not (tmp_path / "run" / "filtered").exists()
        assert sorted(path.name for path in (tmp_path / "run" / "plans").iterdir()) == ["couples", "everyday"]
        assert training_plan_hash(tmp_path / "run" / "student") == mined_plan(tmp_path / "run").manifest["content_hash"]
        assert "everyday: the mined plan is used" in result.stdout

    def test_an_ensemble_filters_and_its_cosine_is_not_the_baseline(self, workspace, tmp_path):
        recipe = recipe_with_margin(
            workspace, tmp_path / "tiny.toml", ("max_tokens = 200", "max_tokens = 200\nensemble_with_cosine = true")
        )
        run = tmp_path / "run"
        arguments = (recipe, "--out", run, "--dtype", "float32")
        _, report = succeed_with_report("run", *arguments, folder=tmp_path)
        ensemble = manifest(run / "ensemble")["fingerprint"]
        assert filtered_plan(run).manifest["teacher"] == ensemble == report["result"]["label"]["teacher"]
        assert report["result"]["label"]["pairs"] == report["result"]["filter"]["everyday"]["num_easy_negatives"]
        assert training_plan_hash(run / "ensemble-cosine") == mined_plan(run).manifest["content_hash"]
        assert training_plan_hash(run / "student") == filtered_plan(run).manifest["content_hash"]
        assert not (run / "student-cosine").exists()
        assert warnings_of(succeed("run", *arguments)) == []
        succeed("distill", *arguments, "--variant", "cosine")
        assert training_plan_hash(run / "student-cosine") == filtered_plan(run).manifest["content_hash"]
