"""Ablations: order and data of the runs, skipping and resuming, and report figures checked by hand."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d2llm.core.errors import InputError, RecipeError, TrainingDivergedError
from d2llm.data.labels import LabelStore
from d2llm.data.pair_training import plan_of_pairs, read_pair_training_set
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.data.plan import TrainingSource
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.ops.significance import Interval
from d2llm.recipe import DataConfig, Recipe, ResidualConfig
from d2llm.recipe.losses import Objective
from d2llm.recipe.variants import find_variant
from d2llm.training import ablate as verb
from d2llm.training import distill as distill_verb
from d2llm.training import trainer
from d2llm.training.ablate import RunSettings, ablate
from d2llm.training.ablation_report import AblationReport, RunResult
from tiny_data import JUDGEMENTS, make_plan, tiny_recipe, topics, write_rule_labels
from tiny_distill import LEARNING, Workspace
from tiny_models import tiny_student_config


def small_recipe(workspace: Workspace, **training: object) -> Recipe:
    return tiny_recipe(tiny_student_config(workspace.model), **(LEARNING | {"epochs": 1} | training))


def run(workspace: Workspace, folder: Path, **options: Any) -> AblationReport:
    defaults = {
        "recipe": small_recipe(workspace),
        "labels": workspace.labels,
        "teacher": workspace.teacher,
        "variants": ["no-imitation"],
        "num_seeds": 2,
        "device": "cpu",
        "dtype": "float32",
    }
    return ablate(options.pop("sources", [workspace.source]), folder, **(defaults | options))


class FakeTraining:
    """Stands in for training: records its calls and returns preset values by variant and seed."""

    def __init__(self, values: Mapping[str, tuple[float, ...]] | None = None) -> None:
        self.values = values or {}
        self.runs: list[tuple[str, int]] = []
        self.sources: dict[str, list[TrainingSource]] = {}
        self.recipes: dict[str, Recipe] = {}
        self.folders: set[str] = set()
        self.errors: dict[tuple[str, int], Exception] = {}

    def __call__(self, shared: RunSettings, recipe: Recipe, name: str, seed: int) -> RunResult:
        self.runs.append((name, seed))
        self.sources[name], self.recipes[name] = shared.sources, recipe
        self.folders.add(shared.root.name)
        if (name, seed) in self.errors:
            raise self.errors[name, seed]
        value = self.values[name][seed] if name in self.values else 0.5
        return RunResult(name, seed, value, {"tiny": value}, {"asymmetric": 0.25 * seed}, 4, 4, 1.5, f"{name}{seed}")

    def queries(self, name: str = "recipe") -> list[set[str]]:
        return [{entry.query_id for entry in source.plan.entries} for source in self.sources[name]]


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTraining]:
    def replace(values: Mapping[str, tuple[float, ...]] | None = None) -> FakeTraining:
        fake = FakeTraining(values)
        monkeypatch.setattr(verb, "train_and_measure", fake)
        return fake

    return replace


class Interrupted(Exception):
    pass


def interrupt(patch: pytest.MonkeyPatch, *, step: int) -> None:
    original, calls = trainer.optimizer_step, 0

    def optimizer_step(*arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == step:
            raise Interrupted
        return original(*arguments, **options)

    patch.setattr(trainer, "optimizer_step", optimizer_step)


def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("nothing was to be trained")


@pytest.fixture(scope="module")
def history(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One ablation: a first call without any time budget, then a killed run, then a resumed one that finishes."""
    folder = tmp_path_factory.mktemp("history") / "ablation"
    empty = run(workspace, folder, budget_minutes=0)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step=4)
        with pytest.raises(Interrupted):
            run(workspace, folder)
    checkpoint = next(folder.glob("*/recipe/seed-0.run/checkpoint.safetensors")).is_file()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    remarks = logging.getLogger("d2llm.remarks")
    remarks.setLevel(logging.INFO)
    remarks.addHandler(handler)
    whole = run(workspace, folder)
    remarks.removeHandler(handler)
    remarks.setLevel(logging.NOTSET)
    messages = [message for message in messages if message.startswith("ablate")]
    return SimpleNamespace(folder=folder, empty=empty, checkpoint=checkpoint, whole=whole, said=messages)


class TestRealRuns:
    def test_zero_budget_starts_no_run(self, history: SimpleNamespace) -> None:
        empty = history.empty
        expected = (("recipe", 0), ("no-imitation", 0), ("recipe", 1), ("no-imitation", 1))
        assert (empty.base.mean, empty.base.runs, empty.best) == (None, (), None)
        assert empty.missing == expected
        assert history.whole.missing == ()

    def test_interrupted_run_resumes_to_the_same_result_as_distill(self, workspace, history, tmp_path):
        assert history.checkpoint
        direct = workspace.run(tmp_path / "student", recipe=small_recipe(workspace))
        resumed = history.whole.base.runs[0]
        assert resumed.fingerprint == direct.fingerprint
        assert (resumed.steps, resumed.best_step) == (direct.steps, direct.best_step) == (4, direct.best_step)
        assert dict(resumed.interaction_weights) == direct.interaction_weights
        # Both samples hold all eight dev queries here, so the measured value is the one seen during training.
        weight = str(direct.interaction_weights["asymmetric"])
        assert resumed.by_set == {"tiny": pytest.approx(direct.dev["tiny"]["by_weight"][weight], abs=1e-6)}

    def test_two_stage_recipe_is_measured_with_its_interaction(self, workspace: Workspace, tmp_path: Path) -> None:
        recipe = small_recipe(workspace, residual=ResidualConfig(epochs=1, warmup_steps=1, batch_queries=4))
        report = run(workspace, tmp_path, recipe=recipe, variants=["one-stage"], num_seeds=1)
        staged, joint = report.base.runs[0], report.rows[0].runs[0]
        assert staged.steps == joint.steps == 4  # of the vector stage; the interaction stage's steps are not counted
        assert staged.best_step <= 4
        assert staged.fingerprint != joint.fingerprint

    def test_finished_runs_leave_students_logs_and_settings(self, history: SimpleNamespace) -> None:
        student = Path(history.whole.folder) / "recipe" / "seed-0"
        assert (student / "manifest.json").is_file()
        assert (student.with_name("seed-0.run") / "log.jsonl").is_file()
        assert list(Path(history.whole.folder).rglob("*.run/*.safetensors")) == []  # finished runs keep no checkpoints
        settings = json.loads((Path(history.whole.folder) / "settings.json").read_text())
        assert settings == history.whole.settings

    def test_progress_names_the_run_and_the_time_left(self, history: SimpleNamespace) -> None:
        assert history.said[0] == "ablate: run 1 of 4: recipe, seed 0"
        assert history.said[3] == "ablate: run 4 of 4: no-imitation, seed 1, about 1 min left"

    def test_finished_runs_are_not_repeated(self, workspace, history, monkeypatch):
        monkeypatch.setattr(verb, "distill", refuse)
        monkeypatch.setattr(verb, "evaluate_dev", refuse)
        assert run(workspace, history.folder, budget_minutes=0) == history.whole
        moved = small_recipe(workspace).model_copy(update={"data": (DataConfig(path="/elsewhere/tiny"),)})
        named = small_recipe(workspace).model_copy(update={"data": (DataConfig(path="here/tiny"),)})
        keys = {Path(run(workspace, history.folder, recipe=r, budget_minutes=0).folder).name for r in (moved, named)}
        assert len(keys) == 1  # the run folder does not depend on the data's location

    def test_every_run_is_measured_on_the_same_queries(self, workspace, history, monkeypatch):
        """With samples of three queries, because those that training draws itself differ by seed."""
        original, measured = verb.evaluate_dev, []

        def evaluate_dev(student: Any, dev_sets: Any, **options: Any) -> Any:
            measured.append(list(dev_sets))
            return original(student, dev_sets, **options)

        monkeypatch.setattr(verb, "distill", refuse)
        monkeypatch.setattr(verb, "evaluate_dev", evaluate_dev)
        report = run(workspace, history.folder, dev_queries=3)
        assert len(measured) == 4
        assert all(dev_sets == measured[0] for dev_sets in measured)
        assert [(entry.num_queries, entry.num_training_queries) for entry in report.sets] == [(3, 16)]
        monkeypatch.undo()
        assert run(workspace, history.folder).base.mean == history.whole.base.mean  # measured on all eight again
        training_samples = {
            tuple(distill_verb.make_dev_set(workspace.source, num_queries=3, num_passages=9, seed=s).queries)
            for s in (0, 1)
        }
        assert len(training_samples) == 2

    def test_lost_measurement_is_redone_without_training(self, workspace, history, monkeypatch):
        record = Path(history.whole.folder) / "no-imitation" / "seed-1.json"
        record.unlink()
        monkeypatch.setattr(verb, "distill", refuse)
        assert run(workspace, history.folder, budget_minutes=0) == history.whole
        assert record.is_file()

    def test_seconds_add_up_over_sessions(self, tmp_path: Path) -> None:
        lines = [json.dumps({"seconds": s}) for s in (1.0, 4.0, 0.5, 2.5)]  # 4 s, then a second session of 2.5 s
        (tmp_path / "log.jsonl").write_text("\n".join(lines))
        assert verb._seconds(tmp_path / "log.jsonl") == 6.5


class TestOrder:
    def test_all_variants_run_with_one_seed_before_the_next(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        recipe = small_recipe(workspace).model_copy(update={"seed": 5})
        report = run(workspace, tmp_path, recipe=recipe, variants=["cosine", "without-ci"], num_seeds=2)
        names = ["recipe", "cosine", "without-ci"]
        assert fake.runs == [(name, seed) for seed in (5, 6) for name in names]
        assert report.seeds == (5, 6)
        assert fake.recipes["without-ci"].losses.weight("contrastive_imitation") == 0

    def test_default_is_every_variant_that_changes_the_recipe(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        report = run(workspace, tmp_path, variants=None, num_seeds=1)
        unchanged = (
            *("dot-head", "rich", "warm-start", "one-stage"),
            *("no-gates", "without-li", "not-quiet", "without-words"),
        )
        assert report.same == dict.fromkeys(unchanged, "recipe")
        assert {name for name, _ in fake.runs} == {"recipe", *verb.VARIANTS} - set(report.same)
        assert [row.name for row in report.rows] == [name for name, _ in fake.runs[1:]]

    def test_default_leaves_out_what_the_recipe_cannot_have_and_says_why(self, workspace, fake_training, tmp_path):
        fake_training()
        recipe = (
            find_variant("cosine")
            .apply(small_recipe(workspace))
            .model_copy(update={"losses": Objective(JUDGEMENTS | {"list_imitation": 1.0})})
        )
        report = run(workspace, tmp_path, recipe=recipe, variants=None, num_seeds=1)
        left_out = [note for note in report.notes if note.startswith("left out: ")]
        assert left_out
        assert all(re.search(r"^left out: variant '[a-z0-9-]+': [a-z]", note) for note in left_out), left_out
        assert not any("got {" in note or "Value error" in note for note in left_out)
        named = {note.split("'")[1] for note in left_out}
        assert "subclass-imitation" in named
        assert {row.name for row in report.rows} | set(report.same) == set(verb.VARIANTS) - named

    def test_identical_variants_run_once(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        losses = Objective(JUDGEMENTS | {"contrastive_imitation": 1.0})
        recipe = small_recipe(workspace).model_copy(update={"losses": losses})
        report = run(
            workspace, tmp_path, recipe=recipe, variants=["without-ci", "without-fi", "no-imitation"], num_seeds=1
        )
        assert report.same == {"without-fi": "recipe", "no-imitation": "without-ci"}
        assert fake.runs == [("recipe", 0), ("without-ci", 0)]

    def test_no_run_starts_after_the_budget(self, workspace, fake_training, tmp_path, monkeypatch):
        clock = iter(range(0, 10_000, 40))  # seconds: at the start, then before and after each run
        monkeypatch.setattr(verb, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
        fake = fake_training()
        # Runs start at 40 and 120 seconds; at 200 seconds the three minutes are over.
        report = run(workspace, tmp_path, variants=["cosine", "paper"], num_seeds=1, budget_minutes=3)
        assert fake.runs == [("recipe", 0), ("cosine", 0)]
        assert report.missing == (("paper", 0),)
        assert report.rows[1].mean is None

    def test_failed_variant_is_reported_and_the_others_continue(self, workspace, fake_training, tmp_path):
        fake = fake_training({"recipe": (0.5, 0.5), "cosine": (0.4, 0.2)})
        fake.errors["cosine", 1] = TrainingDivergedError("no number")
        report = run(workspace, tmp_path, variants=["cosine"])
        assert [(f.variant, f.seed, f.reason) for f in report.failed] == [("cosine", 1, "no number")]
        assert (report.rows[0].mean, report.rows[0].interval) == (0.4, None)
        fake.errors["recipe", 0] = TrainingDivergedError("no number")
        with pytest.raises(TrainingDivergedError):
            run(workspace, tmp_path, variants=["cosine"])


class TestFigures:
    def test_figures_match_hand_calculation(self, workspace, fake_training, tmp_path):
        fake_training({"recipe": (0.50, 0.52, 0.54), "cosine": (0.49, 0.50, 0.54), "paper": (0.60, 0.50, 0.40)})
        report = run(workspace, tmp_path, variants=["cosine", "paper"], num_seeds=3)
        # t(2) = 4.30265; recipe: s = .02. Less recipe: cosine -.01, -.02, 0, s = .01; paper .1, -.02, -.14, s = .12.
        cosine, paper = report.rows
        assert_interval(report.base.interval, 0.52, 4.30265 * 0.02 / math.sqrt(3))
        assert report.base.difference is None
        assert report.base.differences == {}
        assert cosine.mean == pytest.approx(0.51)
        assert cosine.differences == pytest.approx({0: -0.01, 1: -0.02, 2: 0.0})
        assert cosine.difference == pytest.approx(-0.01)
        assert_interval(cosine.difference_interval, -0.01, 4.30265 * 0.01 / math.sqrt(3))
        assert_interval(paper.difference_interval, -0.02, 4.30265 * 0.12 / math.sqrt(3))
        assert report.best == "recipe"
        assert cosine.interaction_weights == {"asymmetric": 0.25}
        assert cosine.by_set == {"tiny": pytest.approx(0.51)}
        assert report.notes == ()

    def test_one_seed_gives_a_note_instead_of_an_interval(self, workspace, fake_training, tmp_path):
        fake_training({"recipe": (0.5,), "cosine": (0.75,)})
        report = run(workspace, tmp_path, variants=["cosine"], num_seeds=1)
        row = report.rows[0]
        assert (row.interval, row.difference, row.difference_interval) == (None, 0.25, None)
        assert report.best == "cosine"
        assert report.notes[0].startswith("one seed only")

    def test_warm_up_as_long_as_the_runs_is_noted(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        report = run(workspace, tmp_path, recipe=small_recipe(workspace, warmup_steps=8), epochs=2)  # 2 x 16 / 4
        assert len(report.notes) == 1
        assert "the warm-up of 8 steps is as long as the runs of at most 8 steps" in report.notes[0]
        assert fake.recipes["no-imitation"].training.epochs == 2
        assert run(workspace, tmp_path, recipe=small_recipe(workspace, warmup_steps=8), epochs=3).notes == ()


class TestData:
    def test_query_sample_depends_on_ids_and_is_shared_by_all_runs(self, workspace, fake_training, tmp_path):
        samples: list[set[str]] = []
        for size in (4, 9, 16, 99):
            fake = fake_training()
            run(workspace, tmp_path, max_queries=size)
            assert fake.queries("recipe") == fake.queries("no-imitation")
            samples += fake.queries()
            content = fake.sources["recipe"][0].plan.manifest["content_hash"]
            assert (content == workspace.source.plan.manifest["content_hash"]) == (size >= 16)
        assert [len(sample) for sample in samples] == [4, 9, 16, 16]
        assert samples[0] < samples[1] < samples[2]
        fake = fake_training()
        backwards = workspace.source.plan.entries[::-1]
        plan = type(workspace.source.plan)(backwards, workspace.source.plan.manifest)
        run(
            workspace,
            tmp_path,
            sources=[type(workspace.source)(workspace.source.dataset, plan, "asymmetric")],
            max_queries=9,
        )
        assert fake.queries() == [samples[1]]  # chosen by id, not by position
        labelled = [
            entry.query_id
            for entry in type(workspace.source)(workspace.source.dataset, plan, "asymmetric", 4).entries_to_label
        ]
        assert set(labelled) != samples[0]  # the queries for the teacher to label are another sample

    @pytest.mark.parametrize(
        ("unlabelled", "queries", "treatment"), [("leave_out", 3, "left out"), ("own_labels", 16, "own")]
    )
    def test_runs_without_a_teacher_use_the_recipes_queries(
        self, workspace, fake_training, tmp_path, unlabelled: str, queries: int, treatment: str
    ):
        write_rule_labels(tmp_path / "labels", [workspace.source], workspace.teacher, queries=["q00", "q01", "q02"])
        fake = fake_training()
        recipe = small_recipe(workspace, unlabelled=unlabelled)
        report = run(workspace, tmp_path, recipe=recipe, labels=tmp_path / "labels")
        assert [len(ids) for ids in fake.queries("no-imitation")] == [queries]
        assert report.settings["labelled_queries"] == [3]
        assert report.notes[0].startswith("tiny: 13 of 16 training queries lack the teacher's labels and are ")
        assert treatment in report.notes[0]

    def test_different_settings_get_separate_runs(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        more = topics(name="more", task="symmetric")
        write_rule_labels(tmp_path / "labels", [workspace.source, more], workspace.teacher)
        run(workspace, tmp_path)
        run(workspace, tmp_path, num_seeds=1, variants=["cosine"], dev_queries=2, budget_minutes=9)  # the same runs
        assert len(fake.folders) == 1
        run(workspace, tmp_path, epochs=3)
        run(workspace, tmp_path, max_queries=3)
        run(workspace, tmp_path, dtype="bfloat16")
        run(workspace, tmp_path, recipe=small_recipe(workspace, learning_rate=0.5))
        run(workspace, tmp_path, sources=[workspace.source, more], labels=tmp_path / "labels")
        assert len(fake.folders) == 6

    def test_recipe_without_imitation_needs_no_labels(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        recipe = small_recipe(workspace).model_copy(update={"losses": Objective(JUDGEMENTS)})
        report = run(workspace, tmp_path, recipe=recipe, labels=tmp_path / "none", variants=["cosine"])
        assert report.settings["teacher"] is None
        assert fake.queries() == [{entry.query_id for entry in workspace.source.plan.entries}]

    def test_a_closed_gate_needs_no_labels_and_gets_separate_runs(self, workspace, fake_training, tmp_path):
        fake = fake_training()
        assert run(workspace, tmp_path).settings["closed_gates"] == []
        report = run(workspace, tmp_path, labels=tmp_path / "none", closed_gates=["tiny", "another set"])
        assert (report.settings["closed_gates"], report.settings["labelled_queries"]) == (["tiny"], [16])
        assert report.notes == ()
        assert len(fake.folders) == 2
        assert fake.queries() == [{entry.query_id for entry in workspace.source.plan.entries}]

    def test_each_set_has_its_own_measure(self, workspace, fake_training, tmp_path):
        fake_training()
        rows = [LabelledPair(str(n), f"query {n}", f"passage {n}", None, float(n)) for n in range(6)]
        pairs = PairDataset("graded", Path("graded"), "scores", (), {"train": tuple(rows), "dev": tuple(rows)}, ())
        prepared = read_pair_training_set(pairs)
        plan = make_plan(plan_of_pairs(prepared, "train", seed=0))
        source = TrainingSource(prepared.dataset, plan, "symmetric", pairs=pairs)
        recipe = find_variant("no-imitation").apply(small_recipe(workspace))
        options: dict[str, Any] = {"recipe": recipe, "variants": [], "num_seeds": 1}
        report = run(workspace, tmp_path, sources=[workspace.source, source], **options)
        assert report.measure == "nDCG@10 and Spearman"
        assert [(entry.name, entry.measure, entry.num_queries) for entry in report.sets] == [
            ("tiny", "nDCG@10", 8),
            ("graded", "Spearman", 6),
        ]
        assert run(workspace, tmp_path, sources=[workspace.source], **options).measure == "nDCG@10"


class TestWrongInput:
    def test_missing_labels_are_rejected(self, workspace: Workspace, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there are no labels yet; run `d2llm label`"):
            run(workspace, tmp_path, labels=tmp_path / "none")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_variant_gets_a_suggestion(self, workspace: Workspace, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="did you mean 'without-ci'"):
            run(workspace, tmp_path, variants=["without-c1"])

    @pytest.mark.parametrize("option", ["num_seeds", "max_queries", "epochs", "dev_queries", "budget_minutes"])
    def test_out_of_range_numbers_are_rejected(self, workspace: Workspace, tmp_path: Path, option: str) -> None:
        value = -1 if option == "budget_minutes" else 0
        with pytest.raises(InputError, match=f"{option} is {value}, but must be at least {value + 1}"):
            run(workspace, tmp_path, **{option: value})


def assert_interval(interval: Interval | None, middle: float, half: float) -> None:
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((middle - half, middle + half), abs=1e-6)


@pytest.mark.slow
def test_labels_that_a_variant_asks_for_are_its_own(workspace: Workspace, tmp_path: Path) -> None:
    identity = identify_teacher(workspace.teacher)
    source = workspace.source
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    before = LabelStore.open_for_reading(workspace.labels, **key).num_pairs
    recipe = small_recipe(workspace, residual=ResidualConfig(epochs=1, warmup_steps=0, batch_queries=4, num_near=5))
    report = run(
        workspace, tmp_path, recipe=recipe, variants=["ask-teacher", "in-batch-labels", "leave-out"], num_seeds=1
    )
    assert {row.name for row in report.rows} == {"ask-teacher", "in-batch-labels", "leave-out"}
    assert not report.failed
    assert LabelStore.open_for_reading(workspace.labels, **key).num_pairs == before
    for name in ("ask-teacher", "in-batch-labels"):
        own = Path(report.folder, name, "seed-0.run", "labels")
        assert LabelStore.open_for_reading(own, **key).num_pairs > before
