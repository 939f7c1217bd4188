"""Pretraining on texts without labels: its losses by hand, what it changes, what it refuses, and how it is resumed."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from d2llm.core.errors import InputError, ModelError
from d2llm.data.plan import PlanEntry
from d2llm.methods.pretraining._imitation import ImitationTask, _readings, fit_linear
from d2llm.methods.pretraining.hidden_states import state_distance
from d2llm.methods.pretraining.masked_next_token import mask_tokens, masked_next_token_loss
from d2llm.methods.pretraining.mirror import mask_span
from d2llm.methods.pretraining.mutual_information import mutual_information
from d2llm.methods.pretraining.relations import relation_divergence
from d2llm.methods.pretraining.simcse import contrastive_loss
from d2llm.methods.pretraining.vectors import vector_distance
from d2llm.methods.pretraining.words import word_loss
from d2llm.models.backbone import Backbone
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Frozen, Lora, Pretraining, StudentConfig
from d2llm.recipe.losses import Objective
from d2llm.training import pretrain, trainer
from d2llm.training.pretrain import PretrainingReport, pretrain_backbone, set_dropout, unlabelled_texts
from tiny_data import JUDGEMENTS, make_source, tiny_recipe, topics
from tiny_distill import Workspace
from tiny_models import TEXTS, tiny_student_config, tiny_tokenizer, word_tokenizer, write_tiny_model

PASSAGES = [f"{one} {other}" for one in TEXTS for other in TEXTS if one != other]
TAUGHT = {"relations": {"relation_heads": 4}, "hidden_states": {}, "mutual_information": {}, "vectors": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with three layers and with dropout, as BERT has it."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert", num_hidden_layers=3)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider BERT whose tokenizer cuts texts into other tokens."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "stranger", "bert", hidden_size=64, seed=1)
    word_tokenizer().save_pretrained(folder)
    return folder


def new_student(model: Path, **backbone: Any) -> Student:
    return Student.create(tiny_student_config(model, **backbone), device="cpu", dtype="float32")


def config(kind: str, **settings: Any) -> Any:
    return Pretraining.of({"kind": kind, "batch_texts": 8} | settings)


def learnt(report: PretrainingReport, objective: str) -> bool:
    """By more than batches differ: over seeds, distances end at .1 to .77 of the start, the bound .37 to .57 lower."""
    if objective == "mutual_information":  # a bound on it, negated: no ratio
        return report.last_loss < report.first_loss - 0.2
    return report.last_loss < 0.9 * report.first_loss


def loss_of(run: pretrain._Pretraining) -> float:
    """The loss of all texts, as one batch."""
    with torch.no_grad():
        return sum(float(part) for part in run.task.losses(run.texts, random.Random(0)))


# Losses, in numpy --------------------------------------------------------------------------------------------------


def softmax(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def test_contrastive_loss_is_the_cross_entropy_of_cosines() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 5, 4))
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second))
    expected = -np.log(softmax(one @ other.T / 0.2).diagonal()).mean()
    loss = contrastive_loss(torch.tensor(first), torch.tensor(second), temperature=0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_relation_divergence_text_by_text() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 5, 6)), rng.normal(size=(2, 2, 5, 12))  # queries and keys of two texts
    lengths, heads, expected = (5, 3), 3, []
    for text, length in enumerate(lengths):
        divergences = []
        for head in range(heads):
            predicted, target = (
                softmax(queries[:, head] @ keys[:, head].T / np.sqrt(queries.shape[2]))
                for queries, keys in (
                    vectors[:, text, :length].reshape(2, length, heads, -1) for vectors in (student, teacher)
                )
            )
            divergences.append((target * np.log(target / predicted)).sum(axis=1).mean())
        expected.append(np.mean(divergences))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    values = relation_divergence((*torch.tensor(student),), (*torch.tensor(teacher),), mask, heads=heads)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)


def test_version_1_compares_the_attention_itself(model: Path) -> None:
    student = new_student(model, layers=1)
    teacher = Backbone.load(BackboneConfig(model=str(model)), device="cpu", dtype="float32")
    for backbone in (student.backbone, teacher):
        backbone.model.set_attn_implementation("eager")  # the fused one does not give its weights
    task = config("relations", version=1).task(student.backbone, 0)
    task.teacher = teacher
    task.build()
    hooks = task.hooks()
    ids, mask = student.backbone.pad(student.backbone.tokenize(PASSAGES[:2], "passage").ids)
    with torch.no_grad():
        outputs = [
            backbone.model(ids, attention_mask=mask.long(), output_attentions=True)
            for backbone in (student.backbone, teacher)
        ]
        task.pairs = ((0, 1),)  # without the values
        found = task.differences(mask, mask, mask, mask)
    for hook in hooks:
        hook.remove()
    predicted, target = (output.attentions[-1].double() for output in outputs)
    divergence = (target * (target.clamp(min=1e-30) / predicted.clamp(min=1e-30)).log()).sum(-1).mean(1)
    torch.testing.assert_close(found.double(), (divergence * mask).sum(1) / mask.sum(1), rtol=1e-3, atol=1e-6)


def test_distances_of_states_and_vectors() -> None:
    student = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    # (0 + 4) / 2 and (9 + 16) / 2, padding left out
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    assert state_distance(student, teacher, mask).tolist() == pytest.approx([(2 + 12.5) / 2])
    values = vector_distance(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert values.tolist() == pytest.approx([0.4, 2.0])


def test_a_span_is_masked_between_the_first_and_the_last_token() -> None:
    ids = [1, 10, 11, 12, 13, 2]
    masked = {tuple(mask_span(ids, 2, 99, random.Random(seed))) for seed in range(50)}
    assert masked == {(1, 99, 12, 13, 2), (1, 10, 99, 13, 2), (1, 10, 11, 99, 2)}
    assert mask_span([1, 10, 11, 2], 5, 99, random.Random(0)) in ([1, 99, 11, 2], [1, 10, 99, 2])
    assert mask_span([1, 10, 2], 5, 99, random.Random(0)) == [1, 10, 2]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mutual_information_by_the_formula(alpha: float) -> None:
    scores = np.random.default_rng(0).normal(size=(4, 4))
    first, second = [], []
    for j in range(4):
        weights = np.exp(scores[:, j])
        first.append(np.log(weights[j] / (alpha * weights.mean() + 1 - alpha)))
        others = np.delete(weights, j).mean()
        second.append(others / (alpha * others + 1 - alpha))
    expected = 1 + np.mean(first) - np.mean(second)
    assert float(mutual_information(torch.tensor(scores), alpha=alpha)) == pytest.approx(expected, rel=1e-5)
    assert float(mutual_information(torch.zeros(1, 1), alpha=alpha)) == 0  # one token tells nothing


def test_mutual_information_of_states_that_are_told_apart_is_nearly_the_most() -> None:
    """InfoNCE is at most log n; a lower alpha may exceed it. The mutual information of the critic is unbounded."""
    told_apart = 50.0 * torch.eye(8)
    assert float(mutual_information(told_apart, alpha=1.0)) == pytest.approx(np.log(8), rel=1e-5)
    assert float(mutual_information(told_apart, alpha=0.9)) == pytest.approx(1 + np.log(8 / 0.9) - 1, rel=1e-5)


def test_word_loss_counts_each_word_once() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5))
    logs = np.log(softmax(logits))
    values = word_loss(torch.tensor(logits), [[4, 1, 4], [2], []])
    np.testing.assert_allclose(values.numpy(), [-(logs[0, 1] + logs[0, 4]) / 2, -logs[1, 2], 0.0], rtol=1e-5)


def test_masks_have_places_and_leave_the_first_token() -> None:
    ids = [5, 6, 7, 8, 9, 10]
    seen: set[int] = set()
    for seed in range(40):
        masked, positions = mask_tokens(ids, 0.4, 99, random.Random(seed))
        assert len(positions) == 2
        assert [n for n, one in enumerate(masked) if one == 99] == positions
        assert [one for n, one in enumerate(masked) if n not in positions] == [
            ids[n] for n in range(6) if n not in positions
        ]
        seen |= {*positions}
    assert seen == {1, 2, 3, 4, 5}
    assert mask_tokens([5, 6], 0.01, 99, random.Random(0)) == ([5, 99], [1])
    assert mask_tokens([5], 0.5, 99, random.Random(0)) == ([5], [])


def test_masked_tokens_are_read_at_the_state_before() -> None:
    rng = np.random.default_rng(0)
    states, weight = rng.normal(size=(3, 4, 6)), rng.normal(size=(6, 9))
    ids, positions = [[1, 2, 3, 4], [5, 6, 7], [8]], [[1, 3], [2], []]
    expected = [
        np.mean([-np.log(softmax(states[row, index - 1] @ weight))[ids[row][index]] for index in each]) if each else 0.0
        for row, each in enumerate(positions)
    ]
    head = torch.tensor(weight)
    values = masked_next_token_loss(torch.tensor(states), ids, positions, lambda before: before @ head)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)


# Training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", TAUGHT)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_cut_backbone_comes_nearer_to_the_whole_one(model: Path, objective: str, tuning: str, tmp_path: Path) -> None:
    student, whole = new_student(model, tuning=tuning, layers=(0, 2)), new_student(model)
    teacher = whole.encode_passages(TEXTS).vectors

    def distance() -> float:
        vectors = student.encode_passages(TEXTS).vectors
        return float(np.mean([1 - a @ b / 32 for a, b in zip(vectors, teacher, strict=True)]))

    before = distance()
    settings = config(objective, epochs=4, **TAUGHT[objective])
    report = pretrain_backbone(student, PASSAGES, tmp_path / "run", settings)
    assert report.texts == len(PASSAGES)
    assert report.steps == 4 * len(PASSAGES) // 8
    if objective == "mutual_information":  # the loss is minus the information
        assert report.last_loss < report.first_loss - 0.2
    else:
        assert report.last_loss < 0.8 * report.first_loss
    if objective in ("hidden_states", "vectors"):  # the others say less about vectors than they themselves
        assert distance() < 0.8 * before
    assert not student.backbone.model.training


@pytest.mark.parametrize("objective", ["simcse", "mirror"])
def test_texts_are_recognised_better(model: Path, objective: str, tmp_path: Path) -> None:
    student = new_student(model, tuning="full")
    student.backbone.tokenizer.mask_token = "<unk>"
    report = pretrain_backbone(student, PASSAGES, tmp_path / "run", config(objective, epochs=4, dropout=0.3))
    assert report.last_loss < 0.9 * report.first_loss
    rates = {module.p for module in student.backbone.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.1}  # as before


@pytest.mark.parametrize("architecture", ["bert", "gemma2"])
def test_vectors_learn_to_say_which_words_a_text_has(architecture: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", architecture)
    student = new_student(folder, tuning="full")
    longer = [f"{one}. So {other}. And {one}." for one, other in pairwise(TEXTS)]
    settings = config("words", epochs=4, learning_rate=5e-3)
    run = pretrain._Pretraining(student, [*TEXTS, *longer], [], tmp_path / "run", settings, 0)
    assert len(run.texts) == len(TEXTS) + 2 * len(longer)  # three sentences are cut before the second or the third
    before = loss_of(run)
    run.train()
    assert loss_of(run) < 0.95 * before
    assert not any("projection" in name for name, _ in student.named_parameters())


def test_what_follows_is_the_second_part_of_a_passage(model: Path, tmp_path: Path) -> None:
    student = new_student(model)
    passages = [TEXTS[0], f"{TEXTS[1]}. So {TEXTS[2]}."]
    run = pretrain._Pretraining(student, passages, [], tmp_path / "run", config("words"), 0)
    one, first, second = student.backbone.tokenize([TEXTS[0], f"{TEXTS[1]}.", f"So {TEXTS[2]}."], "passage").ids
    assert run.texts == [one, first, second]
    assert run.task.record(run.texts) == {"following": [[], second, []]}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_decoder_learns_to_read_both_ways(tuning: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "llama", "llama")
    student = new_student(folder, tuning=tuning, bidirectional=True)
    settings = config("masked_next_token", epochs=6, masked_fraction=0.3, learning_rate=1e-2)
    report = pretrain_backbone(student, PASSAGES[:16], tmp_path / "run", settings)
    assert report.last_loss < 0.96 * report.first_loss
    student.save(tmp_path / "student")
    read = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert read.config.backbone.bidirectional
    for text in TEXTS[:2]:  # one text alone has no padding, so fused attention gets no mask
        one, other = (each.encode_passages([text]).vectors for each in (student, read))
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_wider_teacher_is_projected_to(model: Path, tmp_path: Path) -> None:
    wide = write_tiny_model(tmp_path / "wide", "bert", hidden_size=64, seed=1)
    for objective in ("hidden_states", "mutual_information", "vectors"):
        student = new_student(model, tuning="full")
        settings = config(objective, epochs=12, teacher=str(wide), learning_rate=1e-3)
        report = pretrain_backbone(student, PASSAGES, tmp_path / objective, settings)
        assert learnt(report, objective)
        assert not any("projection" in name for name, _ in student.named_parameters())


@pytest.mark.parametrize("objective", ["hidden_states", "mutual_information", "vectors"])
def test_a_strange_teacher_is_first_predicted_by_least_squares(model, stranger, objective: str, tmp_path, caplog):
    settings = config(objective, teacher=str(stranger), max_tokens=16)
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        run = pretrain._Pretraining(new_student(model, tuning="full"), PASSAGES, [], tmp_path / "run", settings, 0)
    explained = float(re.findall(r"explains (\d\.\d\d) of the teacher's variance", caplog.text)[0])
    assert 0.05 < explained < 1
    assert isinstance(run.task, ImitationTask)
    linear = run.task.linear
    assert linear is not None
    with torch.no_grad():
        losses = [loss_of(run)]
        linear.weight.zero_()
        if objective == "hidden_states":  # the best that is the same for all tokens
            _, mask, taught, _ = run.task.read(run.texts)
            linear.bias.copy_(taught[mask].mean(dim=0))
        losses.append(loss_of(run))
        if objective == "hidden_states":
            assert losses[0] / losses[1] == pytest.approx(1 - explained, abs=0.1)  # each text counts as much as another
    assert losses[0] < losses[1]


def test_a_fitted_map_is_ridge_regression() -> None:
    random_numbers = torch.manual_seed(0)
    features, targets = (torch.randn(40, width, generator=random_numbers) + 3 for width in (5, 3))
    linear = nn.Linear(5, 3)
    explained = fit_linear(linear, features, targets)
    # As least squares, with the penalty as further rows.
    centred = (features - features.mean(dim=0)).numpy()
    rows = math.sqrt(0.1 * (centred**2).sum() / 5) * np.eye(5)
    wanted = (targets - targets.mean(dim=0)).numpy()
    expected, *_ = np.linalg.lstsq(np.vstack([centred, rows]), np.vstack([wanted, np.zeros((5, 3))]), rcond=None)
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected.T, atol=1e-5)
    np.testing.assert_allclose(linear(features.mean(dim=0)).detach().numpy(), targets.mean(dim=0), atol=1e-5)
    error = ((centred @ expected - wanted) ** 2).sum()
    assert explained == pytest.approx(1 - error / (wanted**2).sum(), abs=1e-5)


def test_relations_need_no_equal_widths_and_any_layer(model: Path, tmp_path: Path) -> None:
    wide = write_tiny_model(tmp_path / "wide", "bert", hidden_size=64, num_hidden_layers=3, seed=1)
    losses: list[float] = []
    for layer in (None, 2, 0):
        settings = config("relations", teacher=str(wide), teacher_layer=layer, relation_heads=4)
        losses.append(
            pretrain_backbone(new_student(model, tuning="full"), PASSAGES, tmp_path / f"{layer}", settings).first_loss
        )
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("objective", ["simcse", "hidden_states"])
def test_resumed_equals_uninterrupted_and_a_finished_one_is_taken_up(
    model, stranger, objective: str, tmp_path, monkeypatch
):
    taught = {"teacher": str(stranger)} if objective == "hidden_states" else {}
    settings = config(objective, epochs=2, **taught)
    student = new_student(model)
    report = pretrain_backbone(student, PASSAGES, tmp_path / "whole", settings, queries=TEXTS)
    expected = student.fingerprint
    genuine, calls = trainer.optimizer_step, 0

    def interrupted(*arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise ArithmeticError
        return genuine(*arguments, **options)

    monkeypatch.setattr(trainer, "optimizer_step", interrupted)
    options: dict[str, Any] = {"queries": TEXTS, "checkpoint_minutes": 1e-9}
    with pytest.raises(ArithmeticError):
        pretrain_backbone(new_student(model), PASSAGES, tmp_path / "run", settings, **options)
    for steps in (6 + report.steps - 5, 6 + report.steps - 5):  # the second call trains nothing
        student = new_student(model)
        assert pretrain_backbone(student, PASSAGES, tmp_path / "run", settings, **options).steps == report.steps
        assert student.fingerprint == expected
        assert calls == steps
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").open(encoding="utf-8")]
    assert steps == list(range(1, report.steps + 1))
    with pytest.raises(InputError, match=r"other settings: pretraining.batch_texts \(was 8, is 4\)"):
        pretrain_backbone(
            new_student(model), PASSAGES, tmp_path / "run", config(objective, **taught, batch_texts=4, epochs=2)
        )


# A teacher with another tokenizer ----------------------------------------------------------------------------------

WORDS = ["un", "##believ", "##able", "cafe", "##s", "東", "京"]
PIECES = ["▁Unbe", "lieva", "ble", "▁", "▁caf", "és", "東京", "▁to"]


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Of pieces that begin with the white space before them, as SentencePiece has it."""
    tokens = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((each, -1.0) for each in PIECES)]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def two_backbones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Backbone]:
    """One that reads ``WORDS`` and one that reads ``PIECES``, after the prefix "to"."""
    backbones: list[Backbone] = []
    for tokenizer, prefix in ((word_tokenizer(WORDS), ""), (pieces_tokenizer(), "to ")):
        folder = write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert")
        tokenizer.save_pretrained(folder)
        settings = BackboneConfig(model=str(folder), tuning=Frozen(), passage_prefix=prefix)
        backbones.append(Backbone.load(settings, device="cpu", dtype="float32"))
    return backbones[0], backbones[1]


@pytest.mark.parametrize(
    ("text", "max_tokens", "pairs", "num_tokens"),
    [
        # [CLS] un believ able cafe s [SEP]  |  <s> _to _Unbe lieva ble _ _caf és </s>
        (
            "Unbelievable  cafés",
            64,
            [[1, 2, 2], [2, 2, 2], [2, 3, 4], [3, 3, 1], [3, 4, 3], [4, 6, 3], [4, 7, 1], [5, 7, 1]],
            5,
        ),
        # [CLS] un believ able cafe [SEP]  |  <s> _to _Unbe lieva ble </s>
        ("Unbelievable  cafés", 6, [[1, 2, 2], [2, 2, 2], [2, 3, 4], [3, 3, 1], [3, 4, 3]], 4),
        # [CLS] 東 京 cafe [UNK] [SEP]  |  <s> _to _ 東京 _caf <unk: e> _ <unk: the face> </s>
        ("東京 cafe 🙂", 64, [[1, 3, 1], [2, 3, 1], [3, 4, 3], [3, 5, 1], [4, 7, 1]], 4),
        (" ", 64, [], 0),
    ],
)
def test_tokens_are_aligned_by_characters(
    two_backbones, text: str, max_tokens: int, pairs: list[list[int]], num_tokens: int
):
    settings = config("hidden_states", max_tokens=max_tokens)
    ((ids, reading),) = _readings(*two_backbones, [text], "passage", settings).items()
    student, teacher = two_backbones
    assert [*ids] == student.tokenize([text], "passage", limit=max_tokens).ids[0]
    assert reading.ids == teacher.tokenize([text], "passage", limit=max_tokens).ids[0]
    assert reading.pairs.tolist() == pairs
    assert reading.num_tokens == num_tokens


def test_bytes_of_a_character_teach_alike(two_backbones: tuple[Backbone, Backbone], model: Path) -> None:
    teacher = Backbone.load(BackboneConfig(model=str(model), tuning=Frozen()), device="cpu", dtype="float32")
    (reading,) = _readings(two_backbones[0], teacher, ["東"], "passage", config("hidden_states")).values()
    assert len(reading.ids) == 5  # three bytes between <s> and </s>
    assert reading.pairs.tolist() == [[1, 1, 1], [1, 2, 1], [1, 3, 1]]


@pytest.mark.parametrize("objective", ["hidden_states", "mutual_information", "vectors"])
def test_a_teacher_with_another_tokenizer_is_imitated(model, stranger, objective: str, tmp_path, caplog):
    student = new_student(model, tuning="full")
    settings = config(objective, epochs=12, teacher=str(stranger), max_tokens=16, learning_rate=1e-3)
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        report = pretrain_backbone(student, PASSAGES, tmp_path / "run", settings, queries=[TEXTS[0]])
    assert learnt(report, objective)
    remarks = [record.getMessage() for record in caplog.records if "another tokenizer" in record.getMessage()]
    assert len(remarks) == (objective != "vectors")


def test_a_teacher_that_cuts_alike_teaches_alike(model: Path, tmp_path: Path) -> None:
    """One more word in its vocabulary, which no text has, makes it another tokenizer with the same tokens."""
    alike = write_tiny_model(tmp_path / "alike", "bert", num_hidden_layers=3)
    tokenizer = tiny_tokenizer(is_decoder=False)
    tokenizer.add_tokens(["unusual"])
    tokenizer.save_pretrained(alike)
    read, settings = [], []
    for teacher in (None, str(alike)):
        student = new_student(model, layers=(0, 2))
        run = pretrain._Pretraining(
            student, PASSAGES, TEXTS, tmp_path / f"vectors-{teacher is None}", config("vectors", teacher=teacher), 0
        )
        assert isinstance(run.task, ImitationTask)
        with torch.no_grad():
            read.append(run.task.read(run.texts[:8]))
        settings.append(run.settings["texts"])
        assert (run.task.linear is None) == (teacher is None)  # of a stranger's vectors a map is learnt
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))
    assert settings[0] != settings[1]

    student = new_student(model, layers=(0, 2))
    run = pretrain._Pretraining(
        student, PASSAGES, [], tmp_path / "states", config("hidden_states", teacher=str(alike)), 0
    )
    texts, whole = run.texts[:8], new_student(model).backbone
    assert isinstance(run.task, ImitationTask)
    linear = run.task.linear
    assert linear is not None
    with torch.no_grad():
        linear.weight.copy_(torch.eye(len(linear.weight)))
        linear.bias.zero_()
        loss = sum(float(each) for each in run.task.losses(texts, random.Random(0)))
        expected = []
        for ids in texts:
            kept = [n for n, one in enumerate(ids) if tokenizer.decode([one], skip_special_tokens=True).strip()]
            assert 0 < len(kept) < len(ids) - 1  # neither special tokens nor white space
            own, taught = (each(*each.pad([ids]))[0][0, kept] for each in (student.backbone, whole))
            expected.append(float((own - taught).square().mean()))
    assert loss == pytest.approx(np.mean(expected), rel=1e-4)


def test_tokens_that_are_left_out_are_counted(model, stranger, tmp_path, caplog):
    settings = config("hidden_states", teacher=str(stranger), max_tokens=8)
    student = new_student(model)
    cut = "the station at noon leaves snow on the roof"  # of which the teacher, with shorter tokens, reads less
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        run = pretrain._Pretraining(student, [cut, TEXTS[0][:7]], [], tmp_path / "run", settings, 0)
    assert isinstance(run.task, ImitationTask)
    own, teacher = student.backbone, run.task.taught_by
    ids, taught = (each.tokenize([cut], "passage", limit=8).ids[0] for each in (own, teacher))
    end = max(end for _, end in teacher.token_spans(cut, len(taught)))
    beyond = sum(start >= end for start, stop in own.token_spans(cut, len(ids)) if stop > start)
    assert beyond > 0
    whole = len(own.tokenize([TEXTS[0][:7]], "passage").ids[0]) - 2
    assert f"{beyond} of {len(ids) - 2 + whole} tokens of the texts have none of its tokens" in caplog.text


# What cannot be trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "backbone", "problem"),
    [
        ({"kind": "simcse"}, {"tuning": "frozen"}, "is frozen; set tuning to lora or full"),
        ({"kind": "mirror"}, {}, "no token for masked text"),
        ({"kind": "vectors"}, {}, "needs a teacher"),
        ({"kind": "masked_next_token"}, {}, "for decoders that read in both directions; set bidirectional"),
        ({"kind": "relations", "relation_heads": 5}, {"layers": 2}, "relation_heads is 5, but .* width 32"),
        ({"kind": "relations", "relation_heads": 4, "teacher_layer": 3}, {"layers": 2}, "only layers 0 to 2"),
    ],
)
def test_a_student_that_cannot_learn_it_is_refused(
    model, settings: dict[str, Any], backbone: dict[str, Any], problem: str, tmp_path
):
    with pytest.raises(InputError, match=problem):
        pretrain_backbone(new_student(model, **backbone), PASSAGES, tmp_path, Pretraining.of(settings))


def test_other_tokenizers_fused_attention_and_too_few_texts_are_refused(model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "llama", "llama")  # its texts have no last token
    problem = r"llama' reads other tokens .* their attention cannot be compared.* hidden_states, mutual_information and"
    with pytest.raises(InputError, match=problem):
        pretrain_backbone(
            new_student(model), PASSAGES, tmp_path, config("relations", teacher=str(other), relation_heads=4)
        )
    settings = config("hidden_states", teacher=str(other))
    with pytest.raises(InputError, match="no token of the student shares a character with one of the teacher"):
        pretrain_backbone(new_student(model), [" ", "\n"], tmp_path, settings)
    fused = write_tiny_model(tmp_path / "modernbert", "modernbert")
    with pytest.raises(ModelError, match="no separate layers for queries, keys and values"):
        pretrain_backbone(
            new_student(model), PASSAGES, tmp_path, config("relations", teacher=str(fused), relation_heads=4)
        )
    with pytest.raises(InputError, match="1 different texts are too few"):
        pretrain_backbone(new_student(model), TEXTS[:1] * 9, tmp_path, config("simcse"))


def test_tokens_without_offsets_are_not_compared(model: Path, tmp_path: Path) -> None:
    slow = write_tiny_model(tmp_path / "t5", "t5")
    ByT5Tokenizer().save_pretrained(slow)
    for objective in ("hidden_states", "mutual_information"):
        with pytest.raises(InputError, match=r"tokenizer of '.*t5' gives no character offsets .* the kind vectors"):
            pretrain_backbone(new_student(model), PASSAGES, tmp_path, config(objective, teacher=str(slow)))
    student = new_student(model, tuning="full")
    report = pretrain_backbone(
        student, PASSAGES, tmp_path / "run", config("vectors", teacher=str(slow), epochs=6, max_tokens=32)
    )
    assert report.last_loss < 0.8 * report.first_loss


@pytest.mark.parametrize("architecture", ["llama", "modernbert", "t5"])
def test_dropout_reaches_every_architecture(architecture: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / architecture, architecture)
    backbone = Backbone.load(tiny_student_config(folder, tuning="full").backbone, device="cpu", dtype="float32")
    backbone.prepare_training()
    before = set_dropout(backbone.model, 0.5)
    backbone.model.train()
    ids = backbone.pad(backbone.tokenize(TEXTS, "passage").ids)
    assert not torch.equal(backbone(*ids)[0], backbone(*ids)[0])
    pretrain.restore_dropout(before)
    assert {rate for _, _, rate in set_dropout(backbone.model, 0.5)} == {rate for _, _, rate in before}


# In a distillation -------------------------------------------------------------------------------------------------


def test_texts_are_those_of_training() -> None:
    entries = [PlanEntry("q1", ("p1", "both"), ("p2",), ()), PlanEntry("q2", ("p2",), (), ())]
    names = ("p1", "p2", "p3", "dev", "both", "wrong", "test")
    qrels = {
        "train": {"q1": {"p1": 1, "both": 1}, "q2": {"p2": 1}},
        "dev": {"d1": {"dev": 1, "both": 1, "wrong": 0}},
        "test": {"t1": {"test": 1}},
    }
    queries = {name: f"query {name}" for name in ("q1", "q2", "d1", "t1")}
    source = make_source({name: f"passage {name}" for name in names}, queries, entries, qrels=qrels)
    passages, read = unlabelled_texts([source], config("simcse", max_passages=10))
    assert sorted(passages) == ["passage both", "passage p1", "passage p2", "passage p3"]
    assert sorted(read) == ["query q1", "query q2"]
    assert [len(texts) for texts in unlabelled_texts([source, source], config("simcse", max_passages=1))] == [2, 2]


def test_texts_of_a_corpus_replace_those_of_training(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"_id": f"d{n}", "title": "On", "text": text} for n, text in enumerate(TEXTS)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = make_source({"p1": "passage"}, {"q1": "query"}, [PlanEntry("q1", ("p1",), (), ())])
    passages, queries = unlabelled_texts([source], config("simcse", corpus=str(corpus), max_passages=3))
    assert len({*passages}) == 3
    assert {*passages} < {f"On\n{text}" for text in TEXTS}
    assert queries == []
    assert len(unlabelled_texts([source], config("simcse", corpus=str(tmp_path)))[0]) == len(TEXTS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    workspace.model, workspace.source = model, topics(num_passages=48)
    return workspace


def distilled(workspace: Workspace, folder: Path, student: StudentConfig, **pretraining: Any) -> Student:
    recipe = tiny_recipe(student, losses=Objective(JUDGEMENTS), pretraining=pretraining or None)
    workspace.run(folder, recipe=recipe)
    return Student.load(folder, device="cpu", dtype="float32")


def test_a_distilled_student_is_pretrained_first(workspace: Workspace, tmp_path: Path) -> None:
    student = tiny_student_config(workspace.model, layers=(0, 2), tuning=Lora(rank=4, alpha=8.0))
    plain = distilled(workspace, tmp_path / "plain", student)
    taught = distilled(workspace, tmp_path / "taught", student, kind="vectors", batch_texts=4, epochs=3)
    assert plain.fingerprint != taught.fingerprint
    pretrained = load_file(tmp_path / "taught.run" / "pretraining" / "checkpoint.safetensors")
    adapters = {name: each for name, each in pretrained.items() if name.startswith("parameter/")}
    assert adapters
    assert all(min(each.shape) == 4 for each in adapters.values())
    written = load_file(tmp_path / "taught" / "adapter_model.safetensors")
    assert all(min(each.shape) == 4 for each in written.values())  # the distillation trained the same adapters on
    recipe = json.loads((tmp_path / "taught" / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    assert [stage["kind"] for stage in recipe["training"]["pretraining"]] == ["vectors"]


def test_stages_follow_one_another(workspace: Workspace, tmp_path: Path) -> None:
    stages = [{"kind": "relations", "relation_heads": 4, "batch_texts": 4}, {"kind": "vectors", "batch_texts": 4}]
    student = tiny_student_config(workspace.model, layers=(0, 2), tuning=Lora(rank=4, alpha=8.0))
    recipe = tiny_recipe(student, losses=Objective(JUDGEMENTS), pretraining=stages)
    workspace.run(tmp_path / "both", recipe=recipe)
    one = distilled(workspace, tmp_path / "one", student, **stages[0])
    assert Student.load(tmp_path / "both", device="cpu", dtype="float32").fingerprint != one.fingerprint
    folders = [tmp_path / f"{run}.run" / name for run, name in (("one", "pretraining"), ("both", "pretraining"))]
    alone, first, second = (
        load_file(folder / "checkpoint.safetensors") for folder in (*folders, tmp_path / "both.run" / "pretraining-2")
    )
    names = [name for name in second if name.startswith("parameter/") and "lora_B" in name]
    assert names
    assert all(torch.equal(alone[name], first[name]) for name in names)
    assert any(not torch.equal(first[name], second[name]) for name in names)


def test_a_student_teaches_with_its_tuned_backbone(workspace: Workspace, tmp_path: Path) -> None:
    finetuned = tiny_student_config(workspace.model, tuning=Lora(rank=4, alpha=8.0))
    tuned = distilled(workspace, tmp_path / "tuned", finetuned, kind="simcse", batch_texts=4, learning_rate=0.05)
    student = new_student(workspace.model, layers=(0, 2), tuning="full")
    runs = {
        name: pretrain._Pretraining(
            student, PASSAGES, (), tmp_path / name, config("hidden_states", teacher=str(teacher)), 0
        )
        for name, teacher in (("by the tuned one", tmp_path / "tuned"), ("by its model", workspace.model))
    }
    expected = []
    with torch.no_grad():
        for text in runs["by its model"].texts:
            ids = torch.tensor([text])
            states, taught = (
                model(ids, torch.ones_like(ids).bool())[0] for model in (student.backbone, tuned.backbone)
            )
            expected.append(float((states - taught).double().square().mean()))
    assert loss_of(runs["by the tuned one"]) == pytest.approx(np.mean(expected), rel=1e-4)
    assert loss_of(runs["by its model"]) != pytest.approx(np.mean(expected), rel=1e-2)
    assert runs["by the tuned one"].settings["texts"] != runs["by its model"].settings["texts"]


def test_a_resumed_distillation_does_not_pretrain_again(workspace, tmp_path, monkeypatch):
    student = tiny_student_config(workspace.model)
    pretraining = {"kind": "simcse", "batch_texts": 4}
    whole = distilled(workspace, tmp_path / "whole", student, **pretraining)

    def fail(*arguments: Any, **options: Any) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr(Student, "save", fail)
        with pytest.raises(ArithmeticError):
            distilled(workspace, tmp_path / "resumed", student, **pretraining)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", fail)
        resumed = distilled(workspace, tmp_path / "resumed", student, **pretraining)
    assert resumed.fingerprint == whole.fingerprint
