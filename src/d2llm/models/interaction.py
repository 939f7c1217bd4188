"""IEM: the interaction emulation module, a small MLP that scores two vectors as the LLM would have.

Source: Liao et al., "D2LLM", ACL 2024, section 3.2. The first layer is linear in the query and passage features, so
each half is computed once: W [a; b] = W_q a + W_p b. With rich features the product part is merged into the passage
half, W_p b + W_m (a * b) = (W_p + W_m diag(a)) b, one matrix product per query (``models.scorer``).

With the features ``generated``, the network reads b alone and all of its weights depend on the query: Killingback et
al., "Hypencoder", SIGIR 2025. There they are made by attention over the query's tokens, here by a linear map of a.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.types import TASKS, Task
from d2llm.ops.scoring import Linear, bounded_logit
from d2llm.recipe import InteractionConfig

_SHARED = "shared"
_INPUTS = {
    "concat": ("a", "b"),
    "product": ("a", "b", "a * b"),
    "difference": ("a", "b", "|a - b|"),
    "rich": ("a", "b", "a * b", "|a - b|"),
    "generated": ("b",),
}
_LAYER_NAMES = {"a": "query", "b": "passage", "a * b": "product", "|a - b|": "difference"}
_OPEN = 3.0  # sigmoid(3) = 0.95
_MAX_FRACTION = 0.999  # of the largest bound; 1 cannot be reached
_INITIAL_SCALE = 20.0  # of the cosine: the usual temperature of contrastive training, 0.05


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of queries against passages.

    ``logits`` is the final score z; ``dot`` is its inner-product part (None for the paper head); ``features`` is
    y^S_ij, the student's counterpart of the teacher's score-token state (None for the cosine head). ``tokens`` is the
    mean best cosine of the query's tokens (``ops.scoring.mean_best_cosines``), which is not part of ``logits``; None if
    token embeddings do not count. In training with two heads, ``teacher`` has the scores of the head that imitates the
    teacher, and the others are those of the head that learns judgements (``Interaction.score_heads``).
    """

    logits: Float[Tensor, "queries passages"]
    dot: Float[Tensor, "queries passages"] | None
    features: Float[Tensor, "queries passages feature_dim"] | None
    tokens: Float[Tensor, "queries passages"] | None = None
    teacher: PairScores | None = None


@dataclass(frozen=True, slots=True)
class SplitLayers:
    """An interaction's weights for one task, with the first layer split into the columns for a, b, a * b and |a - b|.

    The first layer and each of ``inner`` are followed by a ReLU; the logit is ``last`` times the result, plus
    ``constant``.
    """

    query: Float[Tensor, "hidden dim"]
    passage: Float[Tensor, "hidden dim"]
    bias: Float[Tensor, " hidden"]
    inner: tuple[Linear, ...]
    last: Float[Tensor, " hidden"]
    constant: Float[Tensor, ""]
    product: Float[Tensor, "hidden dim"] | None = None
    difference: Float[Tensor, "hidden dim"] | None = None


class _DotProduct(nn.Module):
    """The inner product t <U a, V b> / dim of one branch, with U = V = I at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_map = nn.Parameter(torch.eye(dim))
        self.passage_map = nn.Parameter(torch.eye(dim))
        self.log_scale = nn.Parameter(torch.tensor(_INITIAL_SCALE).log())

    def queries(self, vectors: Float[Tensor, "queries dim"]) -> Float[Tensor, "queries dim"]:
        """V^T U a t / dim: the whole map is applied to the query, so passage vectors stay unchanged."""
        return vectors @ self.query_map.T @ self.passage_map * (self.log_scale.exp() / vectors.shape[-1])

    def mix(self, other: _DotProduct, weight: float) -> None:
        """Become ``weight`` times this inner product plus the rest of the other's, which is one inner product again.

        w t <U a, V b> + (1 - w) t' <U' a, V' b> = <M a, b>, with M = w t V^T U + (1 - w) t' V'^T U'.
        """
        with torch.no_grad():
            weighted = [(weight, self), (1 - weight, other)]
            scale = torch.stack([weight * part.log_scale.exp() for weight, part in weighted]).sum()
            maps = [
                weight * part.log_scale.exp() * (part.passage_map.T @ part.query_map) / scale
                for weight, part in weighted
            ]
            self.query_map.copy_(torch.stack(maps).sum(dim=0))
            self.passage_map.copy_(torch.eye(len(self.passage_map)))
            self.log_scale.copy_(scale.log())


class _GeneratedLinear(nn.Linear):
    """A layer whose weight and bias are made by a linear map of the query's vector."""

    def __init__(self, dim: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.generator = nn.Parameter(torch.empty(outputs * (inputs + 1), dim))
        largest = (inputs * dim) ** -0.5  # so that what a query adds is as large as what is the same for all
        nn.init.uniform_(self.generator, -largest, largest)

    def generate(
        self, queries: Float[Tensor, "*queries dim"]
    ) -> tuple[Float[Tensor, "*queries outputs inputs"], Float[Tensor, "*queries outputs"]]:
        """The weights and biases of queries."""
        made = nn.functional.linear(queries, self.generator).unflatten(-1, (self.out_features, self.in_features + 1))
        return self.weight + made[..., :-1], self.bias + made[..., -1]


class Interaction(nn.Module):
    """IEM with a branch per task: shared f1, a separate f2 for each task, one linear layer to the logit.

    f1 and f2 have two linear layers each, or one (``config.layers``).

    Head ``paper``: z = w f2(f1(features)). Head ``dot``: z = t <U a, V b> / dim + r B tanh(g), where g is the
    output of the paper head, initially 0; B in (0, max_bound) is learned; r in [0, 1] is set for each task on dev after
    training. With gates, B is replaced by B r_q(a) r_p(b), with r_q = sigmoid(w a + c) and r_p alike. In a task that is
    not among ``config.tasks``, z is the inner product alone; without any task there is no network, bound or gate.

    While it is trained with two heads (``split_heads``), z is ``label_weight`` of the score of the head that learns the
    data sets' judgements, plus the rest of that of the head that imitates the teacher. Both have an inner product of
    their own and the same interaction.
    """

    def __init__(self, config: InteractionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        hidden = config.hidden_dim
        self.dropout = nn.Dropout(config.dropout)
        if config.tasks:
            self.first = self._new_layer(len(_INPUTS[config.features]) * dim, hidden)
            self.shared = self._new_layer(hidden, hidden) if config.layers == 5 else None
            self.branches = nn.ModuleDict({name: self._new_branch() for name in self._branch_names(config.tasks)})
            self.output = self._new_layer(config.feature_dim, 1)
        self.dots: nn.ModuleDict | None = None
        self.teacher_dots: nn.ModuleDict | None = None
        self.label_weight = 0.5
        self.query_gate: nn.Linear | None = None
        self.passage_gate: nn.Linear | None = None
        if config.head == "dot":
            self.dots = nn.ModuleDict({name: _DotProduct(dim) for name in self._branch_names(TASKS)})
            for task in config.tasks:
                self.register_buffer(f"residual_{task}", torch.ones(()))
        if config.head == "dot" and config.tasks:
            _set_to_zero(self.output)
            self.raw_bound = nn.Parameter(torch.zeros(()))
            if config.gates:
                self.query_gate, self.passage_gate = _open_gate(dim), _open_gate(dim)

    @property
    def has_dot(self) -> bool:
        """Whether the score has an inner-product part (head ``dot``)."""
        return self.dots is not None

    def residual_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters except the inner product's, by name."""
        inner_products = ("dots.", "teacher_dots.")
        return {name: p for name, p in self.named_parameters() if not name.startswith(inner_products)}

    def split_heads(self) -> None:
        """Train with two heads from now on: the inner products of the teacher's begin as copies of the others.

        Source: Kang et al., "Simple yet Effective Semi-supervised Knowledge Distillation from Vision-Language Models
        via Dual-Head Optimization", 2025 (arXiv 2505.07675). There the heads are linear classifiers whose probabilities
        are mixed. Here they are inner products, and the logits are mixed, because that is one inner product again.

        Raises:
            InputError: the head is ``paper``, which has no inner product.
        """
        if self.dots is None:
            raise InputError("training.dual_head needs an inner product; set student.interaction.head to 'dot'")
        self.teacher_dots = deepcopy(self.dots)

    def merge_heads(self) -> None:
        """End the training with two heads: replace them by one with the same scores."""
        if self.dots is None or self.teacher_dots is None:
            return
        for name, dot in self.dots.items():
            cast(_DotProduct, dot).mix(cast(_DotProduct, self.teacher_dots[name]), self.label_weight)
        self.teacher_dots = None

    def drop_idle(self) -> list[str]:
        """Remove what changes no score of a dot head, and say what it was.

        That is a task's interaction of weight 0 or whose output is always 0, and gates that are the same for all texts.
        """
        if not self.has_dot:
            return []
        dropped: list[str] = []
        kept: tuple[Task, ...] = ()
        if self.config.tasks and any(bool(p.any()) for p in self.output.parameters()):
            kept = tuple(task for task in self.config.tasks if bool(self.interaction_weight(task)))
        for task in self.config.tasks:
            if task not in kept:
                dropped.append(f"the {task} interaction")
                delattr(self, f"residual_{task}")
        if self.config.tasks and not kept:
            self.query_gate = self.passage_gate = None
            for name in ("first", "shared", "branches", "output", "raw_bound"):
                delattr(self, name)
        elif self.config.tasks:
            for name in {*self.branches} - {*self._branch_names(kept)}:
                del self.branches[name]
        self.config = self.config.model_copy(update={"tasks": kept})
        if self._fold_constant_gates():
            dropped.append("gates of the bound")
            self.config = self.config.model_copy(update={"gates": False})
        return dropped

    def extended(self, config: InteractionConfig) -> Interaction:
        """A copy with the tasks and gates that ``config`` has in addition; the new ones change no score.

        A new branch beside a trained one gets the weight r = 0, which training sets to 1.
        """
        head = Interaction(config, self.dim).to(next(self.parameters()).device)
        head.load_state_dict(self.state_dict(), strict=False)
        head.train(self.training)
        if not self.config.tasks:
            return head  # the output of a new interaction is 0
        with torch.no_grad():
            new: list[Task] = [task for task in config.tasks if task not in self.config.tasks]
            for task in new:
                head.interaction_weight(task).zero_()
            for name in {*head.branches} - {*self.branches}:
                last = cast(nn.Linear, cast(nn.Sequential, head.branches[name])[-1 if self.shared is not None else 0])
                _set_to_zero(last)
            if config.gates and self.query_gate is None:
                fraction = torch.sigmoid(self.raw_bound) / torch.sigmoid(torch.tensor(_OPEN)) ** 2
                head.raw_bound.copy_(torch.logit(fraction.clamp(max=_MAX_FRACTION)))
        return head

    def _fold_constant_gates(self) -> bool:
        """Multiply the bound by gates that are the same for all texts, and remove them; whether there were any."""
        gates = [gate for gate in (self.query_gate, self.passage_gate) if gate is not None]
        if not gates or any(bool(gate.weight.any()) for gate in gates):
            return False
        with torch.no_grad():
            fraction = torch.sigmoid(self.raw_bound)
            for gate in gates:
                fraction = fraction * torch.sigmoid(gate.bias[0])
            self.raw_bound.copy_(torch.logit(fraction))
        self.query_gate = self.passage_gate = None
        return True

    def _new_branch(self) -> nn.Sequential:
        hidden = self.config.hidden_dim
        layers = [self._new_layer(hidden, hidden), nn.ReLU()]
        return nn.Sequential(*layers, *([self._new_layer(hidden, self.config.feature_dim)] if self.shared else []))

    def _new_layer(self, inputs: int, outputs: int) -> nn.Linear:
        return _GeneratedLinear(self.dim, inputs, outputs) if self.is_generated else nn.Linear(inputs, outputs)

    def _branch_names(self, tasks: Sequence[Task]) -> tuple[str, ...]:
        return tuple(tasks) if self.config.branches == "per_task" else (_SHARED,)

    def _branch(self, task: Task) -> str:
        return task if self.config.branches == "per_task" else _SHARED

    def bound(self, task: Task, *, interaction_weight: float | None = None) -> Tensor:
        """The bound r B: the most by which the interaction can change the logit of any pair.

        ``interaction_weight`` is r, by default the task's own.
        """
        if not self.has_interaction(task):
            return torch.zeros((), device=next(self.parameters()).device)
        weight = self.interaction_weight(task) if interaction_weight is None else interaction_weight
        return weight * self.config.max_bound * torch.sigmoid(self.raw_bound)

    def query_bound(
        self, queries: Float[Tensor, "*queries dim"], task: Task, *, interaction_weight: float | None = None
    ) -> Float[Tensor, "*queries"]:
        """The query's part of the bound of a pair, r B r_q(a); ``interaction_weight`` as in ``bound``."""
        gate = torch.ones_like(queries[..., 0]) if self.query_gate is None else _gate(self.query_gate, queries)
        return self.bound(task, interaction_weight=interaction_weight) * at_least_float32(gate)

    def passage_bound(self, passages: Float[Tensor, "*passages dim"]) -> Float[Tensor, "*passages"]:
        """The passage's part of the bound of a pair, r_p(b); 1 without gates."""
        gate = torch.ones_like(passages[..., 0]) if self.passage_gate is None else _gate(self.passage_gate, passages)
        return at_least_float32(gate)

    def changes_scores(self, task: Task, *, interaction_weight: float | None = None) -> bool:
        """Whether a score is more than its inner product; ``interaction_weight`` as in ``bound``."""
        if not self.has_dot:
            return True
        if not self.has_interaction(task):
            return False
        return bool(self.interaction_weight(task) if interaction_weight is None else interaction_weight)

    def has_interaction(self, task: Task) -> bool:
        """Whether there is an interaction in this task, whatever its weight."""
        return task in self.config.tasks

    def interaction_weight(self, task: Task) -> Tensor:
        """The weight r of the interaction in one task, from 0 to 1, chosen on dev after training; 0 if it has none."""
        if not self.has_interaction(task):
            return torch.zeros(())
        return self.get_buffer(f"residual_{task}")

    def query_vectors(self, queries: Float[Tensor, "queries dim"], task: Task) -> Float[Tensor, "queries dim"]:
        """The vectors whose inner product with a passage's vector is that of the score (dot head only).

        Raises:
            InputError: the head is ``paper``.
        """
        if self.dots is None:
            raise InputError("this student's head 'paper' has no inner product; use a student with the head 'dot'")
        by_head = [cast(_DotProduct, dots[self._branch(task)]).queries(queries) for dots in self._dots_by_head]
        return by_head[0] if len(by_head) == 1 else torch.lerp(by_head[1], by_head[0], self.label_weight)

    def forward(
        self, queries: Float[Tensor, "queries dim"], passages: Float[Tensor, "passages dim"], task: Task
    ) -> PairScores:
        """Score every query against every passage."""
        dot = None if self.dots is None else self._dot_logits(queries, passages, task)
        return self._score(queries.unsqueeze(1), passages.unsqueeze(0), dot, task)

    def score_lists(
        self, queries: Float[Tensor, "queries dim"], passages: Float[Tensor, "queries passages dim"], task: Task
    ) -> PairScores:
        """Score every query against its own list of passages."""
        dot = None
        if self.dots is not None:
            with torch.autocast(queries.device.type, enabled=False):
                query_vectors = self.query_vectors(at_least_float32(queries), task)
                dot = (at_least_float32(passages) @ query_vectors.unsqueeze(2)).squeeze(2)
        return self._score(queries.unsqueeze(1), passages, dot, task)

    def score_dots(
        self, queries: Float[Tensor, "queries dim"], passages: Float[Tensor, "passages dim"], task: Task
    ) -> PairScores:
        """Score every query against every passage by the inner product alone, for training without the interaction."""
        dot = self._dot_logits(queries, passages, task)
        return PairScores(dot, dot, None)

    def score_heads(
        self,
        scores: PairScores,
        queries: Float[Tensor, "queries dim"],
        passages: Float[Tensor, "passages dim"],
        task: Task,
    ) -> PairScores:
        """The scores of the two heads (``split_heads``), from those of their combination for the same texts."""
        assert scores.dot is not None
        change = scores.logits - scores.dot
        with torch.autocast(queries.device.type, enabled=False):
            labels, teacher = (
                cast(_DotProduct, dots[self._branch(task)]).queries(at_least_float32(queries))
                @ at_least_float32(passages).T
                for dots in self._dots_by_head
            )
        of_teacher = PairScores(teacher + change, teacher, scores.features)
        return PairScores(labels + change, labels, scores.features, teacher=of_teacher)

    @property
    def _dots_by_head(self) -> list[nn.ModuleDict]:
        return [dots for dots in (self.dots, self.teacher_dots) if dots is not None]

    def _score(
        self,
        queries: Float[Tensor, "queries 1 dim"],
        passages: Float[Tensor, "_ passages dim"],
        dot: Float[Tensor, "queries passages"] | None,
        task: Task,
    ) -> PairScores:
        if not self.has_interaction(task):
            assert dot is not None
            return PairScores(dot, dot, None)
        features = self._after_first(self._first_outputs(queries, passages), queries, task)
        logits = at_least_float32(_apply(self.output, self.dropout(features), queries).squeeze(-1))
        if dot is None:
            return PairScores(logits, None, features)
        bound = self.query_bound(queries, task) * self.passage_bound(passages)
        return PairScores(bounded_logit(dot, logits, bound), dot, features)

    @property
    def is_generated(self) -> bool:
        """Whether the weights depend on the query."""
        return bool(self.config.tasks) and self.config.features == "generated"

    def split_layers(self, task: Task, query: Float[Tensor, " dim"] | None = None) -> SplitLayers:
        """The weights in the form that a search uses (``models.scorer``), without dropout.

        With five layers, no ReLU follows a branch's last one, so it and the output layer are merged into one vector.

        Raises:
            InputError: the weights depend on the query (``is_generated``), and there is none.
        """
        if self.is_generated and query is None:
            raise InputError(
                "the interaction's weights are generated by each query, so they cannot be written into a file for "
                "other programs; export a student whose interaction.features is not 'generated'"
            )
        branch = [
            _weights_for(layer, query)
            for layer in cast(nn.Sequential, self.branches[self._branch(task)])
            if isinstance(layer, nn.Linear)
        ]
        (first, bias), (output, constant) = (_weights_for(layer, query) for layer in (self.first, self.output))
        last, constant = output[0], constant[0]
        inner = branch[:1]
        if self.shared is not None:
            inner, (weight, feature_bias) = [_weights_for(self.shared, query), branch[0]], branch[1]
            last, constant = last @ weight, last @ feature_bias + constant
        columns = self._columns(first)
        columns.setdefault("a", torch.zeros_like(columns["b"]))
        return SplitLayers(
            **{_LAYER_NAMES[name]: weight for name, weight in columns.items()},
            bias=bias,
            inner=tuple(Linear(*layer) for layer in inner),
            last=last,
            constant=constant,
        )

    def _dot_logits(
        self, queries: Float[Tensor, "queries dim"], passages: Float[Tensor, "passages dim"], task: Task
    ) -> Float[Tensor, "queries passages"]:
        # In full precision even inside autocast, because an index searches by this score.
        with torch.autocast(queries.device.type, enabled=False):
            return self.query_vectors(at_least_float32(queries), task) @ at_least_float32(passages).T

    def _columns(self, weight: Float[Tensor, "hidden inputs"]) -> dict[str, Float[Tensor, "hidden dim"]]:
        """The columns of the first layer's weight for each of its inputs."""
        return dict(zip(_INPUTS[self.config.features], weight.split(self.dim, dim=1), strict=True))

    def _first_outputs(
        self, queries: Float[Tensor, "queries 1 dim"], passages: Float[Tensor, "_ passages dim"]
    ) -> Float[Tensor, "queries passages hidden"]:
        if isinstance(self.first, _GeneratedLinear):
            return _apply(self.first, passages, queries)
        columns = self._columns(self.first.weight)
        hidden = nn.functional.linear(queries, columns["a"], self.first.bias)
        hidden = hidden + nn.functional.linear(passages, columns["b"])
        if "a * b" in columns:
            hidden = hidden + (queries * passages) @ columns["a * b"].T
        if "|a - b|" in columns:
            hidden = hidden + (queries - passages).abs() @ columns["|a - b|"].T
        return hidden

    def _after_first(
        self, hidden: Float[Tensor, "queries passages hidden"], queries: Float[Tensor, "queries 1 dim"], task: Task
    ) -> Float[Tensor, "queries passages feature_dim"]:
        hidden = torch.relu(hidden)
        if self.shared is not None:
            hidden = torch.relu(_apply(self.shared, self.dropout(hidden), queries))
        hidden = self.dropout(hidden)
        for layer in cast(nn.Sequential, self.branches[self._branch(task)]):
            hidden = _apply(layer, hidden, queries)
        return hidden


class CosineHead(nn.Module):
    """The cosine in place of the IEM, t cos(a, b) with a learned t: a plain bi-encoder, trained by the same code.

    Vectors have norm sqrt(dim), so the cosine is just a scaled inner product.
    """

    has_dot = True
    kind = "cosine"

    def has_interaction(self, task: Task) -> bool:
        """There is none."""
        return False

    def __init__(self, dim: int, scale: float = _INITIAL_SCALE) -> None:
        super().__init__()
        self.dim = dim
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def query_vectors(self, queries: Float[Tensor, "queries dim"], task: Task) -> Float[Tensor, "queries dim"]:
        """The vectors t a / dim, whose inner product with a passage's vector is the logit."""
        return queries * (self.log_scale.exp() / self.dim)

    def forward(
        self, queries: Float[Tensor, "queries dim"], passages: Float[Tensor, "passages dim"], task: Task
    ) -> PairScores:
        """Score every query against every passage."""
        with torch.autocast(queries.device.type, enabled=False):
            logits = self.query_vectors(at_least_float32(queries), task) @ at_least_float32(passages).T
        return PairScores(logits, logits, None)


class ProductHead(CosineHead):
    """t <a, b> of vectors as they are, with a learned t that starts at 1."""

    kind = "product"

    def __init__(self, dim: int) -> None:
        super().__init__(dim, float(dim))


class DivergenceHead(CosineHead):
    """-t KL(a || b) / k of two normal distributions of k dimensions, up to what is the same for all passages.

    Vectors are those of the pooling ``multivariate``; what is left of the divergence is one inner product with them.
    """

    kind = "divergence"

    def query_vectors(self, queries: Float[Tensor, "queries dim"], task: Task) -> Float[Tensor, "queries dim"]:
        """The vectors f [sqrt(k), -(m^2 + s^2), 2 m] t / 2 k, whose inner product with a passage's is the logit."""
        size = self.dim // 2
        factor = (size / self.dim) ** 0.5
        variance = 1 / (1 + factor * queries[:, 1 : size + 1]).clamp(min=1e-6)
        mean = factor * queries[:, size + 1 :] * variance
        constant = torch.full_like(mean[:, :1], size**0.5)
        sides = torch.cat([constant, -(mean**2) - variance, 2 * mean], dim=1)
        return sides * (factor * self.log_scale.exp() / (2 * size))


def make_head(config: InteractionConfig, dim: int) -> Interaction | CosineHead:
    """Create the head that a configuration names."""
    simple = {head.kind: head for head in (CosineHead, ProductHead, DivergenceHead)}.get(config.head)
    return Interaction(config, dim) if simple is None else simple(dim)


def _apply(
    layer: nn.Module, inputs: Float[Tensor, "_ passages inputs"], queries: Float[Tensor, "queries 1 dim"]
) -> Float[Tensor, "queries passages outputs"]:
    if not isinstance(layer, _GeneratedLinear):
        return layer(inputs)
    weight, bias = layer.generate(queries)
    return inputs @ weight.squeeze(1).mT + bias


def _weights_for(layer: nn.Linear, query: Float[Tensor, " dim"] | None) -> tuple[Tensor, Tensor]:
    if isinstance(layer, _GeneratedLinear) and query is not None:
        return layer.generate(query)
    return layer.weight, layer.bias


def _set_to_zero(layer: nn.Linear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()


def _open_gate(dim: int) -> nn.Linear:
    """A gate that is initially almost open for every vector."""
    gate = nn.Linear(dim, 1)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, _OPEN)
    return gate


def _gate(gate: nn.Linear, vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    # In full precision even inside autocast, because it is part of a strict bound.
    with torch.autocast(vectors.device.type, enabled=False):
        return torch.sigmoid(gate(at_least_float32(vectors)).squeeze(-1))


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32, or unchanged if they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
