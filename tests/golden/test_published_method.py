"""A whole training of the published head on the published losses, beside an independent implementation.

``published_method`` is written from the formulas, as plain loops in float64. Both start from the same weights and see
the same batches. Every loss of every step, the gradient's norm, the final weights and the scores of the student that
is written must agree.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from d2llm.core.types import TASKS, Task
from d2llm.data.collation import Draw, LabelledSource, epoch_batches
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry, TrainingSource
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe import Full, Lora, Recipe, Tuning
from d2llm.recipe.recipe import load_recipe
from d2llm.training.distill import DistillReport, distill
from published_method import Example, PublishedTraining, Settings
from tiny_data import make_source
from tiny_models import TEXTS, tiny_teacher_config, write_tiny_model

NUM_EPOCHS, NUM_STEPS, NUM_WARMUP = 2, 8, 3  # each epoch has two batches of each of two data sets
RATE, HEAD_RATE, DECAY = 1e-3, 2e-3, 0.3
MAX_NORM = 15.0  # some gradients of each run are clipped, others not
SIZES = {"batch_queries": 3, "num_positives": 2, "num_hard": 3, "num_easy": 1}
EXTRA, WITHOUT_FEATURES = "q3", "q5"
"""A query with labels for passages that are not its own, and one without features."""

# The run computes in float32, and each correlation divides by the small spread of an untrained student's logits: with
# one thread or two, PH differs by up to 3e-5 of its value, a gradient's norm by 7e-5, and a tensor by 6e-5 of the
# length of its change. AdamW turns a gradient that is nearly all rounding into a step of full size, so a few elements
# of a tensor may differ by more, and its length is compared.
LOSS, NORM, CHANGE = 2e-4, 1e-3, 1e-3
ROUNDING = 2e-6  # the log has six digits of each loss

Labels = tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]


@dataclass
class Case:
    """What differs between the two trainings; the numbers of ``authors`` are the published ones."""

    weights: dict[str, float]
    temperature: float
    num_heads: int
    tuning: Tuning


CASES = {
    "authors": Case(
        {
            "contrastive_imitation": 1.0,
            "rank_imitation_positive_hard": 1.0,
            "rank_imitation_hard_easy": 0.01,
            "feature_imitation": 0.001,
            "in_batch_cross_entropy": 1.0,
        },
        temperature=1.0,
        num_heads=32,
        tuning=Lora(rank=8, alpha=8.0),
    ),
    "mean": Case(
        {
            "contrastive_imitation": 0.7,
            "rank_imitation_positive_hard": 1.9,
            "rank_imitation_hard_easy": 3.1,
            "feature_imitation": 2.3,
            "in_batch_cross_entropy": 1.3,
        },
        temperature=0.8,
        num_heads=4,
        tuning=Full(),
    ),
}


@dataclass
class Runs:
    """A run of ``distill`` and the independent one."""

    folder: Path
    sources: list[TrainingSource]
    report: DistillReport
    log: list[dict[str, Any]]
    start: dict[str, Tensor]
    training: PublishedTraining
    expected_log: list[dict[str, float]]

    def differences(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """By tensor: how far it is from the expected one, as a fraction of the change since the start."""
        fractions: dict[str, float] = {}
        for name, weight in weights.items():
            change = self.training.weights[name] - self.start[name]
            error = (weight.double() - self.training.weights[name]).norm()
            fractions[name] = float(error / change.norm()) if change.any() else float(error)
        return fractions


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, case = tmp_path_factory.mktemp(request.param), CASES[request.param]
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    backbone = write_tiny_model(folder / "backbone", "bert", **no_dropout)
    teacher = tiny_teacher_config(write_tiny_model(folder / "teacher", "llama"))
    recipe = tiny_paper_recipe(backbone, request.param)
    identity = identify_teacher(teacher)
    labelled: list[LabelledSource] = []
    for task in TASKS:
        key = {"teacher": identity.fingerprint, "prompt": identity.prompts[task], "dataset": task}
        store = LabelStore(folder / "labels", **key)
        source = make_texts(task)
        write_labels(store, make_labels(source))
        labelled.append(LabelledSource.join(source, store))
    student = Student.create(recipe.student, device="cpu", dtype="float32", seed=recipe.seed)
    student.prepare_training(seed=recipe.seed)
    start = {name: p.detach().double() for name, p in student.named_parameters() if p.requires_grad}
    with float64():
        training, expected_log = train_by_hand(labelled, start, backbone, case, is_mean=request.param == "mean")
        sources = [make_texts(task, dev=judge_by_trained(training, task)) for task in TASKS]
    report = distill(
        sources,
        folder / "student",
        recipe=recipe,
        labels=folder / "labels",
        teacher=teacher,
        device="cpu",
        dtype="float32",
    )
    lines = (folder / "student.run" / "log.jsonl").read_text("utf-8").splitlines()
    log = [line for line in map(json.loads, lines) if "loss" in line]
    return Runs(folder, sources, report, log, start, training, expected_log)


def tiny_paper_recipe(backbone: Path, normalisation: str) -> Recipe:
    """The shipped recipe with a tiny backbone, few and large steps and no dropout; ``mean`` has settings of its own."""
    values = load_recipe("d2llm-paper").model_dump()
    case = CASES[normalisation]
    values["student"]["backbone"] |= {"model": str(backbone), "tuning": case.tuning}
    values["training"] |= SIZES | {
        "learning_rate": RATE,
        "head_learning_rate": HEAD_RATE,
        "warmup_steps": NUM_WARMUP,
        "epochs": NUM_EPOCHS,
        "weight_decay": DECAY,
        "max_gradient_norm": MAX_NORM,
        "in_batch_labels": False,
        "eval_every": NUM_STEPS,
    }
    if normalisation == "mean":
        values["losses"] |= case.weights
        values["losses"]["contrastive_imitation"] = {
            "weight": case.weights["contrastive_imitation"],
            "temperature": case.temperature,
        }
        values["student"]["pooling"]["num_heads"] = case.num_heads
        values["student"]["interaction"] |= {"hidden_dim": 24, "feature_dim": 24}
    return Recipe.model_validate(values)


def make_texts(task: Task, *, dev: dict[str, dict[str, int]] | None = None) -> TrainingSource:
    """Ten passages, one of them twice, and six queries, some with two positives, with two to four hard negatives."""
    rng = random.Random(task)
    words = " ".join(TEXTS).split()
    passages = {f"p{number}": " ".join(rng.sample(words, rng.randint(1, 6))) for number in range(10)}
    passages["p9"] = passages["p0"].upper()  # the same text: no negative where the other is a positive
    queries = {f"q{number}": " ".join(rng.sample(words, rng.randint(1, 4))) for number in range(6)}
    entries: list[PlanEntry] = []
    relevant: dict[str, dict[str, int]] = {}
    for number, query in enumerate(queries):
        others = [p for p in passages if p not in (f"p{number}", "p0", "p9")]
        order = [f"p{number}", *rng.sample(others, 7)]
        positives, hard, easy = order[: 1 + number % 2], order[2 : 4 + number % 3], order[6:]
        entries.append(PlanEntry(query, tuple(positives), tuple(hard), tuple(easy)))
        relevant[query] = dict.fromkeys([*positives, order[1]], 1)  # order[1] is judged, and not in every plan
    qrels = {"train": relevant} | ({} if dev is None else {"dev": dev})
    return make_source(passages, queries, entries, qrels=qrels, name=task, task=task)


def make_labels(source: TrainingSource) -> Labels:
    """A teacher's log-odds by query and passage, and its features of positives and hard negatives."""
    rng = np.random.default_rng(7)
    log_odds: dict[str, dict[str, float]] = {}
    features: dict[str, dict[str, list[float]]] = {}
    for entry in source.plan.entries:
        others = sorted(source.dataset.passages.keys() - {*entry.passage_ids})
        judged = [*entry.passage_ids, *(others if entry.query_id == EXTRA else ())]
        log_odds[entry.query_id] = {passage: float(np.float32(rng.normal(0, 2))) for passage in judged}
        listed = () if entry.query_id == WITHOUT_FEATURES else entry.positives + entry.hard_negatives
        features[entry.query_id] = {passage: rng.normal(0.3, 1, 5).tolist() for passage in listed}
    return log_odds, features


def write_labels(store: LabelStore, labels: Labels) -> None:
    for query, log_odds in labels[0].items():
        vectors, cosines = np.array([*labels[1][query].values()]), None
        if len(vectors):
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            cosines = (vectors @ vectors.T).astype(np.float32)
        store.write([QueryLabels(query, (*log_odds,), np.array([*log_odds.values()], np.float32), cosines)])


@contextmanager
def float64() -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train_by_hand(
    labelled: list[LabelledSource], start: dict[str, Tensor], backbone: Path, case: Case, *, is_mean: bool
) -> tuple[PublishedTraining, list[dict[str, float]]]:
    """The independent training at its end, and what each of its steps should log."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    settings = Settings(
        weights=case.weights,
        normalisation="mean" if is_mean else "authors",
        temperature=case.temperature,
        num_heads=case.num_heads,
        lora_scale=8 / 8,  # alpha / rank
        backbone_rate=RATE,
        head_rate=HEAD_RATE,
        weight_decay=DECAY,
        max_gradient_norm=MAX_NORM,
        warmup_steps=NUM_WARMUP,
        total_steps=NUM_STEPS,
    )
    model = AutoModel.from_pretrained(backbone).double()
    training = PublishedTraining(model, lambda text: tokenizer(text)["input_ids"], dict(start), settings)
    log: list[dict[str, float]] = []
    for epoch in range(NUM_EPOCHS):
        for each, draws in epoch_batches(labelled, epoch=epoch, seed=0, **SIZES):
            texts = {p: each.source.passage_text(p) for draw in draws for p in draw.passage_ids}
            labels = make_labels(each.source)
            examples = [make_example(each.source, draw, texts, labels) for draw in draws]
            log.append(training.step(examples, texts, each.source.task))
    return training, log


def make_example(source: TrainingSource, draw: Draw, texts: Mapping[str, str], labels: Labels) -> Example:
    """A query of a batch: easy are all passages of the batch that are nothing else and not known to be relevant."""
    query, dataset = draw.entry.query_id, source.dataset
    known = {dataset.passages[passage].text.lower() for passage in dataset.qrels["train"][query]}
    easy = [p for p, text in texts.items() if p not in draw.hard and text.lower() not in known]
    features = {p: labels[1][query][p] for p in (*draw.positives, *draw.hard) if p in labels[1][query]}
    return Example(source.query_text(query), draw.positives, draw.hard, easy, labels[0][query], features)


def judge_by_trained(training: PublishedTraining, task: Task) -> dict[str, dict[str, int]]:
    """Dev judgements by which the trained state is best: a passage's grade is the number of those that it has below."""
    return {
        query: {passage: sum(other < score - 1e-3 for other in scores.values()) for passage, score in scores.items()}
        for query, scores in scores_by_hand(training, make_texts(task)).items()
    }


def scores_by_hand(training: PublishedTraining, source: TrainingSource) -> dict[str, dict[str, float]]:
    with float64(), torch.no_grad():
        passages = {key: training.encode(passage.text) for key, passage in source.dataset.passages.items()}
        return {
            key: {
                passage: float(training.emulate(training.encode(query.text), vector, source.task)[0])
                for passage, vector in passages.items()
            }
            for key, query in source.dataset.queries.items()
        }


def test_every_step_has_the_published_losses(runs: Runs) -> None:
    assert len(runs.log) == len(runs.expected_log) == NUM_STEPS
    names = {"step", "seconds", "task"} | runs.expected_log[0].keys()
    for step, (line, expected) in enumerate(zip(runs.log, runs.expected_log, strict=True)):
        assert line.keys() == names
        for name, value in expected.items():
            tolerance = NORM if name == "gradient_norm" else LOSS
            assert line[name] == pytest.approx(value, rel=tolerance, abs=ROUNDING), f"step {step}: {name}"
    norms = [line["gradient_norm"] for line in runs.expected_log]
    assert min(norms) < 0.9 * MAX_NORM < 1.1 * MAX_NORM < max(norms)


def test_the_weights_after_the_last_step(runs: Runs) -> None:
    checkpoint = load_file(runs.folder / "student.run" / "checkpoint.safetensors")
    weights = {name.removeprefix("parameter/"): w for name, w in checkpoint.items() if name.startswith("parameter/")}
    assert weights.keys() == runs.training.weights.keys()
    wrong = {name: fraction for name, fraction in runs.differences(weights).items() if fraction > CHANGE}
    # A softmax does not depend on the bias of its keys: their gradient is 0, and in the run what rounding leaves of it.
    assert {name for name in wrong if not name.endswith("key.bias")} == set()


def test_the_student_has_the_weights_after_the_last_step(runs: Runs) -> None:
    assert (runs.report.best_step, runs.report.steps) == (NUM_STEPS, NUM_STEPS)
    folder = runs.folder / "student"
    files = load_file(folder / "head.safetensors")
    if (folder / "adapter_model.safetensors").is_file():
        for name, weight in load_file(folder / "adapter_model.safetensors").items():  # alpha / rank is 1
            layer = name.removeprefix("base_model.model.").removesuffix(".weight")
            files[f"backbone.model.{layer}.default.weight"] = weight
    else:
        files |= {f"backbone.model.{n}": w for n, w in load_file(folder / "backbone" / "model.safetensors").items()}
    assert files.keys() == runs.training.weights.keys()
    wrong = {name: fraction for name, fraction in runs.differences(files).items() if fraction > CHANGE}
    assert {name for name in wrong if not name.endswith("key.bias")} == set()


def test_the_student_scores_as_the_formulas_do(runs: Runs) -> None:
    student = Student.load(runs.folder / "student", device="cpu", dtype="float32")
    for source in runs.sources:
        passages = source.dataset.passages
        vectors = student.encode_passages([passage.text for passage in passages.values()]).vectors
        scores = scores_by_hand(runs.training, source)
        for key, query in source.dataset.queries.items():
            (vector,) = student.encode_queries([query.text]).vectors
            actual = student.score(vector, vectors, source.task).tolist()
            assert actual == pytest.approx([scores[key][passage] for passage in passages], rel=1e-4, abs=1e-4)
        dev = runs.report.dev[source.dataset.name]
        assert dev["start"] < 0.99
        assert dev["last"] == dev["kept"] == pytest.approx(1.0, abs=1e-3)  # scores that are level may change places
