"""Teacher tuning on a tiny random model: it learns, resumes exactly, and stops when the loss is not a number."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.errors import InputError
from d2llm.data.plan import labelled_pairs
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.recipe import LoraConfig, TeacherConfig, TeacherTuningConfig
from d2llm.training import tune_teacher as module
from d2llm.training.tune_teacher import tune_teacher
from tiny_data import topics
from tiny_models import tiny_teacher_config

EVERY_STEP = 1e-9  # minutes between checkpoints


@pytest.fixture(scope="module")
def sources():
    return [topics(), topics(num_train=8, name="other", task="symmetric")]


def tune(llama, sources, folder, *, seed=0, **settings):
    tuning = TeacherTuningConfig.model_validate(
        {
            "lora": LoraConfig(rank=4, alpha=8.0, dropout=0.1),
            "learning_rate": 5e-3,
            "batch_pairs": 8,
            "checkpoint_minutes": EVERY_STEP,
            **settings,
        }
    )
    return tune_teacher(
        sources, folder, teacher=tiny_teacher_config(llama), tuning=tuning, seed=seed, device="cpu", dtype="float32"
    )


class Interrupted(Exception):
    pass


def fail_at(monkeypatch, step):
    """Raises ``Interrupted`` in the middle of the step; returns the list of calls."""
    original = module.accumulate
    calls = []

    def accumulate(model, batch, part_tokens, loss, **options):
        calls.append(batch)
        if len(calls) - 1 == step:
            raise Interrupted
        return original(model, batch, part_tokens, loss, **options)

    monkeypatch.setattr(module, "accumulate", accumulate)
    return calls


def log_losses(folder):
    lines = folder.with_name(folder.name + ".run").joinpath("log.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"], record["pairs"]) for record in map(json.loads, lines)]


def test_tuning_separates_positives_from_negatives(tmp_path, llama, sources):
    report = tune(llama, sources, tmp_path / "teacher", epochs=6)
    pairs = labelled_pairs(sources, num_negatives=4, max_queries=None, seed=0)
    assert report.pairs == 6 * len(pairs)
    # each batch holds a single task
    by_task = [sum(pair.task == task for pair in pairs) for task in ("symmetric", "asymmetric")]
    assert report.steps == 6 * sum(-(-count // 8) for count in by_task)
    losses = [loss for _, loss, _ in log_losses(tmp_path / "teacher")]
    assert len(losses) == report.steps
    assert report.loss == pytest.approx(np.mean(losses[-(report.steps // 10) :]))
    assert report.loss < 0.75 * np.mean(losses[:3])

    tuned = CausalTeacher.load(TeacherConfig(model=str(tmp_path / "teacher")), device="cpu", dtype="float32")
    assert tuned.fingerprint == report.fingerprint
    asymmetric = [pair for pair in pairs if pair.task == "asymmetric"]
    log_odds = tuned.score_pairs([(pair.query, pair.passage) for pair in asymmetric], "asymmetric").log_odds
    is_positive = np.array([pair.is_positive for pair in asymmetric])
    untuned = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
    before = untuned.score_pairs([(pair.query, pair.passage) for pair in asymmetric], "asymmetric").log_odds

    def separation(values):
        return values[is_positive].mean() - values[~is_positive].mean()

    assert separation(log_odds) > max(0.5, 2 * separation(before))
    manifest = json.loads((tmp_path / "teacher" / "manifest.json").read_text())
    assert manifest["data"] == ["tiny", "other"]
    assert manifest["report"]["steps"] == report.steps


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, llama, sources, monkeypatch):
    whole = tune(llama, sources, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 5)
        with pytest.raises(Interrupted):
            tune(llama, sources, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    with monkeypatch.context() as patch:
        calls = fail_at(patch, -1)
        resumed = tune(llama, sources, tmp_path / "resumed")
    assert len(calls) == whole.steps - 5  # no step is repeated
    assert (resumed.fingerprint, resumed.loss, resumed.pairs) == (whole.fingerprint, whole.loss, whole.pairs)
    assert log_losses(tmp_path / "resumed") == log_losses(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "resumed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_teacher_must_be_removed_to_tune_again(tmp_path, llama, sources):
    first = tune(llama, sources, tmp_path / "teacher", max_queries=4)
    with pytest.raises(InputError, match="already holds a finished teacher"):
        tune(llama, sources, tmp_path / "teacher", max_queries=4)
    for path in (tmp_path / "teacher").iterdir():
        path.unlink()
    second = tune(llama, sources, tmp_path / "teacher", max_queries=4, seed=1)  # the old checkpoint does not interfere
    assert second.fingerprint != first.fingerprint


def test_unusable_folders_and_data_are_refused_before_tuning(tmp_path, llama, sources, monkeypatch):
    calls = fail_at(monkeypatch, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    (tmp_path / "file").write_text("...")
    for name, reason in (("mine", "holds files that d2llm did not make"), ("file", "is a file")):
        with pytest.raises(InputError, match=f"{name}: {reason}"):
            tune(llama, sources, tmp_path / name)
    with pytest.raises(InputError, match="nothing to tune the teacher on; mine a plan first"):
        tune(llama, [], tmp_path / "teacher")
    assert calls == []


def test_tuning_a_tuned_teacher_starts_from_it(tmp_path, llama, sources):
    first = tune(llama, sources[:1], tmp_path / "first")
    second = tune_teacher(
        sources[1:],
        tmp_path / "second",
        teacher=TeacherConfig(model=str(tmp_path / "first"), prompt="short", max_tokens=128),
        tuning=TeacherTuningConfig(lora=LoraConfig(rank=2), batch_pairs=8, learning_rate=1e-9),
        device="cpu",
        dtype="float32",
    )
    pairs = [("the cat", "a dog"), ("rain falls", "the old house")]
    judged = [
        CausalTeacher.load(TeacherConfig(model=report.folder), device="cpu", dtype="float32")
        .score_pairs(pairs, "asymmetric")
        .log_odds
        for report in (first, second)
    ]
    np.testing.assert_allclose(judged[1], judged[0], rtol=0, atol=1e-4)  # the second tuning changed next to nothing
    untuned = (
        CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
        .score_pairs(pairs, "asymmetric")
        .log_odds
    )
    assert np.abs(untuned - judged[0]).max() > 0.05
