"""The gradient of a batch computed in parts, against a single backward pass through the whole batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2llm.data.collation import DistillationBatch
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import Lora, TrainingConfig
from d2llm.recipe.losses import Objective
from d2llm.training import gradient_cache
from d2llm.training.gradient_cache import backpropagate, graph_room
from d2llm.training.losses import batch_tokens, embedded_positions, score_vectors, weighted_sum, with_tokens
from tiny_data import PUBLISHED, make_source
from tiny_distill import losses_of, score_batch
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

WEIGHTS = Objective(PUBLISHED | {"rank_imitation_hard_easy": 0.5, "feature_imitation": 0.5})
NUM_QUERIES, NUM_PASSAGES = 5, 17


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "modernbert", initializer_range=0.1)


def make_student(model: Path, *, dropout: float = 0.0, checkpointing: bool = False, **backbone: Any) -> Student:
    config = tiny_student_config(model, **{"tuning": Lora(rank=4, alpha=8.0, dropout=dropout), **backbone})
    head = config.interaction.model_copy(update={"dropout": dropout})
    student = Student.create(config.model_copy(update={"interaction": head}), device="cpu", dtype="float32")
    student.prepare_training(gradient_checkpointing=checkpointing)
    randomise(student, scale=0.1)
    return student.train()


@pytest.fixture(scope="module")
def student(model: Path) -> Student:
    return make_student(model)


@pytest.fixture(scope="module")
def batch() -> DistillationBatch:
    """Texts of 1 to 8 random words; the first of a query's three passages is positive, the others hard negatives."""
    rng = random.Random(0)
    words = " ".join(TEXTS).split()
    passages = {f"p{n:02}": " ".join(rng.sample(words, rng.randint(1, 8))) for n in range(NUM_PASSAGES)}
    queries = {f"q{n}": " ".join(rng.sample(words, rng.randint(1, 8))) for n in range(NUM_QUERIES)}
    own = np.arange(NUM_QUERIES * 3).reshape(NUM_QUERIES, 3)
    masks = np.zeros((3, NUM_QUERIES, NUM_PASSAGES), bool)
    for row, columns in enumerate(own):
        masks[0, row, columns[0]] = masks[1, row, columns[1:]] = True
    masks[2] = ~(masks[0] | masks[1])
    log_odds = np.random.default_rng(0).normal(0, 2, (NUM_QUERIES, NUM_PASSAGES)).astype(np.float32)
    gram = np.stack([np.eye(3, dtype=np.float32) * 0.5 + 0.5] * NUM_QUERIES)
    labelled = np.ones_like(masks[0])
    return DistillationBatch(
        make_source(passages, queries, []), tuple(queries), tuple(passages), *masks, log_odds, labelled, own, gram
    )


@dataclass
class LossAndGradients:
    loss: float
    gradients: dict[str, Tensor]


def collect(student: Student, loss: Tensor) -> LossAndGradients:
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return LossAndGradients(float(loss.detach()), gradients)


def in_one_pass(student: Student, batch: DistillationBatch) -> LossAndGradients:
    """One forward pass over every text and one backward pass."""
    loss = weighted_sum(losses_of(score_batch(student, batch), batch, WEIGHTS), WEIGHTS.root)
    loss.backward()
    return collect(student, loss)


def loss_function(student: Student, batch: DistillationBatch) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    ids = batch_tokens(student, batch)

    def loss_of(vectors: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        scores = with_tokens(student, score_vectors(student, vectors, batch), tokens, batch, ids)
        return weighted_sum(losses_of(scores, batch, WEIGHTS), WEIGHTS.root)

    return loss_of


def in_parts(
    student: Student, batch: DistillationBatch, *, seed: int = 3, room: float = 1 << 20, part_tokens: int | None = None
) -> LossAndGradients:
    loss = backpropagate(
        student,
        batch_tokens(student, batch),
        loss_function(student, batch),
        token_positions=embedded_positions(student, batch, batch_tokens(student, batch)),
        part_tokens=part_tokens,
        room=room,
        seed=seed,
    )
    return collect(student, loss)


def assert_same(actual: LossAndGradients, expected: LossAndGradients, tolerance: float = 1e-5) -> None:
    assert actual.loss == pytest.approx(expected.loss, rel=1e-6)
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        difference = float((actual.gradients[name] - gradient).abs().max())
        assert difference <= tolerance * largest, (name, difference, largest)


@pytest.mark.parametrize("room", [0, 1 << 20, math.inf])
@pytest.mark.parametrize("part_tokens", [1, 40])
def test_gradient_equals_that_of_one_pass(student, batch, room: float, part_tokens: int):
    expected = in_one_pass(student, batch)
    assert max(float(gradient.abs().max()) for gradient in expected.gradients.values()) > 0.01
    assert_same(in_parts(student, batch, room=room, part_tokens=part_tokens), expected)


@settings(max_examples=6)
@given(part_tokens=st.integers(1, 300), room=st.integers(0, 1 << 22))
def test_gradient_does_not_depend_on_part_size_or_room(student, batch, part_tokens: int, room: int):
    assert_same(in_parts(student, batch, part_tokens=part_tokens, room=room), in_one_pass(student, batch))


@pytest.mark.parametrize("tuning", ["full", "frozen"])
def test_gradient_is_right_for_full_and_frozen_tuning(model: Path, batch: DistillationBatch, tuning: str) -> None:
    student = make_student(model, tuning=tuning)
    assert_same(in_parts(student, batch, room=0, part_tokens=40), in_one_pass(student, batch))


def test_gradient_is_right_for_a_head_on_a_frozen_encoder(model: Path, batch: DistillationBatch) -> None:
    student = make_student(model)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith("interaction."))
    expected = in_one_pass(student, batch)
    assert set(expected.gradients) <= {name for name, _ in student.named_parameters() if name.startswith("interaction")}
    assert_same(in_parts(student, batch, room=0, part_tokens=40), expected)
    assert_same(in_parts(student, batch, room=math.inf, part_tokens=40), expected)


def test_recomputed_parts_repeat_their_dropout(model: Path, batch: DistillationBatch) -> None:
    """So the amount of free memory never changes a run, not even one resumed on another machine."""
    student = make_student(model, dropout=0.3)
    kept = in_parts(student, batch, room=math.inf, part_tokens=40)
    others = [in_parts(student, batch, room=room, part_tokens=40) for room in (0, 200_000, 1 << 30)]
    for other in others:
        assert other.loss == kept.loss
        for name, gradient in kept.gradients.items():
            assert torch.equal(other.gradients[name], gradient), name
    other = in_parts(student, batch, seed=4, part_tokens=40)
    assert abs(other.loss - kept.loss) > 1e-3  # dropout was on
    student.eval()
    assert abs(in_parts(student, batch, part_tokens=40).loss - kept.loss) > 1e-3


def test_large_seeds(student: Student, batch: DistillationBatch) -> None:
    assert_same(in_parts(student, batch, seed=20_261_123 * 1_000_003, part_tokens=40), in_one_pass(student, batch))


def peak_of_saved(student: Student, ids: list[list[int]], room: float) -> int:
    """Peak number of token-state values kept for the backward pass."""
    alive = peak = 0

    class SavedTensor:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor, self.size = tensor, tensor.numel() if tensor.ndim >= 3 else 0
            alive += self.size
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    with torch.autograd.graph.saved_tensors_hooks(SavedTensor, lambda kept: kept.tensor):
        backpropagate(student, ids, lambda v, _: (v @ v.T).logsumexp(1).sum(), part_tokens=64, room=room, seed=0)
    student.zero_grad(set_to_none=True)
    return peak


def test_memory_with_caching_does_not_grow_with_the_batch(student: Student) -> None:
    ids = [[5] * 8] * 32
    few, many = ({room: peak_of_saved(student, ids * times, room) for room in (0, math.inf)} for times in (1, 4))
    assert many[math.inf] == 4 * few[math.inf]
    assert many[0] == few[0] == few[math.inf] / 4  # one part of four


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("room", [0, math.inf])
def test_checkpointed_layers_have_the_same_gradient_in_less_memory(model, batch, tuning: str, room: float):
    options: dict[str, Any] = {"dropout": 0.2} if tuning == "lora" else {"tuning": "full"}
    plain, checkpointed = (make_student(model, checkpointing=on, **options) for on in (False, True))
    assert_same(in_parts(checkpointed, batch, room=room), in_parts(plain, batch, room=room))
    ids = [[5] * 8] * 32
    assert peak_of_saved(checkpointed, ids, room) < 0.5 * peak_of_saved(plain, ids, room)


def read_with_graph(
    student: Student, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[bool]:
    """For each forward pass over a part, in order: whether it kept its graph for a backward pass."""
    kept_graph: list[bool] = []
    original = type(student).forward

    def forward(self: Student, *inputs: Tensor) -> Tensor:
        kept_graph.append(torch.is_grad_enabled())
        return original(self, *inputs)

    monkeypatch.setattr(type(student), "forward", forward)
    backpropagate(student, ids, lambda v, _: (v @ v.T).logsumexp(1).sum(), part_tokens=64, seed=0, **options)
    student.zero_grad(set_to_none=True)
    return kept_graph


def bytes_of_a_part(student: Student, ids: list[list[int]]) -> int:
    """Bytes that the graph of one forward pass holds besides the weights, counted by storage address."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vectors = student(*student.backbone.pad(ids))
    for tensor in (*student.parameters(), *student.buffers()):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del vectors
    return sum(sizes.values())


@pytest.mark.parametrize(("parts", "kept"), [(0.5, 1), (1.5, 1), (2.5, 2), (3.9, 3), (9.0, 4)])
def test_as_many_graphs_are_kept_as_fit_in_the_room(student, monkeypatch, parts: float, kept: int):
    ids = [[5] * 8] * 32  # four parts of 8 texts
    room = int(parts * gradient_cache.ALLOCATED["cpu"] * bytes_of_a_part(student, ids[:8]))
    readings = read_with_graph(student, ids, monkeypatch, room=room)
    assert readings == [True] * kept + [False] * (4 - kept) + [True] * (4 - kept)


class TestRoom:
    def room(self, monkeypatch: pytest.MonkeyPatch, student: Student, free: int | None, **training: Any) -> float:
        monkeypatch.setattr(gradient_cache, "free_memory", lambda device: free)
        return graph_room(TrainingConfig.model_validate(training), student.backbone.device)

    def test_room_is_a_third_of_free_memory_and_is_logged(self, student, monkeypatch, caplog):
        caplog.set_level("INFO", logger="d2llm.remarks")
        assert self.room(monkeypatch, student, 6 << 30) == 2 << 30
        assert "6.0 GiB are free; up to 2.0 GiB of it are used for activations" in caplog.text
        assert self.room(monkeypatch, student, None) == 1 << 30
        assert "the free memory is unknown" in caplog.text

    def test_processes_on_one_machine_share_the_room(self, student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert self.room(monkeypatch, student, 6 << 30) == 1 << 30

    def test_recipe_can_override_the_room(self, student, monkeypatch, caplog):
        caplog.set_level("INFO", logger="d2llm.remarks")
        assert self.room(monkeypatch, student, 6 << 30, graph_gib=0.5) == 1 << 29
        assert self.room(monkeypatch, student, 6 << 30, gradient_caching="off") == math.inf
        assert self.room(monkeypatch, student, 6 << 30, gradient_caching="on") == 0
        assert caplog.text == ""


def mean_best_cosines_one_by_one(student: Student, batch: DistillationBatch) -> Tensor:
    """The mean best cosines of all pairs; each text is read alone and each pair compared alone."""
    projection = student.token_projection
    assert projection is not None
    ids = batch_tokens(student, batch)
    states = [student.backbone(*student.backbone.pad([row]))[0][0] for row in ids]
    vectors = [torch.nn.functional.normalize(row.float() @ projection.weight.T, dim=-1) for row in states]
    num_queries = len(batch.query_ids)
    rows: list[Tensor] = []
    for query, query_ids in zip(vectors[:num_queries], ids[:num_queries], strict=True):
        own = query[projection.query_positions(query_ids)]
        others = [
            passage[projection.positions(row)]
            for passage, row in zip(vectors[num_queries:], ids[num_queries:], strict=True)
        ]
        best = [(own @ passage.T).amax(1).sum() / len(projection.positions(query_ids)) for passage in others]
        rows.append(torch.stack(best))
    return torch.stack(rows)


@pytest.mark.parametrize("room", [0, math.inf])
def test_gradient_with_vectors_of_tokens_equals_that_of_one_pass(model, batch, room: float):
    student = make_student(model)
    rarity = [1.0 + token % 5 for token in range(len(student.backbone.tokenizer))]  # all tokens have vectors
    torch.manual_seed(0)
    student.token_projection = TokenProjection(student.backbone.dim, 6, rarity, max_query_tokens=3)
    with_weight = replace(batch, token_weight=4.0)
    vectors = student(*student.backbone.pad(batch_tokens(student, batch)))
    tokens = mean_best_cosines_one_by_one(student, batch)
    scores = replace(score_vectors(student, vectors, batch), tokens=tokens)
    loss = weighted_sum(losses_of(scores, with_weight, WEIGHTS), WEIGHTS.root)
    loss.backward()
    expected = collect(student, loss)
    assert float(expected.gradients["token_projection.weight"].abs().max()) > 1e-3
    assert_same(in_parts(student, with_weight, room=room, part_tokens=40), expected, tolerance=1e-4)
