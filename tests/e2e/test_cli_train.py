"""Training from the command line: edited recipes, repeated steps, interruptions, runs that learn nothing, init."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest

from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.data.beir import read_beir
from d2llm.models.backbone import Backbone
from d2llm.models.layer_choice import layer_distances
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig
from d2llm.recipe.recipe import load_recipe
from e2e.command_line import (
    d2llm,
    fail,
    succeed,
    succeed_with_report,
    write_data,
    write_lines,
    write_qrels,
    write_recipe,
)
from prepared_process import PreparedProcess, program
from recipe_lines import superfluous_lines
from tiny_models import tiny_student_config, write_tiny_model


@pytest.fixture
def run(workspace, reports, tmp_path):
    """A copy of the finished run and its recipe: its folder, and the arguments for a command on it."""
    shutil.copytree(workspace / "run", tmp_path / "run")
    shutil.copy(workspace / "tiny.toml", tmp_path / "tiny.toml")
    return tmp_path, (tmp_path / "tiny.toml", "--out", tmp_path / "run", "--dtype", "float32")


def edit(folder, old, new):
    text = (folder / "tiny.toml").read_text()
    assert old in text
    (folder / "tiny.toml").write_text(text.replace(old, new))


def warnings_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]


def stale_warnings(result):
    return [line for line in warnings_of(result) if "was made from other inputs" in line]


def fingerprint(folder):
    return json.loads((folder / MANIFEST).read_text())["fingerprint"]


class TestEditedRecipe:
    def test_an_unchanged_recipe_gives_no_warning(self, run):
        _, arguments = run
        for verb in ("tune-teacher", "distill"):
            result = succeed(verb, *arguments)
            assert "is finished" in result.stderr
            assert warnings_of(result) == []

    def test_distill_names_the_changes_and_keeps_the_student(self, run):
        folder, arguments = run
        before = fingerprint(folder / "run" / "student")
        edit(folder, "learning_rate = 0.001", "learning_rate = 0.002")
        edit(folder, "hidden_dim = 16", "hidden_dim = 8")
        result = succeed("distill", *arguments)
        (warning,) = warnings_of(result)
        assert "student was made from other inputs than the current ones, and is kept: " in warning
        assert "student.interaction.hidden_dim (was 16, is 8), training.learning_rate (was 0.001, is 0.002)" in warning
        assert "distill with --again rebuilds it and keeps this one aside" in warning
        assert fingerprint(folder / "run" / "student") == before

    def test_a_new_section_and_a_new_data_set_are_changes(self, run):
        folder, arguments = run
        more = write_data(folder / "more")
        recipe = folder / "tiny.toml"
        added = f'[[data]]\npath = "{more}"\ntask = "symmetric"\n[score_features]\nbm25 = true\nin_training = true\n'
        recipe.write_text(f"{recipe.read_text()}\n{added}")
        (warning,) = warnings_of(succeed("distill", *arguments))
        score_features = "score_features.bm25 (was False, is True), score_features.in_training (was False, is True)"
        assert f"kept: data.more (was not set, is set), {score_features}; distill with" in warning
        (folder / "run" / "plans" / "more").mkdir()
        plan = json.loads((folder / "run" / "plans" / "everyday" / MANIFEST).read_text())
        (folder / "run" / "plans" / "more" / MANIFEST).write_text(json.dumps(plan | {"dataset": "more"}))
        for verb in ("tune-teacher", "distill"):
            (warning,) = warnings_of(succeed(verb, *arguments))
            assert "the plan of more; " in warning

    def test_tune_teacher_warns_too_and_again_retunes(self, run):
        folder, arguments = run
        before = fingerprint(folder / "run" / "teacher")
        edit(folder, "num_negatives = 2", "num_negatives = 1")
        (warning,) = warnings_of(succeed("tune-teacher", *arguments))
        assert "teacher_tuning.num_negatives (was 2, is 1); tune-teacher with --again" in warning
        result, report = succeed_with_report("tune-teacher", *arguments, "--again", folder=folder)
        assert f"the earlier result is now in {folder / 'run' / 'teacher.old-1'}" in result.stderr
        assert report["result"]["pairs"] == 12 * 2
        assert fingerprint(folder / "run" / "teacher.old-1") == before
        assert fingerprint(folder / "run" / "teacher") == report["result"]["fingerprint"] != before
        # The student was trained on labels of the earlier teacher.
        (warning,) = warnings_of(succeed("distill", *arguments))
        assert "is kept: the teacher; distill with --again" in warning

    def test_a_changed_plan_gives_a_warning(self, run):
        folder, arguments = run
        edit(folder, "num_hard = 3", "num_hard = 2")
        succeed("mine", *arguments, "--again")
        for verb in ("tune-teacher", "distill"):
            (warning,) = warnings_of(succeed(verb, *arguments))
            assert "is kept: the plan of everyday" in warning

    def test_a_stopped_run_of_another_recipe_needs_again(self, run):
        folder, arguments = run
        shutil.rmtree(folder / "run" / "student")  # only its checkpoint remains
        edit(folder, "learning_rate = 0.001", "learning_rate = 0.002")
        error = "belongs to a run with other settings: training.learning_rate (was 0.001, is 0.002)"
        fail("distill", *arguments, containing=[error, "--again"])
        succeed("distill", *arguments, "--again")
        assert (folder / "run" / "student.old-1.run" / "checkpoint.safetensors").is_file()
        assert (folder / "run" / "student" / MANIFEST).is_file()


class TestRunAgain:
    def test_again_repeats_a_step_and_those_after_it(self, run):
        folder, arguments = run
        succeed("run", *arguments)  # for the gate, which the copied run lacks
        result, report = succeed_with_report("run", *arguments, "--again", "tune-teacher", folder=folder)
        assert "skipped" in report["result"]["mine"]["everyday"]
        assert report["result"]["tune-teacher"]["pairs"] == 12 * 3
        assert report["result"]["distill"]["steps"] == 3
        for name in ("teacher.old-1", "student.old-1"):
            assert (folder / "run" / name / MANIFEST).is_file()
        # The same recipe and seed give the same teacher, so its labels already exist.
        assert report["result"]["label"]["pairs"] == 0
        assert report["result"]["label"]["finished_pairs"] == 12 * 6
        assert "label: all 72 pairs of 12 queries already had labels" in result.stderr
        # The untuned teacher is measured before it is tuned again; that verdict is not stored.
        (precheck,) = report["result"]["precheck"]["sets"]
        assert (precheck["name"], precheck["num_items"]) == ("everyday", 4)
        assert "precheck: the untuned teacher is" in result.stderr
        for step in ("mine", "precheck", "tune-teacher", "ensemble", "gate", "label", "distill"):
            assert f"{step}\t" in result.stdout
        assert stale_warnings(result) == []

    def test_again_rejects_a_step_that_it_cannot_repeat(self, run):
        _, arguments = run
        result = d2llm("run", *arguments, "--again", "label")
        assert result.exit_code == 2
        assert "tune-teacher" in result.stderr


class TestRounds:
    def test_student_and_teacher_teach_each_other(self, run):
        folder, arguments = run
        losses = "[losses]\nlist_imitation = 1.0\nin_batch_cross_entropy = 1.0\n"
        recipe = folder / "tiny.toml"
        recipe.write_text(f"{recipe.read_text()}\n{losses}")
        result, report = succeed_with_report("run", *arguments, "--rounds", 2, folder=folder)
        rounds = report["result"]
        assert [(one["number"], one["student"]) for one in rounds] == [
            (number, str(folder / "run" / f"round-{number}" / "student")) for number in (1, 2)
        ]
        for one in rounds:
            dev = one["dev"]["everyday"]
            assert dev["kept"] >= dev["start"]
            assert f"{dev['start']:.4f}" in result.stdout
            assert f"{dev['kept']:.4f}" in result.stdout
            assert f"alternate: round {one['number']}, the teacher learns from " in result.stderr
        learns_from = json.loads((folder / "run" / "round-2" / "teacher" / MANIFEST).read_text())["settings"]
        assert learns_from["learns_from"] == fingerprint(folder / "run" / "round-1" / "student")
        # The run's own teacher and student are not touched, and finished rounds are kept.
        again, repeated = succeed_with_report("run", *arguments, "--rounds", 2, folder=folder)
        assert repeated["result"] == rounds
        assert "the teacher learns from" not in again.stderr

    def test_rounds_exclude_steps_and_other_runners(self, run):
        _, arguments = run
        for option in (("--again", "distill"), ("--runner", "ray")):
            fail("run", *arguments, "--rounds", 1, *option, containing=["--rounds cannot be combined with"])
        assert d2llm("run", *arguments, "--rounds", 0).exit_code == 2
        fail("run", *arguments, "--continue-teachers", containing=["give --rounds, too"])
        fail("run", *arguments, "--rounds", 1, "--beside", arguments[0], containing=["two recipes are called"])


class TestWithoutATeacher:
    def test_no_teacher_is_tuned_when_no_loss_imitates_one(self, workspace, tmp_path):
        text = write_recipe(tmp_path / "r.toml", workspace, workspace / "everyday").read_text()
        losses = "[losses]\nin_batch_cross_entropy = 1.0\n"
        (tmp_path / "r.toml").write_text(text + losses)
        arguments = ("run", tmp_path / "r.toml", "--out", tmp_path / "run", "--dtype", "float32")
        result, report = succeed_with_report(*arguments, folder=tmp_path)
        assert set(report["result"]) == {"mine", "distill"}
        assert "no loss of the recipe imitates a teacher" in result.stderr
        assert not (tmp_path / "run" / "teacher").exists()


class TestNothingLearnt:
    def test_a_run_that_learns_nothing_warns_with_advice(self, run):
        folder, arguments = run
        edit(folder, "learning_rate = 0.001", "learning_rate = 1e-12\nhead_learning_rate = 1e-12")
        result, report = succeed_with_report("distill", *arguments, "--again", folder=folder)
        assert report["result"]["best_step"] == 0
        assert report["result"]["is_untrained"] is True
        (warning,) = [line for line in warnings_of(result) if "nothing was learnt" in line]
        assert "nothing was learnt: no state of the run was better on dev than the start" in warning
        dev = report["result"]["dev"]["everyday"]
        assert f"everyday {dev['start']:.4f} -> {dev['last']:.4f}" in warning
        assert f"; dev: everyday {dev['start']:.3f} -> {dev['start']:.3f} (4 questions or pairs)" in result.stderr
        assert "It hardly moved in 3 steps: raise training.learning_rate (1e-12 now) threefold" in warning
        assert "So few dev questions cannot show a small gain (everyday 4): use 100 or more" in warning
        assert "left out of the student, which is as good without: " in " ".join(result.stderr.split())

    def test_a_warm_up_as_long_as_the_run_gives_a_warning(self, run):
        folder, arguments = run
        edit(folder, "warmup_steps = 0", "warmup_steps = 1000")
        result = succeed("distill", *arguments, "--again")
        assert "the warm-up takes 3 of 3 steps, so the run hardly trains: remove warmup_steps" in result.stderr


class TestMemory:
    def test_the_memory_budget_is_reported_on_one_line(self, run):
        _, arguments = run
        lines = succeed("distill", *arguments, "--again").stderr.splitlines()
        (line,) = [line for line in lines if line.startswith("memory: ")]
        assert "GiB are free; up to" in line
        assert "training.graph_gib" in line
        assert not any(line.startswith("memory: ") for line in succeed("distill", *arguments).stderr.splitlines())


class TestStops:
    def test_sigterm_keeps_a_checkpoint_to_resume_from(self, workspace, reports, tmp_path):
        shutil.copytree(workspace / "run", tmp_path / "run", ignore=shutil.ignore_patterns("student*"))
        recipe = write_recipe(tmp_path / "r.toml", workspace, workspace / "everyday")
        edited = (
            recipe.read_text().replace("epochs = 1", "epochs = 2000").replace("checkpoint_every = 1", "patience = 99")
        )
        recipe.write_text(edited.replace("eval_every = 2", "eval_every = 100000"))
        command = ("distill", str(recipe), "--out", str(tmp_path / "run"), "--dtype", "float32")
        log = tmp_path / "run" / "student.run" / "log.jsonl"

        def steps_taken():
            return log.read_text().count('"loss"') if log.is_file() else 0

        with PreparedProcess(program, *command) as process:
            process.until(lambda: steps_taken() >= 3, "three steps")
            process.send(signal.SIGTERM)
            assert process.wait() == 143
            errors = process.errors
        assert "stopped: run the same command again to continue" in errors
        last_step = int(errors.split("distilling: step ")[1].split()[0])
        assert last_step >= 3
        recipe.write_text(recipe.read_text().replace("epochs = 2000", "epochs = 2000\ncheckpoint_minutes = 60"))
        with PreparedProcess(program, *command) as process:
            process.until(lambda: steps_taken() > last_step, "a step more")
            process.send(signal.SIGINT)
            assert process.wait() == 130
            errors = process.errors
        assert f"distilling: continues after step {last_step} of " in errors
        steps = [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]
        assert steps == list(range(1, len(steps) + 1))  # no step is missing or repeated


class TestInit:
    def test_the_recipe_runs_and_gives_reasons(self, workspace, tmp_path):
        target = tmp_path / "start.toml"
        arguments = (
            "init",
            workspace / "everyday",
            "--out",
            target,
            "--backbone",
            workspace / "encoder",
            "--device",
            "cpu",
        )
        result, report = succeed_with_report(*arguments, folder=tmp_path)
        facts = report["result"]
        assert (facts["num_train"], facts["num_left"], facts["num_dev"], facts["num_passages"]) == (12, 12, 4, 60)
        text = target.read_text()
        recipe = load_recipe(target)
        assert recipe.name == "everyday"
        assert [(data.path, data.task) for data in recipe.data] == [(str(workspace / "everyday"), facts["task"])]
        assert recipe.training.epochs == 10
        assert superfluous_lines(text) == []
        assert recipe.losses.imitates is False
        assert f"[[data]] # {facts['task']}, a passage " in text
        for value in ("max_query_tokens", "max_passage_tokens", "learning_rate", "epochs", "num_hard"):
            line = next(line for line in text.splitlines() if line.startswith(f"{value} = "))
            assert "# " in line, f"{value} has no reason"
        assert "12 questions make 1 step per epoch: 10 in all" in text
        assert "dev has 4 judged questions or pairs" in result.stderr
        assert f"then: d2llm run {target}" in result.stderr
        # tiny heads for the tiny model; everything else as init wrote it
        small = "[student.pooling]\nnum_heads = 4\n[student.interaction]\nhidden_dim = 16\nfeature_dim = 8\n"
        target.write_text(text + small)
        _, report = succeed_with_report("run", target, "--out", tmp_path / "run", "--dtype", "float32", folder=tmp_path)
        assert report["result"]["distill"]["steps"] == 10

    def test_layers_are_chosen_by_the_passages_of_an_encoder_and_the_first_of_a_decoder(self, workspace, tmp_path):
        for name, architecture in (("encoder", "bert"), ("decoder", "llama")):
            model = write_tiny_model(tmp_path / name, architecture, num_hidden_layers=3)
            target = tmp_path / f"{name}.toml"
            options = ("--out", target, "--backbone", model, "--device", "cpu", "--layers")
            succeed("init", workspace / "everyday", *options, "2")
            layers = load_recipe(target).student.backbone.layers
            if name == "decoder":
                assert layers == 2
                continue
            passages = [p.full_text for p in read_beir(workspace / "everyday").passages.values()]
            distances = layer_distances(Backbone.load(BackboneConfig(model=str(model)), device="cpu"), passages)
            assert layers == tuple(sorted(np.argsort(distances)[1:]))
            target.unlink()
            fail("init", workspace / "everyday", *options, "4", containing=["4 layers cannot be kept of 3"])

    def test_a_student_is_trained_further_and_is_no_backbone(self, workspace, tmp_path):
        trained = Student.create(tiny_student_config(workspace / "encoder"), device="cpu", dtype="float32")
        trained.save(tmp_path / "first", content={"tasks": ["symmetric"]})
        target = tmp_path / "further.toml"
        arguments = ["init", workspace / "everyday", "--out", target, "--device", "cpu"]
        for name in (tmp_path / "first", "d2llm-minilm"):
            fail(*arguments, "--backbone", name, containing=[f"'{name}' is a student", f"--start {name}"])
        fail(*arguments, "--backbone", "minilm", "--start", "d2llm-minilm", containing=["has a backbone already"])
        _, report = succeed_with_report(*arguments, "--start", tmp_path / "first", folder=tmp_path)
        recipe = load_recipe(target)
        assert recipe.student == trained.config
        assert (recipe.training.start, recipe.mining.student) == (str(tmp_path / "first"),) * 2
        assert report["result"]["task"] == recipe.data[0].task == "symmetric"
        assert "what the student to start from was trained for" in target.read_text()
        assert superfluous_lines(target.read_text()) == []
        _, report = succeed_with_report("run", target, "--out", tmp_path / "run", "--dtype", "float32", folder=tmp_path)
        assert report["result"]["distill"]["steps"] == 10
        assert Student.load(tmp_path / "run" / "student", device="cpu").trained_tasks == ("symmetric",)
        told = [*arguments[:3], tmp_path / "told.toml", *arguments[4:], "--start", tmp_path / "first"]
        result = succeed(*told, "--task", "asymmetric")
        assert "trained for symmetric search and is used for asymmetric search" in result.stderr

    def test_missing_dev_judgements_get_advice(self, workspace, tmp_path):
        shutil.copytree(workspace / "everyday", tmp_path / "data")
        write_qrels(tmp_path / "data", "dev", [])
        options = ("--out", tmp_path / "r.toml", "--backbone", workspace / "encoder")
        message = "qrels/dev.tsv has no queries with a positive, which training needs"
        fail("init", tmp_path / "data", *options, containing=[message, "about a fifth of the 12 in qrels/train.tsv"])
        write_qrels(tmp_path / "data", "train", [])
        fail("init", tmp_path / "data", *options, containing=["qrels/train.tsv has no queries with a positive"])
        assert not (tmp_path / "r.toml").exists()

    def test_a_named_teacher_and_shared_passages(self, workspace, tmp_path):
        shutil.copytree(workspace / "everyday", tmp_path / "data")
        write_qrels(tmp_path / "data", "train", [(f"q{n}", f"s{12 + n % 4}") for n in range(12)])  # the passages of dev
        options = (
            "--out",
            tmp_path / "r.toml",
            "--backbone",
            workspace / "encoder",
            "--teacher",
            "seq2seq:owner/monot5",
        )
        succeed("init", tmp_path / "data", *options, "--task", "symmetric")
        recipe = load_recipe(tmp_path / "r.toml")
        assert (recipe.teacher.model, recipe.teacher.kind) == ("owner/monot5", "seq2seq")
        assert (recipe.teacher_tuning.epochs, recipe.losses.weight("list_imitation")) == (0, 0.5)
        assert recipe.data[0].exclude_shared_passages is False
        assert recipe.data[0].task == "symmetric"
        assert "only 0 of 12 questions share no relevant passage" in (tmp_path / "r.toml").read_text()
        assert superfluous_lines((tmp_path / "r.toml").read_text()) == []

    def test_labelled_pairs(self, workspace, tmp_path):
        (tmp_path / "pairs").mkdir()
        for split, count in (("train", 40), ("dev", 60)):
            pairs = [{"query": f"say {n}", "document": f"word {n % 3}", "label": n % 2} for n in range(count)]
            write_lines(tmp_path / "pairs" / f"{split}.jsonl", pairs)
        succeed("init", tmp_path / "pairs", "--out", tmp_path / "r.toml", "--backbone", workspace / "encoder")
        recipe = load_recipe(tmp_path / "r.toml")
        assert recipe.data[0].task == "symmetric"
        assert recipe.losses.root.keys() == {"pair_cross_entropy"}
        assert "40 pairs to train on, 60 in dev" in (tmp_path / "r.toml").read_text()
        assert superfluous_lines((tmp_path / "r.toml").read_text()) == []
