"""``training.in_batch_labels``: the teacher scores all pairs of a batch before it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from d2llm.core.errors import InputError
from d2llm.data.collation import DistillationBatch, LabelledSource
from d2llm.models.teachers.ensemble import EnsembleMember, write_ensemble
from d2llm.models.teachers.pair_teacher import identify_teacher, load_teacher
from d2llm.ops.ensemble import Ensemble
from d2llm.recipe import LabellingConfig, TeacherConfig
from d2llm.recipe.losses import Objective
from d2llm.training import trainer, training_loop
from e2e.command_line import write_lines
from tiny_data import PUBLISHED, tiny_recipe, write_rule_labels
from tiny_distill import LEARNING, Workspace
from tiny_models import tiny_student_config


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("in-batch"))


def run(
    workspace: Workspace, folder: Path, patch: pytest.MonkeyPatch, *, in_batch_labels: bool = True, **options: Any
) -> list[DistillationBatch]:
    """Run on a copy of the labels, which an earlier run may have left; return the batches of the training."""
    if not (folder / "labels").exists():
        shutil.copytree(workspace.labels, folder / "labels")
    batches: list[DistillationBatch] = []
    collate = training_loop.collate

    def recorded(labelled: LabelledSource, draws: Any) -> DistillationBatch:
        batches.append(collate(labelled, draws))
        return batches[-1]

    with patch.context() as context:
        context.setattr(training_loop, "collate", recorded)
        workspace.run(
            folder / "student", labels=folder / "labels", in_batch_labels=in_batch_labels, patience=99, **options
        )
    return batches


def unlabelled(batch: DistillationBatch) -> int:
    return int(((batch.positive | batch.hard | batch.easy) & ~batch.labelled).sum())


def test_every_pair_of_a_batch_has_the_teachers_own_label(workspace, tmp_path, monkeypatch):
    assert sum(map(unlabelled, run(workspace, tmp_path / "without", monkeypatch, in_batch_labels=False))) > 0
    batches = run(workspace, tmp_path / "with", monkeypatch)
    assert len(batches) == 8
    assert sum(map(unlabelled, batches)) == 0
    before, after = workspace.store(workspace.labels), workspace.store(tmp_path / "with" / "labels")
    assert after.num_pairs > before.num_pairs
    teacher, source = load_teacher(workspace.teacher, device="cpu", dtype="float32"), workspace.source
    for entry in source.plan.entries:
        old, odds = before.log_odds(entry.query_id), after.log_odds(entry.query_id)
        assert old.items() <= odds.items()  # earlier labels are unchanged, and so are the cosines
        assert after.gram(entry.query_id)[0] == before.gram(entry.query_id)[0]
        new = [passage_id for passage_id in odds if passage_id not in old]
        texts = [(source.query_text(entry.query_id), source.passage_text(passage_id)) for passage_id in new]
        expected = teacher.score_pairs(texts, source.task).log_odds.tolist()
        assert [odds[passage_id] for passage_id in new] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for batch in batches:
        for row, query_id in enumerate(batch.query_ids):
            odds = after.log_odds(query_id)
            for column, passage_id in enumerate(batch.passage_ids):
                if batch.easy[row, column]:
                    assert batch.teacher_log_odds[row, column] == odds[passage_id]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(workspace, tmp_path, monkeypatch):
    run(workspace, tmp_path / "whole", monkeypatch)

    def stop(*arguments: Any, **options: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 6:  # of 8, in the second epoch
            raise KeyboardInterrupt
        return step(*arguments, **options)

    step, steps = trainer.optimizer_step, 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, tmp_path / "stopped", monkeypatch)
    labels = workspace.store(tmp_path / "stopped" / "labels").num_pairs
    with monkeypatch.context() as patch:
        patch.setattr("d2llm.training.label.load_teacher", refuse)  # all pairs of both epochs have labels by now
        run(workspace, tmp_path / "stopped", monkeypatch)
    assert workspace.store(tmp_path / "stopped" / "labels").num_pairs == labels
    for name in ("head.safetensors", "adapter_model.safetensors"):
        whole, resumed = (tmp_path / folder / "student" / name for folder in ("whole", "stopped"))
        assert whole.read_bytes() == resumed.read_bytes()


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("the teacher is loaded although it has nothing to judge")


def test_the_teacher_is_not_asked_behind_a_closed_gate(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.training.label.load_teacher", refuse)
    batches = run(workspace, tmp_path, monkeypatch, closed_gates=[workspace.source.dataset.name])
    assert not any(batch.labelled.any() for batch in batches)


def test_labels_for_mined_negatives_and_the_batch_come_together(workspace, tmp_path, monkeypatch):
    batches = run(workspace, tmp_path, monkeypatch, remine=True, unjudged="leave_out")
    assert sum(map(unlabelled, batches)) == 0


def test_a_limit_ends_the_run_and_the_next_goes_on(workspace, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_student_config(workspace.model), **LEARNING | {"in_batch_labels": True})
    limited = recipe.model_copy(update={"labelling": LabellingConfig(max_tokens=1)})
    monkeypatch.setattr("d2llm.evaluation.pool_scores._PAIRS_AT_ONCE", 8)  # looks at the limit after so many
    with pytest.raises(InputError, match=r"pairs that the teacher is to score .*labelling\.max_tokens = 1 was reached"):
        run(workspace, tmp_path, monkeypatch, recipe=limited)
    begun = workspace.store(tmp_path / "labels").num_pairs
    assert begun > workspace.store(workspace.labels).num_pairs
    batches = run(workspace, tmp_path, monkeypatch, recipe=recipe)
    assert sum(map(unlabelled, batches)) == 0
    assert workspace.store(tmp_path / "labels").num_pairs > begun


@pytest.mark.parametrize("is_ensemble", [False, True])
@pytest.mark.parametrize("setting", [{"in_batch_labels": True}, {"unjudged": "ask_teacher"}])
def test_a_listwise_teacher_cannot_add_to_its_lists(workspace, tmp_path, setting, is_ensemble):
    remote = {"url": "http://127.0.0.1:9/v1", "revision": "1"}
    teacher = TeacherConfig.model_validate({"model": "any", "kind": "listwise", "remote": remote})
    if is_ensemble:
        members = [EnsembleMember(each, identify_teacher(each).fingerprint) for each in (teacher, workspace.teacher)]
        combined = Ensemble((0.0, 0.0), (1.0, 1.0), (1.0, 1.0), 0.0)
        write_ensemble(tmp_path / "ensemble", members, {workspace.source.task: combined}, {})
        teacher = TeacherConfig(model=str(tmp_path / "ensemble"))
    recipe = tiny_recipe(
        tiny_student_config(workspace.model),
        losses=Objective(PUBLISHED | {"feature_imitation": 0.0}),
        **LEARNING | setting,
    )
    with pytest.raises(InputError, match="kind listwise only orders those that it sees together"):
        workspace.run(tmp_path / "student", recipe=recipe, teacher=teacher)


@pytest.mark.parametrize("is_ensemble", [False, True])
@pytest.mark.parametrize("setting", [{"in_batch_labels": True}, {"unjudged": "ask_teacher"}])
def test_what_was_not_recorded_needs_a_grade(workspace, tmp_path, setting, is_ensemble):
    """The lists have only one passage of each query, so training asks for pairs that nobody has recorded."""
    source = workspace.source
    lists = tmp_path / "lists.jsonl"
    graded = [
        {"query": source.query_text(entry.query_id), "passages": [source.passage_text(name)], "grades": [94]}
        for entry in source.plan.entries
        for name in entry.positives[:1]
    ]
    write_lines(lists, graded)

    def recorded(folder: Path, **unlisted: float) -> TeacherConfig:
        values = {"model": "large", "kind": "graded", "recorded": {"lists": str(lists), **unlisted}}
        teacher = TeacherConfig.model_validate(values)
        if not is_ensemble:
            return teacher
        members = [EnsembleMember(each, identify_teacher(each).fingerprint) for each in (teacher, workspace.teacher)]
        combined = Ensemble((0.0, 0.0), (1.0, 1.0), (1.0, 1.0), 0.0)
        write_ensemble(folder, members, {source.task: combined}, {})
        return TeacherConfig(model=str(folder))

    losses = Objective(PUBLISHED | {"feature_imitation": 0.0})
    training: dict[str, Any] = {**LEARNING, "epochs": 2, "remine": True, **setting}
    recipe = tiny_recipe(tiny_student_config(workspace.model), losses=losses, **training)
    teacher = recorded(tmp_path / "ensemble")
    write_rule_labels(tmp_path / "labels", [source], teacher)
    with pytest.raises(InputError, match=r"would count as log-odds 0.*set teacher\.recorded\.unlisted"):
        workspace.run(tmp_path / "student", recipe=recipe, labels=tmp_path / "labels", teacher=teacher)
    teacher = recorded(tmp_path / "other-ensemble", unlisted=10)
    write_rule_labels(tmp_path / "other-labels", [source], teacher)
    workspace.run(tmp_path / "other", recipe=recipe, labels=tmp_path / "other-labels", teacher=teacher)
