"""Tuning a teacher: held-out queries, early stopping, full tuning, classifiers, dropout, and list losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from d2llm.core.errors import InputError
from d2llm.core.types import Task
from d2llm.data.plan import TrainingPair
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.pair_teacher import TeacherScores, identify_teacher, load_teacher
from d2llm.recipe import LoraConfig, TeacherConfig, TeacherTuningConfig
from d2llm.training import tune_teacher as verb
from d2llm.training.tune_teacher import DevScore, hold_out, score_dev
from tiny_data import topics
from tiny_models import TEXTS, tiny_teacher_config, tiny_tokenizer, write_tiny_model

PAIRS = [(query, passage) for query in ("the cat", "a dog runs") for passage in TEXTS[:3]]
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1)
LISTS = TeacherTuningConfig(loss="lists")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1)


def tune(teacher: TeacherConfig, folder: Path, **settings: object) -> verb.TeacherTuningReport:
    values = {"lora": LORA, "learning_rate": 5e-3, "batch_pairs": 8, "checkpoint_minutes": 1e-9, "num_negatives": 2}
    tuning = TeacherTuningConfig.model_validate(values | settings)
    source = topics(num_train=20)
    return verb.tune_teacher([source], folder, teacher=teacher, tuning=tuning, device="cpu", dtype="float32")


def log(folder: Path) -> list[dict[str, Any]]:
    lines = folder.with_name(folder.name + ".run").joinpath("log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def set_dev_losses(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Makes successive evaluations on the held-out pairs return these cross-entropies."""
    remaining = iter(values)
    monkeypatch.setattr(verb, "score_dev", lambda *_: DevScore(next(remaining), 0.5))


# --- held-out queries


def test_held_out_queries_and_their_positives_stay_out_of_training() -> None:
    source = topics(num_train=40, num_passages=64)
    tuning = TeacherTuningConfig(eval_every=1, dev_queries=3)
    (kept,), pairs = hold_out([source], tuning, seed=1)
    held_out = {pair.query for pair in pairs}
    assert len(held_out) == 3
    remaining = {source.query_text(entry.query_id) for entry in kept.plan.entries}
    assert held_out.isdisjoint(remaining)
    positives = {pair.passage for pair in pairs if pair.is_positive}
    trained = {source.passage_text(p) for entry in kept.plan.entries for p in entry.positives}
    assert positives
    assert positives.isdisjoint(trained)
    assert hold_out([source], tuning, seed=1)[1] == pairs
    assert {pair.query for pair in hold_out([source], tuning, seed=2)[1]} != held_out
    # MRR takes all of the plan's negatives, cross-entropy as many as training does
    lists = hold_out([source], tuning.model_copy(update={"dev_measure": "mrr"}), seed=1)[1]
    assert len(lists) > len(pairs)
    with pytest.raises(InputError, match="too small to hold queries out"):
        hold_out([topics(num_train=4)], tuning, seed=1)


class Parrot:
    """Looks log-odds up by passage."""

    fingerprint = "parrot"

    def __init__(self, log_odds: dict[str, float]) -> None:
        self._said = log_odds

    def prompt_fingerprint(self, task: Task) -> str:
        return task

    def score_pairs(self, pairs: Any, task: Task, **options: object) -> TeacherScores:
        del task, options
        return TeacherScores(np.array([self._said[p] for _, p in pairs], dtype=np.float32), None, 0, 0)


def test_dev_scores_match_hand_calculation() -> None:
    log_odds = {"a": 2.0, "b": 1.0, "c": 2.0, "d": -1.0}
    pairs = [
        TrainingPair("q1", "a", "asymmetric", 1.0),  # rank 1
        TrainingPair("q2", "a", "symmetric", 0.0),
        TrainingPair("q1", "b", "asymmetric", 0.0),
        TrainingPair("q2", "c", "symmetric", 1.0),  # ties with a, counts as behind it
        TrainingPair("q3", "d", "symmetric", 0.0),  # a list without a positive
    ]
    score = score_dev(Parrot(log_odds), pairs)
    losses = [
        np.log1p(np.exp(-2)),
        np.log1p(np.exp(2)),
        np.log1p(np.exp(1)),
        np.log1p(np.exp(-2)),
        np.log1p(np.exp(-1)),
    ]
    assert score.cross_entropy == pytest.approx(np.mean(losses), rel=1e-6)
    assert score.mrr == pytest.approx((1 + 1 / 2) / 2)


def test_the_held_out_pairs_stop_a_run_early(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher_config(llama)
    set_dev_losses(monkeypatch, [0.9, 0.5, 0.6, 0.5, 0.1])
    report = tune(teacher, tmp_path / "stopped", eval_every=1, patience=2, epochs=3)
    assert (report.steps, report.best_step, report.dev) == (4, 2, 0.5)
    measured = [line["dev_cross_entropy"] for line in log(tmp_path / "stopped") if "dev_mrr" in line]
    assert measured == [0.9, 0.5, 0.6, 0.5]
    assert not (tmp_path / "stopped.run" / "best.safetensors").exists()


# --- full tuning, and classifiers


def test_full_tuning_saves_a_complete_model(tmp_path: Path, llama: Path) -> None:
    teacher = tiny_teacher_config(llama)
    report = tune(teacher, tmp_path / "full", tuning="full", learning_rate=1e-3)
    config = TeacherConfig(model=str(tmp_path / "full"))
    tuned = load_teacher(config, device="cpu", dtype="float32")
    assert tuned.fingerprint == report.fingerprint == identify_teacher(config).fingerprint
    assert identify_teacher(config).prompts["symmetric"] == tuned.prompt_fingerprint("symmetric")
    before = load_teacher(teacher, device="cpu", dtype="float32").score_pairs(PAIRS, "asymmetric").log_odds
    after = tuned.score_pairs(PAIRS, "asymmetric").log_odds
    assert np.abs(after - before).max() > 0.01
    # plain transformers can load it
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert isinstance(tuned, CausalTeacher)
    ids = tuned.tokenize(PAIRS[:1], "asymmetric")[0][0]
    yes, no = tuned._answer_ids["asymmetric"]
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([ids])).logits[0, -1]
    assert float(logits[yes] - logits[no]) == pytest.approx(float(after[0]), abs=1e-4)
    # and an adapter can be added to it
    (tmp_path / "adapter").mkdir()
    adapted = CausalTeacher.load(config, device="cpu", dtype="float32")
    adapted.prepare_training(LORA)
    adapted.save(tmp_path / "adapter", {})
    reloaded = load_teacher(TeacherConfig(model=str(tmp_path / "adapter")), device="cpu", dtype="float32")
    np.testing.assert_allclose(reloaded.score_pairs(PAIRS, "asymmetric").log_odds, after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_classifier_learns(tmp_path: Path, tuning: str) -> None:
    settings = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**settings, intermediate_size=48, num_labels=1, initializer_range=0.2)
        )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(is_decoder=False).save_pretrained(tmp_path / "model")
    teacher = TeacherConfig(model=str(tmp_path / "model"), max_tokens=128)
    report = tune(
        teacher, tmp_path / "tuned", tuning=tuning, epochs=6, learning_rate=1e-2 if tuning == "lora" else 5e-3
    )
    losses = [line["loss"] for line in log(tmp_path / "tuned") if "loss" in line]
    assert report.loss < 0.9 * np.mean(losses[:3])
    tuned = load_teacher(TeacherConfig(model=str(tmp_path / "tuned")), device="cpu", dtype="float32")
    assert tuned.fingerprint == report.fingerprint
    before = load_teacher(teacher, device="cpu", dtype="float32").score_pairs(PAIRS, "asymmetric").log_odds
    assert np.abs(tuned.score_pairs(PAIRS, "asymmetric").log_odds - before).max() > 0.05


def test_a_teacher_without_local_weights_is_rejected(tmp_path: Path) -> None:
    for kind in ("graded", "cosine"):
        with pytest.raises(InputError, match="'far-away' has no local weights to tune; skip tune-teacher"):
            tune(TeacherConfig(model="far-away", kind=kind), tmp_path / "tuned")


def test_frozen_layers_run_without_dropout(tmp_path: Path) -> None:
    """As when the teacher labels; only the adapters' own dropout is active in training."""
    folder = write_tiny_model(tmp_path, "phi", attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    teacher = CausalTeacher.load(tiny_teacher_config(folder), device="cpu", dtype="float32")
    teacher.prepare_training(LoraConfig(rank=2, dropout=0.0))
    inputs = teacher.pad(teacher.tokenize(PAIRS, "asymmetric")[0])
    teacher.train()
    assert teacher.training
    with torch.no_grad():
        first, second = (teacher(*inputs, "asymmetric")[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    whole = CausalTeacher.load(tiny_teacher_config(folder), device="cpu", dtype="float32")
    whole.prepare_training(LORA, tuning="full")
    whole.train()
    with torch.no_grad():
        first, second = (whole(*inputs, "asymmetric")[0] for _ in range(2))
    assert (first - second).abs().max() > 1e-3


# --- a new head, and lists


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def test_an_encoder_gets_a_head_by_tuning(encoder: Path, tmp_path: Path) -> None:
    teacher = TeacherConfig(model=str(encoder), kind="classifier", new_head=True, max_tokens=64)
    with pytest.raises(InputError, match="must be tuned before use; run tune-teacher"):
        load_teacher(teacher, device="cpu", dtype="float32")
    with pytest.raises(InputError, match=r"tuned with all weights; set teacher_tuning.tuning = 'full'"):
        tune(teacher, tmp_path / "refused")
    report = tune(teacher, tmp_path / "tuned", tuning="full", loss="lists", learning_rate=3e-3, epochs=6)
    losses = [line["loss"] for line in log(tmp_path / "tuned") if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    tuned = load_teacher(TeacherConfig(model=str(tmp_path / "tuned")), device="cpu", dtype="float32")
    assert tuned.fingerprint == report.fingerprint
    assert np.isfinite(tuned.score_pairs(PAIRS, "asymmetric").log_odds).all()
    own = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert own.config.num_labels == 1
    again = tune(teacher, tmp_path / "again", tuning="full", loss="lists", learning_rate=3e-3, epochs=6)
    assert again.fingerprint == report.fingerprint  # the new head is initialised the same way


def test_list_loss_is_softmax_plus_a_share_of_the_yes_no_loss(llama: Path) -> None:
    model = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
    model.prepare_training(LORA)
    model.eval()
    pairs = [
        TrainingPair("the cat", TEXTS[0], "symmetric", 1.0),
        TrainingPair("the cat", TEXTS[1], "symmetric", 0.0),
        TrainingPair("the cat", TEXTS[2], "symmetric", 0.0),
        TrainingPair("a dog runs", TEXTS[3], "symmetric", 0.0),
        TrainingPair("a dog runs", TEXTS[4], "symmetric", 1.0),
    ]
    loss, _ = verb.accumulate(model, pairs, 512, LISTS)
    odds = model.score_pairs([(pair.query, pair.passage) for pair in pairs], "symmetric").log_odds.astype(float)
    softmax = [odds[0] - np.logaddexp.reduce(odds[:3]), odds[4] - np.logaddexp.reduce(odds[3:])]
    signs = np.array([1, -1, -1, -1, 1])
    expected = -np.mean(softmax) + 0.3 * np.logaddexp(0, -signs * odds).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    model.zero_grad()
    alone, _ = verb.accumulate(model, pairs, 512, LISTS.model_copy(update={"pair_weight": 0.0}))  # RankT5
    assert float(alone) == pytest.approx(-np.mean(softmax), rel=1e-4)
    model.zero_grad()
    verb.accumulate(model, pairs, 512, LISTS)
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert whole
    model.zero_grad()
    # In any order, one list at a time, and with lists longer than a part may be.
    for order, part_tokens in ((-1, 512), (1, 64), (1, 1)):
        model.zero_grad()
        part_loss, _ = verb.accumulate(model, pairs[::order], part_tokens, LISTS)
        assert float(part_loss) == pytest.approx(expected, rel=1e-4)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-6)


def gradients_of(model: CausalTeacher) -> dict[str, list[float]]:
    """The gradients by parameter, which are then set to none."""
    gradients = {name: p.grad.flatten().tolist() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def test_both_passes_over_a_long_list_share_their_dropout(llama: Path) -> None:
    model = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
    model.prepare_training(LORA.model_copy(update={"dropout": 0.4}))
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    pairs = [TrainingPair("the cat", text, "symmetric", float(index == 0)) for index, text in enumerate(TEXTS[:3])]
    outputs: list[torch.Tensor] = []
    original = type(model).forward

    def forward(self: CausalTeacher, *arguments: Any) -> Any:
        log_odds, features = original(self, *arguments)
        outputs.append(log_odds.detach())
        return log_odds, features

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        verb.accumulate(model, pairs, 1, LISTS)
        assert [float(odds) for odds in outputs[1:3]] == [float(odds) for odds in outputs[3:]]  # the first one is kept
        recomputed = gradients_of(model)
        torch.manual_seed(0)
        verb.accumulate(model, pairs, 1, LISTS, room=math.inf)
        assert len(outputs) == 5 + 3  # all are kept
    assert gradients_of(model) == recomputed
    model.eval()
    without = {
        float(odds) for pair in pairs for odds in model.score_pairs([(pair.query, pair.passage)], "symmetric").log_odds
    }
    assert without.isdisjoint({float(odds) for odds in outputs})  # dropout was active


# --- large teachers


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path, llama: Path) -> None:
    plain, checkpointed = (
        tune(tiny_teacher_config(llama), tmp_path / f"{on}", gradient_checkpointing=on) for on in (False, True)
    )
    assert checkpointed.loss == pytest.approx(plain.loss, rel=1e-4)
    states = [load_file(tmp_path / f"{on}" / "adapter.safetensors") for on in (False, True)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", [8, 4])
def test_adapters_are_tuned_on_quantised_weights(tmp_path: Path, llama: Path, number: int) -> None:
    """QLoRA: the loss falls, and the tuned teacher scores on the same quantised weights."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'd2llm[large]'")
    settings = {"quantization": f"{number}bit", "gradient_checkpointing": True, "epochs": 6, "learning_rate": 0.02}
    teacher = tiny_teacher_config(llama)
    report = tune(teacher, tmp_path / "tuned", eval_every=5, **settings)
    losses = [line["loss"] for line in log(tmp_path / "tuned") if "loss" in line]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    config = TeacherConfig(model=str(tmp_path / "tuned"))
    assert identify_teacher(config).fingerprint == report.fingerprint
    tuned = load_teacher(config, device="cpu", dtype="float32")
    assert isinstance(tuned, CausalTeacher)
    assert tuned.quantization == f"{number}bit"
    on_full_weights = identify_teacher(config.model_copy(update={"quantization": "none"}))
    assert on_full_weights.fingerprint not in (report.fingerprint, identify_teacher(teacher).fingerprint)


def test_a_teacher_that_vllm_runs_is_tuned_without_it(tmp_path: Path, llama: Path) -> None:
    report = tune(tiny_teacher_config(llama, kind="vllm"), tmp_path / "vllm")
    expected = tune(tiny_teacher_config(llama), tmp_path / "causal")
    assert report.fingerprint == expected.fingerprint
    scored_by_vllm = TeacherConfig(model=str(tmp_path / "vllm"), kind="vllm")
    assert identify_teacher(scored_by_vllm).fingerprint == report.fingerprint
