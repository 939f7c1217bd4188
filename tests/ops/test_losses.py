from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from statistics import fmean

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import formulas as losses
from d2llm.core.errors import InputError
from d2llm.methods.losses.mixed_negatives import mixtures

NONE, POSITIVE, HARD, EASY = range(4)
TEMPERATURE = 0.7

# The role of each passage for each query. The rows are the cases that can occur in a batch.
ROLES = torch.tensor(
    [
        [POSITIVE, HARD, HARD, EASY, EASY, EASY, NONE],
        [POSITIVE, POSITIVE, POSITIVE, HARD, EASY, NONE, EASY],
        [EASY, EASY, POSITIVE, EASY, NONE, NONE, EASY],  # one positive, no hard negative
        [POSITIVE, NONE, HARD, POSITIVE, HARD, NONE, NONE],  # no easy negative
        [NONE, POSITIVE, POSITIVE, NONE, NONE, NONE, NONE],  # no negative at all
        [HARD, EASY, HARD, EASY, HARD, EASY, EASY],  # no positive
        [NONE, NONE, NONE, NONE, NONE, NONE, NONE],  # an empty entry of the batch
        [POSITIVE, HARD, HARD, HARD, EASY, NONE, EASY],  # constant teacher scores, see scores()
    ]
)
POSITIVES, HARDS, EASIES = ROLES == POSITIVE, ROLES == HARD, ROLES == EASY
LISTS = POSITIVES | HARDS
USED = ROLES != NONE

Loss = Callable[[Tensor, Tensor], Tensor]
"""logits (or features), teacher scores (or Gram) -> loss"""
Inputs = Callable[[], tuple[Tensor, Tensor]]
Reference = Callable[[np.ndarray, np.ndarray], float]


def scores() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROLES.shape, generator=generator, dtype=torch.float64) * 2
    teacher = torch.rand(ROLES.shape, generator=generator, dtype=torch.float64)
    teacher[7] = 0.1 + 0.2
    return logits, teacher


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    queries, passages = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in ROLES.shape)
    return queries, passages.T


def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(*ROLES.shape, 3, generator=generator, dtype=torch.float64)
    wide = torch.nn.functional.normalize(torch.randn(*ROLES.shape, 5, generator=generator, dtype=torch.float64), dim=2)
    return student, wide @ wide.mT


def subclasses(student: Tensor, gram: Tensor) -> Tensor:
    yes = torch.linspace(0.1, 0.9, LISTS.numel(), dtype=gram.dtype).reshape(LISTS.shape)
    return losses.subclass_imitation(student, gram, yes, LISTS)


WEIGHTS = torch.zeros(len(ROLES), 2, ROLES.shape[1], dtype=torch.float64)
WEIGHTS[0, 0, [1, 2]] = torch.tensor([0.3, 0.7], dtype=torch.float64)
WEIGHTS[7, 1, [1, 3]] = torch.tensor([0.9, 0.1], dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "contrastive_imitation": lambda z, s: losses.contrastive_imitation(
        z, s, POSITIVES, HARDS | EASIES, temperature=TEMPERATURE
    ),
    "rank_imitation_positive_hard": lambda z, s: losses.rank_imitation_positive_hard(z, s, LISTS),
    "list_imitation": lambda z, s: losses.list_imitation(z, s, USED, temperature=TEMPERATURE),
    "recalibrated_imitation": lambda z, s: losses.recalibrated_imitation(
        z, s, POSITIVES, USED, threshold=0.3, smoothing=0.2
    ),
    "weighted_imitation": lambda z, s: losses.weighted_imitation(z, s, POSITIVES, USED),
    "rank_imitation_hard_easy": lambda z, s: losses.rank_imitation_hard_easy(z, s, HARDS, EASIES),
    "in_batch_cross_entropy": lambda z, _: losses.in_batch_cross_entropy(z, POSITIVES, USED, temperature=TEMPERATURE),
    "pair_cross_entropy": lambda z, s: losses.pair_cross_entropy(z, s, LISTS),
    "feature_imitation": lambda y, gram: losses.feature_imitation(y, gram, LISTS),
    "score_regression": lambda z, s: losses.score_regression(z, s, USED),
    "margin_mse": lambda z, s: losses.margin_mse(z, s, POSITIVES, HARDS | EASIES),
    "listmle": lambda z, s: losses.listmle(z, s, USED),
    "plackett_luce": lambda z, s: losses.plackett_luce(z, s, POSITIVES, USED),
    "in_batch_cross_entropy, focused": lambda z, _: losses.in_batch_cross_entropy(z, POSITIVES, USED, focus=0.5),
    "angular_margin": lambda z, s: losses.angular_margin(z, s.T, POSITIVES, HARDS | EASIES, margin=0.4),
    "ranknet": lambda z, s: losses.ranknet(z, s, USED),
    "lambdarank": lambda z, s: losses.lambdarank(z, s, USED),
    "sinkhorn": lambda z, s: losses.sinkhorn(z, s, USED, temperature=2.0, smoothing=0.5, num_rounds=3),
    "passage_contrast": lambda z, s: losses.passage_contrast(z, s.T, POSITIVES, HARDS),
    "mixed_negatives": lambda z, s: losses.mixed_negatives(z, s.T, POSITIVES, USED, WEIGHTS),
    "subclass_imitation": subclasses,
}
# the loss, its inputs, and the mask of entries it reads
CASES = [
    pytest.param(LOSSES["contrastive_imitation"], scores, USED, id="contrastive_imitation"),
    pytest.param(LOSSES["list_imitation"], scores, USED, id="list_imitation"),
    pytest.param(LOSSES["recalibrated_imitation"], scores, USED, id="recalibrated_imitation"),
    pytest.param(LOSSES["weighted_imitation"], scores, USED, id="weighted_imitation"),
    pytest.param(LOSSES["rank_imitation_positive_hard"], scores, LISTS, id="rank_imitation_positive_hard"),
    pytest.param(LOSSES["rank_imitation_hard_easy"], scores, HARDS | EASIES, id="rank_imitation_hard_easy"),
    pytest.param(LOSSES["in_batch_cross_entropy"], scores, USED, id="in_batch_cross_entropy"),
    pytest.param(LOSSES["pair_cross_entropy"], scores, LISTS, id="pair_cross_entropy"),
    pytest.param(LOSSES["feature_imitation"], features, LISTS, id="feature_imitation"),
    pytest.param(LOSSES["subclass_imitation"], features, LISTS, id="subclass_imitation"),
    pytest.param(LOSSES["score_regression"], scores, USED, id="score_regression"),
    pytest.param(LOSSES["margin_mse"], scores, USED, id="margin_mse"),
    pytest.param(LOSSES["listmle"], scores, USED, id="listmle"),
    pytest.param(LOSSES["plackett_luce"], scores, USED, id="plackett_luce"),
    pytest.param(LOSSES["in_batch_cross_entropy, focused"], scores, USED, id="in_batch_cross_entropy, focused"),
    pytest.param(LOSSES["ranknet"], scores, USED, id="ranknet"),
    pytest.param(LOSSES["lambdarank"], scores, USED, id="lambdarank"),
    pytest.param(LOSSES["sinkhorn"], scores, USED, id="sinkhorn"),
]


def gradient(values: Tensor) -> Tensor:
    assert values.grad is not None
    return values.grad


# Independent references: the equations over sets, in plain loops


def members(mask: Tensor, query: int) -> set[int]:
    return {passage for passage in range(mask.shape[1]) if mask[query, passage]}


def mean_over_queries(terms: Callable[[int], list[float]], num_counted: int) -> float:
    queries = [fmean(values) for query in range(len(ROLES)) if (values := terms(query))]
    assert len(queries) == num_counted
    return fmean(queries)


def reference_contrastive(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        below = sum(math.exp((1 - s[i, k]) * z[i, k] / TEMPERATURE) for k in members(HARDS | EASIES, i))
        above = [math.exp(s[i, j] * z[i, j] / TEMPERATURE) for j in members(POSITIVES, i)]
        return [-math.log(value / (value + below)) for value in above]

    return mean_over_queries(terms, num_counted=6)


def reference_cross_entropy(z: np.ndarray, _: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        negatives = [math.exp(z[i, k] / TEMPERATURE) for k in members(USED, i) - members(POSITIVES, i)]
        positives = [math.exp(z[i, j] / TEMPERATURE) for j in members(POSITIVES, i)]
        return [-math.log(value / sum([value, *negatives])) for value in positives]

    return mean_over_queries(terms, num_counted=6)


def reference_list(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        candidates = sorted(members(USED, i))
        if not candidates:
            return []
        total_p = sum(math.exp(s[i, j] / TEMPERATURE) for j in candidates)
        total_q = sum(math.exp(z[i, j]) for j in candidates)
        p = [math.exp(s[i, j] / TEMPERATURE) / total_p for j in candidates]
        q = [math.exp(z[i, j]) / total_q for j in candidates]
        return [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))]

    return mean_over_queries(terms, num_counted=7)


def reference_positive_hard(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        entries = sorted(members(LISTS, i))
        defined = len({s[i, j] for j in entries}) > 1
        return [1 - float(np.corrcoef(s[i, entries], z[i, entries])[0, 1])] if defined else []

    return mean_over_queries(terms, num_counted=5)


def reference_hard_easy(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        pairs = [(j, k) for j in members(HARDS, i) for k in members(EASIES, i)]
        return [max(s[i, j] - s[i, k], 0) * math.log(1 + math.exp(z[i, k] - z[i, j])) for j, k in pairs]

    return mean_over_queries(terms, num_counted=4)


def reference_pairs(z: np.ndarray, p: np.ndarray) -> float:
    judged = [(i, j) for i in range(len(ROLES)) for j in members(LISTS, i)]
    yes = {(i, j): 1 / (1 + math.exp(-z[i, j])) for i, j in judged}
    return fmean(-p[pair] * math.log(yes[pair]) - (1 - p[pair]) * math.log(1 - yes[pair]) for pair in judged)


def reference_feature(y: np.ndarray, gram: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        unit = {j: y[i, j] / np.linalg.norm(y[i, j]) for j in members(LISTS, i)}
        return [(gram[i, j, k] - unit[j] @ unit[k]) ** 2 for j in unit for k in unit if j != k]

    return mean_over_queries(terms, num_counted=6)


def reference_regression(z: np.ndarray, s: np.ndarray) -> float:
    pairs = [(i, j) for i in range(len(ROLES)) for j in members(USED, i)]
    offset = fmean(z[pair] - s[pair] for pair in pairs)
    return fmean((z[pair] - s[pair] - offset) ** 2 for pair in pairs)


def reference_margins(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        pairs = [(j, k) for j in members(POSITIVES, i) for k in members(HARDS | EASIES, i)]
        return [((z[i, j] - z[i, k]) - (s[i, j] - s[i, k])) ** 2 for j, k in pairs]

    return mean_over_queries(terms, num_counted=5)


def reference_order(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        left = sorted(members(USED, i), key=lambda j: (-s[i, j], j))
        values: list[float] = []
        while left:
            values.append(-math.log(math.exp(z[i, left[0]]) / sum(math.exp(z[i, j]) for j in left)))
            left.pop(0)
        return values

    return mean_over_queries(terms, num_counted=7)


def reference_weighted_order(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        known, total = members(POSITIVES, i), sum(math.exp(s[i, j]) for j in members(USED, i))
        left = sorted(members(USED, i), key=lambda j: (j not in known, -s[i, j], j))
        value = 0.0
        while left:
            chosen = math.exp(z[i, left[0]]) / sum(math.exp(z[i, j]) for j in left)
            value -= math.exp(s[i, left[0]]) / total * math.log(chosen)
            left.pop(0)
        return [value] if total else []

    return mean_over_queries(terms, num_counted=7)


def reference_focused(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        negatives = sum(math.exp(z[i, k]) for k in members(HARDS | EASIES, i))
        found = [math.exp(z[i, j]) / (math.exp(z[i, j]) + negatives) for j in members(POSITIVES, i)]
        return [-((1 - p) ** 0.5) * math.log(p) for p in found]

    return mean_over_queries(terms, num_counted=6)


def reference_angles(z: np.ndarray, s: np.ndarray) -> float:
    def similarity(i: int, j: int) -> float:
        a, b = z[i], s[:, j]
        return 1 - math.acos(a @ b / math.sqrt((a @ a) * (b @ b))) / math.pi

    def terms(i: int) -> list[float]:
        negatives = members(HARDS | EASIES, i)
        return [
            sum(max(0.0, 0.4 - similarity(i, j) + similarity(i, k)) for k in negatives) for j in members(POSITIVES, i)
        ]

    return mean_over_queries(terms, num_counted=6)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def reference_passages_apart(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        values: list[float] = []
        for j in members(POSITIVES, i):
            near = math.exp(20 * cosine(s[:, j], z[i]))
            values.append(
                -math.log(near / (near + sum(math.exp(20 * cosine(s[:, j], s[:, k])) for k in members(HARDS, i))))
            )
        return values

    return mean_over_queries(terms, num_counted=6)


def reference_mixed(z: np.ndarray, s: np.ndarray) -> float:
    unit = s / np.sqrt((s * s).sum(axis=0))

    def terms(i: int) -> list[float]:
        rivals = [unit[:, k] for k in members(HARDS | EASIES, i)]
        rivals += [unit @ row for row in WEIGHTS[i].numpy() if row.any()]
        negatives = sum(math.exp(20 * cosine(z[i], vector)) for vector in rivals)
        found = [math.exp(20 * cosine(z[i], unit[:, j])) for j in members(POSITIVES, i)]
        return [-math.log(value / (value + negatives)) for value in found]

    return mean_over_queries(terms, num_counted=6)


def ordered_pairs(s: np.ndarray, i: int) -> list[tuple[int, int]]:
    return [(j, k) for j in members(USED, i) for k in members(USED, i) if s[i, j] > s[i, k]]


def reference_ranknet(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        return [math.log(1 + math.exp(z[i, k] - z[i, j])) for j, k in ordered_pairs(s, i)]

    return mean_over_queries(terms, num_counted=6)


def reference_lambdarank(z: np.ndarray, s: np.ndarray) -> float:
    """Exchanges two passages in the student's ranking and computes the DCG again."""

    def dcg(i: int, ranking: list[int]) -> float:
        return sum(s[i, j] / math.log2(2 + index) for index, j in enumerate(ranking))

    def terms(i: int) -> list[float]:
        ranking = sorted(members(USED, i), key=lambda j: -z[i, j])
        ideal = dcg(i, sorted(ranking, key=lambda j: -s[i, j]))
        total = 0.0
        for j, k in ordered_pairs(s, i):
            exchanged = [{j: k, k: j}.get(passage, passage) for passage in ranking]
            change = abs(dcg(i, exchanged) - dcg(i, ranking)) / ideal
            total += change * math.log(1 + math.exp(z[i, k] - z[i, j]))
        return [total] if ordered_pairs(s, i) else []

    return mean_over_queries(terms, num_counted=6)


def softmax(values: np.ndarray, i: int) -> dict[int, float]:
    total = sum(math.exp(values[i, j]) for j in members(USED, i))
    return {j: math.exp(values[i, j]) / total for j in members(USED, i)}


def divergence(target: dict[int, float], student: dict[int, float]) -> float:
    return sum(fraction * math.log(fraction / student[j]) for j, fraction in target.items() if fraction)


def reference_recalibrated(z: np.ndarray, s: np.ndarray) -> float:
    def terms(i: int) -> list[float]:
        target, known = softmax(s, i), members(POSITIVES, i)
        if not target:
            return []
        if known and max(target.values()) < 0.3:
            target = {j: 0.8 * (j in known) / len(known) + 0.2 / len(target) for j in target}
        return [divergence(target, softmax(z, i))]

    return mean_over_queries(terms, num_counted=7)


def reference_weighted(z: np.ndarray, s: np.ndarray) -> float:
    total = weights = 0.0
    for i in range(len(ROLES)):
        weight = sum(fraction for j, fraction in softmax(s, i).items() if j in members(POSITIVES, i))
        total += weight * divergence(softmax(s, i), softmax(z, i))
        weights += weight
    return total / weights


def reference_transport(z: np.ndarray, s: np.ndarray) -> float:
    queries = [i for i in range(len(ROLES)) if members(USED, i)]

    def distribution(values: np.ndarray, i: int) -> np.ndarray:
        weights = np.array(
            [math.exp(values[i, j] / 2) if j in members(USED, i) else 0.0 for j in range(values.shape[1])]
        )
        return weights / weights.sum()

    distances = np.array([[np.abs(distribution(s, i) - distribution(z, j)).sum() for j in queries] for i in queries])
    rows, columns = np.ones(len(queries)), np.ones(len(queries))
    kernel = np.exp(-distances / 0.5)
    for _ in range(3):  # the usual form of the iterations: two vectors that scale the kernel
        columns = 1 / (kernel.T @ rows)
        rows = 1 / (kernel @ columns)
    return float((rows[:, None] * kernel * columns * distances).sum() / len(queries))


@pytest.mark.parametrize(
    ("name", "inputs", "reference"),
    [
        ("contrastive_imitation", scores, reference_contrastive),
        ("in_batch_cross_entropy", scores, reference_cross_entropy),
        ("list_imitation", scores, reference_list),
        ("recalibrated_imitation", scores, reference_recalibrated),
        ("weighted_imitation", scores, reference_weighted),
        ("rank_imitation_positive_hard", scores, reference_positive_hard),
        ("rank_imitation_hard_easy", scores, reference_hard_easy),
        ("pair_cross_entropy", scores, reference_pairs),
        ("feature_imitation", features, reference_feature),
        ("score_regression", scores, reference_regression),
        ("margin_mse", scores, reference_margins),
        ("listmle", scores, reference_order),
        ("plackett_luce", scores, reference_weighted_order),
        ("in_batch_cross_entropy, focused", scores, reference_focused),
        ("angular_margin", vectors, reference_angles),
        ("passage_contrast", vectors, reference_passages_apart),
        ("mixed_negatives", vectors, reference_mixed),
        ("ranknet", scores, reference_ranknet),
        ("lambdarank", scores, reference_lambdarank),
        ("sinkhorn", scores, reference_transport),
    ],
)
def test_losses_equal_their_equations_over_sets(name: str, inputs: Inputs, reference: Reference) -> None:
    student, teacher = inputs()
    assert LOSSES[name](student, teacher).item() == pytest.approx(
        reference(student.numpy(), teacher.numpy()), rel=1e-12
    )


@pytest.mark.parametrize(("loss", "inputs", "used"), CASES)
def test_gradients(loss: Loss, inputs: Inputs, used: Tensor) -> None:
    student, teacher = inputs()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss(values, teacher), student)
    with torch.autograd.set_detect_anomaly(True):  # no NaN in intermediate results either
        loss(student, teacher).backward()
    assert gradient(student).abs().sum() > 0
    assert not gradient(student)[~used].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("loss", "inputs", "used"), CASES)
def test_masked_entries_are_ignored(loss: Loss, inputs: Inputs, used: Tensor, garbage: float) -> None:
    student, teacher = inputs()
    clean = student.clone().requires_grad_()
    expected = loss(clean, teacher)
    expected.backward()

    student[~used] = garbage
    teacher[~used] = garbage
    if teacher.ndim == 3:
        teacher.mT[~used] = garbage
    student.requires_grad_()
    actual = loss(student, teacher)
    actual.backward()

    assert actual.item() == expected.item()
    assert torch.equal(gradient(student), gradient(clean))
    assert not gradient(student)[~used].any()


@pytest.mark.parametrize("num_queries", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_without_queries_is_a_differentiable_zero(num_queries: int, dtype: torch.dtype) -> None:
    logits = torch.randn(num_queries, 4, dtype=dtype, requires_grad=True)
    teacher = torch.rand(num_queries, 4)
    nothing = torch.zeros(num_queries, 4, dtype=torch.bool)
    student = torch.randn(num_queries, 4, 2, dtype=dtype, requires_grad=True)
    results = [
        losses.contrastive_imitation(logits, teacher, nothing, ~nothing, temperature=1.0),
        losses.in_batch_cross_entropy(logits, nothing, ~nothing),
        losses.list_imitation(logits, teacher, nothing),
        losses.list_imitation(logits, torch.full_like(teacher, -math.inf), ~nothing),
        losses.recalibrated_imitation(logits, teacher, nothing, nothing),
        losses.recalibrated_imitation(logits, torch.full_like(teacher, -math.inf), ~nothing, ~nothing),
        losses.weighted_imitation(logits, teacher, nothing, ~nothing),
        losses.weighted_imitation(logits, torch.full_like(teacher, -math.inf), ~nothing, ~nothing),
        losses.rank_imitation_positive_hard(logits, teacher, nothing),
        losses.rank_imitation_positive_hard(logits, torch.ones_like(teacher), ~nothing),
        losses.rank_imitation_hard_easy(logits, teacher, ~nothing, nothing),
        losses.rank_imitation_hard_easy(logits, teacher, nothing, ~nothing),
        losses.feature_imitation(student, torch.ones(num_queries, 4, 4), nothing),
        losses.subclass_imitation(student, torch.ones(num_queries, 4, 4), teacher, nothing),
        losses.score_regression(logits, teacher, nothing),
        losses.score_regression(logits, torch.full_like(teacher, -math.inf), ~nothing),
        losses.margin_mse(logits, teacher, nothing, ~nothing),
        losses.margin_mse(logits, teacher, ~nothing, nothing),
        losses.listmle(logits, teacher, nothing),
        losses.listmle(logits, torch.full_like(teacher, -math.inf), ~nothing),
        losses.plackett_luce(logits, teacher, nothing, nothing),
        losses.plackett_luce(logits, torch.full_like(teacher, -math.inf), ~nothing, ~nothing),
        losses.ranknet(logits, teacher, nothing),
        losses.ranknet(logits, torch.ones_like(teacher), ~nothing),
        losses.lambdarank(logits, teacher, nothing),
        losses.lambdarank(logits, torch.zeros_like(teacher), ~nothing),
        losses.sinkhorn(logits, teacher, nothing),
    ]
    for result in results:
        assert (result.shape, result.dtype) == ((), dtype)
        assert result.item() == 0.0
        result.backward()
    assert torch.equal(gradient(logits), torch.zeros_like(logits))
    assert torch.equal(gradient(student), torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("loss", "inputs", "used"), CASES)
def test_half_precision_is_computed_in_float32(loss: Loss, inputs: Inputs, used: Tensor, dtype: torch.dtype) -> None:
    student, teacher = inputs()
    half = student.to(dtype)
    result = loss(half, teacher.float())
    assert result.dtype == dtype
    assert result.item() == loss(half.float(), teacher.float()).to(dtype).item()


@pytest.mark.parametrize(("loss", "inputs", "used"), CASES)
def test_autocast_changes_nothing(loss: Loss, inputs: Inputs, used: Tensor) -> None:
    student, teacher = (values.float() for values in inputs())
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(student, teacher)
    assert (actual.dtype, actual.item()) == (torch.float32, expected.item())


# Values worked out by hand


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def mask(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.bool)


def test_masked_mean() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [math.inf, 4.0, 8.0], [1.0, 1.0, 1.0]])
    selected = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    assert losses.masked_mean(values, selected).tolist() == [1.5, 8.0, 0.0]


def test_contrastive_imitation_does_not_push_a_false_negative_away():
    # s = 1 makes the negative contribute exp(0), however high its logit: log((e^0 + e^0) / e^0)
    logits = row(0, 50).requires_grad_()
    loss = losses.contrastive_imitation(logits, row(1, 1), mask(1, 0), mask(0, 1), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)
    loss.backward()
    assert gradient(logits).tolist() == [[-0.5, 0.0]]


def test_list_imitation_of_certain_labels_is_cross_entropy() -> None:
    logits, positive, everything = row(2, -1, 0.5), mask(1, 0, 0), mask(1, 1, 1)
    certain = row(20, -20, -math.inf)
    expected = losses.in_batch_cross_entropy(logits, positive, everything).item()
    assert losses.list_imitation(logits, certain, everything).item() == pytest.approx(expected, rel=1e-9)


def test_a_sure_teacher_is_not_recalibrated() -> None:
    logits, sure, known = row(0.3, -1, 2), row(50, 0, 0), mask(0, 1, 0)
    everything = mask(1, 1, 1)
    expected = losses.list_imitation(logits, sure, everything).item()
    assert losses.recalibrated_imitation(logits, sure, known, everything).item() == pytest.approx(expected, rel=1e-9)


def test_an_unsure_teacher_leaves_it_to_the_positives() -> None:
    logits, known, everything = row(0.3, -1, 2), mask(0, 1, 0), mask(1, 1, 1)
    expected = losses.in_batch_cross_entropy(logits, known, everything).item()
    loss = losses.recalibrated_imitation(logits, row(0, 0, 0), known, everything, smoothing=0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_a_query_on_which_the_teacher_is_wrong_does_not_count() -> None:
    logits = torch.cat([row(0.3, -1, 2), row(1, 0, 0)])
    teacher = torch.cat([row(3, 1, 0), row(50, 0, 0)])
    known = torch.cat([mask(1, 0, 0), mask(0, 1, 0)])
    everything = torch.ones_like(known)
    expected = losses.list_imitation(logits[:1], teacher[:1], everything[:1]).item()
    assert losses.weighted_imitation(logits, teacher, known, everything).item() == pytest.approx(expected, rel=1e-9)


def test_queries_without_negatives_count_as_zero_loss() -> None:
    logits, teacher = row(3, -2), row(0.9, 0.1)
    positive, nothing = mask(1, 0), mask(0, 0)
    assert losses.contrastive_imitation(logits, teacher, positive, nothing, temperature=1.0).item() == 0.0
    assert losses.in_batch_cross_entropy(logits, positive, positive).item() == 0.0
    both = torch.cat([mask(0, 1), nothing])
    loss = losses.in_batch_cross_entropy(logits.repeat(2, 1), positive.repeat(2, 1), both)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-5)) / 2, rel=1e-14)


def test_stable_for_large_logits() -> None:
    logits = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0]])
    for loss in (
        losses.contrastive_imitation(logits, teacher, mask(1, 0), mask(0, 1), temperature=0.5),
        losses.in_batch_cross_entropy(logits, mask(1, 0), mask(1, 1), temperature=0.5),
        2 * losses.rank_imitation_hard_easy(logits, teacher, mask(1, 0), mask(0, 1)),
    ):
        assert loss.item() == 4e4
        (slope,) = torch.autograd.grad(loss, logits)
        assert slope.tolist() == [[-2.0, 2.0]]


def test_positive_hard_gradient_of_constant_logits_is_finite() -> None:
    logits = torch.full((1, 3), 0.1, requires_grad=True)
    loss = losses.rank_imitation_positive_hard(logits, torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3).bool())
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert gradient(logits).isfinite().all()
    assert gradient(logits)[0, 0] > 0 > gradient(logits)[0, 2]
    assert gradient(logits)[0, 1].item() == pytest.approx(0.0, abs=1e-3)


def test_positive_hard_handles_tiny_score_differences():
    # the squares of these float32 scores underflow to 0, but their order is still defined
    teacher = torch.tensor([[1e-30, 2e-30, 3e-30]])
    loss = losses.rank_imitation_positive_hard(torch.tensor([[1.0, 2.0, 3.0]]), teacher, torch.ones(1, 3).bool())
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("teacher", "used"),
    [(row(0.3, 0.3, 0.3), mask(1, 1, 1)), (row(0.3, 0.3, 0.9), mask(1, 1, 0)), (row(0.1, 0.5, 0.9), mask(0, 1, 0))],
    ids=["constant", "constant under the mask", "one entry"],
)
def test_positive_hard_skips_queries_without_an_order(teacher: Tensor, used: Tensor) -> None:
    other_logits, other_teacher, other_mask = row(1, 2, 4), row(1, 2, 3), mask(1, 1, 1)
    alone = losses.rank_imitation_positive_hard(other_logits, other_teacher, other_mask)
    logits = torch.cat([row(5, 1, 2), other_logits]).requires_grad_()
    both = losses.rank_imitation_positive_hard(
        logits, torch.cat([teacher, other_teacher]), torch.cat([used, other_mask])
    )
    assert both.item() == alone.item()
    both.backward()
    assert not gradient(logits)[0].any()
    assert gradient(logits)[1].any()


def test_feature_imitation_uses_lists_of_at_least_two() -> None:
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 2, requires_grad=True)
    gram = torch.full((2, 2, 2), 0.5)
    loss = losses.feature_imitation(student, gram, torch.tensor([[True, True], [True, False]]))
    assert loss.item() == 0.25
    loss.backward()
    assert not gradient(student)[1].any()
    assert gradient(student)[0].any()


def projected(vectors: NDArray[np.float64], weights: NDArray[np.float64], sums: NDArray[np.float64] | None = None):
    """Projections on the principal directions of weighted vectors, by the covariance; and the directions as sums."""
    fractions = weights / weights.sum()
    centred = vectors - fractions @ vectors
    if sums is not None:  # the directions of other vectors
        directions = (sums.T @ centred).T
        return centred @ (directions / np.linalg.norm(directions, axis=0)), sums
    variances, directions = np.linalg.eigh(centred.T @ (fractions[:, None] * centred))
    first = np.argsort(-variances)[:2]
    projections = centred @ directions[:, first]
    # A direction is the sum of the centred vectors, each times its share and its projection, over the variance.
    return projections, fractions[:, None] * projections / variances[first]


def test_subclass_imitation_by_principal_components_of_the_features() -> None:
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(size=(2, 5, 6))
    teacher, student = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (teacher, student))
    yes = np.array([0.9, 0.2, 0.6, 0.05, 0.4])
    expected = np.zeros(5)
    for weights in (yes, 1 - yes):
        target, sums = projected(teacher, weights)
        predicted, _ = projected(student, weights, sums)
        scale = np.sqrt((weights / weights.sum()) @ target[:, 0] ** 2)
        logits = [np.concatenate([each, -each], axis=1) / scale for each in (target, predicted)]
        p, q = (np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in logits)
        expected += weights * (p * np.log(p / q)).sum(axis=1)
    padded = [np.concatenate([each, np.full((1, 6), 7.0)]) for each in (teacher, student)]  # one entry of padding
    loss = losses.subclass_imitation(
        3 * torch.tensor(padded[1])[None],
        torch.tensor(padded[0] @ padded[0].T)[None],
        torch.tensor([*yes, 0.5])[None],
        mask(1, 1, 1, 1, 1, 0),
    )
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-9)
    assert expected.mean() > 0.05


def test_subclass_imitation_of_the_teacher_s_own_features_is_0() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), dim=2)
    yes = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    turned = (2 * vectors @ torch.linalg.qr(torch.randn(6, 6))[0]).requires_grad_()  # only cosines count
    loss = losses.subclass_imitation(turned, vectors @ vectors.mT, yes, torch.ones(2, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(0, abs=1e-5)
    # Nobody is in a class, all are alike, or there is no second entry: nothing to imitate.
    for gram, given in ((vectors @ vectors.mT, torch.zeros(2, 4)), (torch.ones(2, 4, 4), yes)):
        loss = losses.subclass_imitation(turned, gram, given, torch.ones(2, 4, dtype=torch.bool))
        loss.backward()
        assert gradient(turned).isfinite().all()
    one = torch.tensor([[True, False, False, False]] * 2)
    assert losses.subclass_imitation(turned, vectors @ vectors.mT, yes, one).item() == 0


def test_feature_imitation_of_a_zero_feature_is_finite() -> None:
    student = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    loss = losses.feature_imitation(student, torch.full((1, 2, 2), 0.5), mask(1, 1))
    assert loss.item() == 0.25
    loss.backward()
    assert gradient(student).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(InputError, match=r"temperature is .* must be above 0"):
        losses.contrastive_imitation(row(1), row(1), mask(1), mask(0), temperature=temperature)
    with pytest.raises(InputError, match=r"temperature is .* must be above 0"):
        losses.in_batch_cross_entropy(row(1), mask(1), mask(0), temperature=temperature)


def test_score_regression_by_hand():
    # differences 1, 3 and -inf, which does not count: 2 is the offset, and each is 1 away from it
    loss = losses.score_regression(row(2, 1, 9), row(1, -2, -math.inf), mask(1, 1, 1))
    assert loss.item() == pytest.approx(1.0, rel=1e-14)


def test_margin_mse_by_hand():
    # margins 2 (teacher 5) and 1 (teacher 2); the passage of -inf has none
    loss = losses.margin_mse(row(3, 1, 2, 7), row(4, -1, 2, -math.inf), mask(1, 0, 0, 0), mask(0, 1, 1, 1))
    assert loss.item() == pytest.approx((3**2 + 1**2) / 2, rel=1e-14)


def test_listmle_by_hand():
    # the second is drawn from all three (1/2), then the first from two (1/2); the third is never drawn
    loss = losses.listmle(row(0, math.log(2), 0), row(1, 2, -math.inf), mask(1, 1, 1))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)


def test_listmle_of_one_relevant_passage_is_cross_entropy() -> None:
    logits, positive, everything = row(2, -1, 0.5), mask(1, 0, 0), mask(1, 1, 1)
    expected = losses.in_batch_cross_entropy(logits, positive, everything).item()
    assert losses.listmle(logits, row(20, -math.inf, -math.inf), everything).item() == pytest.approx(expected)


def test_mixtures_are_of_two_hard_negatives() -> None:
    weights = mixtures(torch.cat([mask(1, 0, 1, 1), mask(0, 1, 0, 0)]), 5, Random(0))
    assert (weights[1] == 0).all()
    assert ((weights[0] > 0).sum(dim=1) == 2).all()
    assert (weights[0, :, 1] == 0).all()
    torch.testing.assert_close(weights[0].sum(dim=1), torch.ones(5))


def test_ranknet_by_hand():
    # only the first is above others; the two of -inf have no order
    loss = losses.ranknet(row(1, 0, 3), row(5, -math.inf, -math.inf), mask(1, 1, 1))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2, rel=1e-14)


def test_sinkhorn_may_take_another_query_s_distribution() -> None:
    logits = torch.cat([row(0, 9), row(9, 0)])
    expected = [row(0, 9), row(9, 0)]
    same = losses.sinkhorn(logits, torch.cat(expected), mask(1, 1).repeat(2, 1)).item()
    exchanged = losses.sinkhorn(logits, torch.cat(expected[::-1]), mask(1, 1).repeat(2, 1)).item()
    assert same == pytest.approx(0.0, abs=1e-6)
    assert exchanged == pytest.approx(0.0, abs=1e-6)


def test_an_impossible_smoothing_is_refused() -> None:
    with pytest.raises(InputError, match="must be above 0"):
        losses.sinkhorn(row(1, 1), row(1, 0), mask(1, 1), smoothing=0.0)


def test_nested_cross_entropy_is_the_mean_over_widths_of_that_of_the_cosines() -> None:
    rng = np.random.default_rng(0)
    queries, passages = rng.normal(size=(8, 6)), rng.normal(size=(7, 6))
    expected: list[float] = []
    for width in (2, 5):
        a, b = queries[:, :width], passages[:, :width]
        logits = 20 * a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        rows: list[float] = []
        for row, roles in zip(logits, ROLES.numpy(), strict=True):
            negatives = np.exp(row[(roles == HARD) | (roles == EASY)]).sum()
            terms = [-z + math.log(math.exp(z) + negatives) for z in row[roles == POSITIVE]]
            rows += [fmean(terms)] if terms else []
        expected.append(fmean(rows))
    actual = losses.nested_cross_entropy(
        torch.from_numpy(queries), torch.from_numpy(passages), POSITIVES, USED, dims=(2, 5)
    )
    assert actual.item() == pytest.approx(fmean(expected), rel=1e-9)


def test_nested_cross_entropy_has_no_gradient_beyond_the_widths() -> None:
    queries, passages = torch.randn(8, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    losses.nested_cross_entropy(queries, passages, POSITIVES, USED, dims=(2, 4)).backward()
    for vectors in (queries, passages):
        assert vectors.grad is not None
        assert vectors.grad[:, 4:].abs().max() == 0
        assert vectors.grad[:, :4].abs().max() > 0


def test_drawing_loss_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0], [0.5, 9.0, 0.0]]])
    first = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(3)))
    second = -math.log(1 / (math.exp(0.5) + 1))  # the second passage was drawn, so its 9 counts no more
    expected = (first + second / 2) / 1.5
    assert losses.drawing_loss(logits, torch.tensor([[1, 2]])).item() == pytest.approx(expected, abs=1e-6)


def test_drawing_divergence_by_hand() -> None:
    """Against numpy's softmax over what is left, in float64."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets, orders = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), [[2, 0, 3], [1, 3, 0]]
    expected = 0.0
    for row, order in enumerate(orders):
        for step in range(3):
            left = [index for index in range(4) if index not in order[:step]]
            p, q = (np.exp(one[row, step].detach().double().numpy()[left]) for one in (targets, logits))
            p, q = p / p.sum(), q / q.sum()
            expected += float((p * np.log(p / q)).sum()) / 2
    loss = losses.drawing_divergence(logits, targets, torch.tensor(orders))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_last_passage_is_drawn_with_certainty() -> None:
    logits = torch.tensor([[[5.0, 5.0], [-3.0, 3.0]]], requires_grad=True)
    loss = losses.drawing_loss(logits, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(math.log(2) / 1.5, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_drawing_loss_is_the_mean_over_lists() -> None:
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    orders = torch.tensor([[0, 1], [3, 2], [1, 3]])
    alone = [losses.drawing_loss(logits[row : row + 1], orders[row : row + 1]).item() for row in range(3)]
    assert losses.drawing_loss(logits, orders).item() == pytest.approx(sum(alone) / 3, abs=1e-6)
