"""The published method as plain loops, without a line of d2llm: what a distillation with the head ``paper`` must do.

Written from the formulas of Liao et al., "D2LLM", ACL 2024 (arXiv 2406.17262), sections 3.2 and 3.3, and of Loshchilov
and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, in float64: one text, one pair, one attention head and
one term of a loss at a time. Only the backbone's own layers (transformers) and the derivatives (autograd) are not
written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

BACKBONE, PMA, IEM = "backbone.model.", "pooling.pma.", "interaction."
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Example:
    """A query of a batch: its text, its passages by id, and what the teacher says of them."""

    text: str
    positives: Sequence[str]
    hard: Sequence[str]
    easy: Sequence[str]
    log_odds: Mapping[str, float]
    """Of the passages that the teacher scored."""
    features: Mapping[str, Sequence[float]]
    """y^T of the positives and hard negatives."""

    def score(self, passage: str) -> float:
        """s^T, 0 without a label."""
        return 1 / (1 + math.exp(-self.log_odds[passage])) if passage in self.log_odds else 0.0


@dataclass(frozen=True)
class Settings:
    weights: Mapping[str, float]
    normalisation: Literal["mean", "authors"]
    temperature: float
    num_heads: int
    lora_scale: float
    backbone_rate: float
    head_rate: float
    weight_decay: float
    max_gradient_norm: float
    warmup_steps: int
    total_steps: int


@dataclass
class PublishedTraining:
    """The student's weights by name, and the state of AdamW."""

    model: torch.nn.Module
    """The pretrained backbone, float64."""
    tokenize: Callable[[str], list[int]]
    weights: dict[str, Tensor]
    """Everything that is trained, float64."""
    settings: Settings
    moments: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict[str, tuple[int, Tensor, Tensor]])
    num_steps: int = 0

    def step(self, examples: Sequence[Example], passages: Mapping[str, str], task: str) -> dict[str, float]:
        """One step of the training; returns the losses before weighting, their weighted sum and the gradient's norm."""
        self.weights = {name: weight.detach().requires_grad_(True) for name, weight in self.weights.items()}
        values = self._losses(examples, passages, task)
        loss = sum((self.settings.weights[name] * value for name, value in values.items()), torch.zeros(()))
        loss.backward()
        by_name = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        norm = math.sqrt(sum(float((gradient * gradient).sum()) for gradient in by_name.values()))
        factor = min(1.0, self.settings.max_gradient_norm / norm)
        self.weights = {name: weight.detach() for name, weight in self.weights.items()}
        for name, gradient in by_name.items():  # the other task's branch has none and stands still
            self._adamw(name, factor * gradient)
        self.num_steps += 1
        logged = {name: float(value.detach()) for name, value in (values | {"loss": loss}).items()}
        return logged | {"gradient_norm": norm}

    def _adamw(self, name: str, gradient: Tensor) -> None:
        settings, weight = self.settings, self.weights[name]
        rate = settings.backbone_rate if name.startswith(BACKBONE) else settings.head_rate
        if self.num_steps < settings.warmup_steps:
            rate *= (self.num_steps + 1) / settings.warmup_steps
        else:
            rate *= (settings.total_steps - self.num_steps) / (settings.total_steps - settings.warmup_steps)
        count, first, second = self.moments.get(name, (0, torch.zeros_like(weight), torch.zeros_like(weight)))
        count += 1
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        self.moments[name] = count, first, second
        if weight.ndim > 1:  # matrices decay, vectors do not
            weight = weight - rate * settings.weight_decay * weight
        mean, square = first / (1 - 0.9**count), second / (1 - 0.999**count)
        self.weights[name] = weight - rate * mean / (square.sqrt() + 1e-8)

    def _losses(self, examples: Sequence[Example], passages: Mapping[str, str], task: str) -> dict[str, Tensor]:
        vectors = {text: self.encode(text) for text in {*passages.values(), *(each.text for each in examples)}}
        logits: list[dict[str, Tensor]] = []
        features: list[dict[str, Tensor]] = []
        for example in examples:
            pairs = {
                passage: self.emulate(vectors[example.text], vectors[passages[passage]], task)
                for passage in (*example.positives, *example.hard, *example.easy)
            }
            logits.append({passage: logit for passage, (logit, _) in pairs.items()})
            features.append({passage: feature for passage, (_, feature) in pairs.items()})
        is_authors = self.settings.normalisation == "authors"
        contrastive, ranks, hard_easy, alike, entropies = ([] for _ in range(5))
        for example, z, y in zip(examples, logits, features, strict=True):
            negatives = example.hard if is_authors else (*example.hard, *example.easy)
            contrastive.append(contrastive_imitation(example, z, negatives, self.settings.temperature))
            ranks.append(rank_imitation_positive_hard(example, z))
            hard_easy.append(rank_imitation_hard_easy(example, z))
            if len(example.features) > 1:
                alike.append(feature_imitation(example, y))
            entropies.append(cross_entropy(example, z))
        values = {
            "contrastive_imitation": _mean(contrastive),
            "rank_imitation_positive_hard": _mean(ranks),
            "rank_imitation_hard_easy": _mean(hard_easy),
            "feature_imitation": _mean(alike),
            "in_batch_cross_entropy": _mean(entropies),
        }
        if is_authors:  # each as it is meant for the published weights 1, 1, .01, .001
            num_hard = sum(len(example.hard) for example in examples) / len(examples)
            values["contrastive_imitation"] = values["contrastive_imitation"] / num_hard
            values["feature_imitation"] = sum(alike, torch.zeros(()))
            values["in_batch_cross_entropy"] = values["in_batch_cross_entropy"] / len(examples)
        return values

    def encode(self, text: str) -> Tensor:
        """y^agg of a text, read alone."""
        own = {name.removeprefix(BACKBONE): w for name, w in self.weights.items() if name.startswith(BACKBONE)}
        adapted = {name.removesuffix(_DOWN) for name in own if name.endswith(_DOWN)}
        changed = {name: weight for name, weight in own.items() if not name.endswith((_DOWN, _UP))}
        for name in adapted:
            pretrained = self.model.get_parameter(name + ".weight").detach()
            changed[name + ".weight"] = pretrained + self.settings.lora_scale * own[name + _UP] @ own[name + _DOWN]
        tokens = torch.tensor([self.tokenize(text)])
        return self.pool(torch.func.functional_call(self.model, changed, (tokens,)).last_hidden_state[0])

    def pool(self, states: Tensor) -> Tensor:
        """PMA: h = LN(MHA(q, Y, Y) + q); y = LN(h + FF(h))."""
        (seed,) = self.weights[PMA + "seeds"]
        query = self._linear(PMA + "query", seed)
        keys = [self._linear(PMA + "key", state) for state in states]
        values = [self._linear(PMA + "value", state) for state in states]
        width = len(seed) // self.settings.num_heads
        heads: list[Tensor] = []
        for number in range(self.settings.num_heads):
            part = slice(number * width, (number + 1) * width)
            exponents = [torch.exp(query[part] @ key[part] / math.sqrt(width)) for key in keys]
            total = sum(exponents, torch.zeros(()))
            heads.append(sum((e / total * v[part] for e, v in zip(exponents, values, strict=True)), torch.zeros(())))
        hidden = self._norm(PMA + "norm_attention", self._linear(PMA + "output", torch.cat(heads)) + seed)
        inner = _relu(self._linear(PMA + "feedforward.0", hidden))
        return self._norm(PMA + "norm_feedforward", hidden + self._linear(PMA + "feedforward.2", inner))

    def emulate(self, query: Tensor, passage: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """IEM: 2 d -> h, ReLU; the task's branch h -> h, ReLU: the features y^S; h -> 1: the logit z."""
        shared = _relu(self._linear(IEM + "first", torch.cat([query, passage])))
        features = _relu(self._linear(f"{IEM}branches.{task}.0", shared))
        (logit,) = self._linear(IEM + "output", features)
        return logit, features

    def _linear(self, name: str, vector: Tensor) -> Tensor:
        return self.weights[name + ".weight"] @ vector + self.weights[name + ".bias"]

    def _norm(self, name: str, vector: Tensor) -> Tensor:
        centred = vector - vector.sum() / len(vector)
        scaled = centred / torch.sqrt((centred**2).sum() / len(vector) + 1e-5)
        return self.weights[name + ".weight"] * scaled + self.weights[name + ".bias"]


def contrastive_imitation(
    example: Example, z: Mapping[str, Tensor], negatives: Sequence[str], temperature: float
) -> Tensor:
    """CI: each positive against the negatives, weighted by the teacher."""
    losses: list[Tensor] = []
    for j in example.positives:
        above = torch.exp(example.score(j) * z[j] / temperature)
        below = [torch.exp((1 - example.score(k)) * z[k] / temperature) for k in negatives]
        losses.append(-torch.log(above / (above + sum(below, torch.zeros(())))))
    return _mean(losses)


def rank_imitation_positive_hard(example: Example, z: Mapping[str, Tensor]) -> Tensor:
    """PH: 1 - the correlation of the teacher's and the student's logits."""
    listed = [*example.positives, *example.hard]
    student, teacher = [z[j] for j in listed], [torch.tensor(example.log_odds[j]) for j in listed]
    of_student, of_teacher = _mean(student), _mean(teacher)
    covariance = _mean([(s - of_student) * (t - of_teacher) for s, t in zip(student, teacher, strict=True)])
    variances = (_mean([(v - mean) ** 2 for v in vs]) for vs, mean in ((student, of_student), (teacher, of_teacher)))
    return 1 - covariance / math.prod(variance.sqrt() for variance in variances)


def rank_imitation_hard_easy(example: Example, z: Mapping[str, Tensor]) -> Tensor:
    """HI: hard negatives above easy ones, as far as the teacher says so."""
    losses: list[Tensor] = []
    for j in example.hard:
        for k in example.easy:
            weight = max(example.score(j) - example.score(k), 0.0)
            losses.append(-weight * torch.log(1 / (1 + torch.exp(z[k] - z[j]))))
    return _mean(losses)


def feature_imitation(example: Example, y: Mapping[str, Tensor]) -> Tensor:
    """FI: the cosines between the features of a query's pairs are to be the teacher's."""
    losses: list[Tensor] = []
    for j in example.features:
        for k in example.features:
            if j != k:
                teacher = _cosine(torch.tensor(example.features[j]), torch.tensor(example.features[k]))
                losses.append((teacher - _cosine(y[j], y[k])) ** 2)
    return _mean(losses)


def cross_entropy(example: Example, z: Mapping[str, Tensor]) -> Tensor:
    """Each positive against all negatives of the batch."""
    below = sum((torch.exp(z[k]) for k in (*example.hard, *example.easy)), torch.zeros(()))
    return _mean([-torch.log(torch.exp(z[j]) / (torch.exp(z[j]) + below)) for j in example.positives])


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / torch.sqrt((one**2).sum() * (other**2).sum())


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values, torch.zeros(())) / len(values)


def _relu(vector: Tensor) -> Tensor:
    return torch.where(vector > 0, vector, 0.0)
