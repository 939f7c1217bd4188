"""The training objective of a batch: what losses are computed from, the published losses, and their weighted sum.

Source: Liao et al., "D2LLM", ACL 2024, section 3.3. Formulas: ``ops.losses``; of others: ``methods.losses``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.registry import Need
from d2llm.data.collation import DistillationBatch, LabelledSource, ScorePassages
from d2llm.data.plan import TrainingSource
from d2llm.models.interaction import Interaction, PairScores
from d2llm.models.student import Student
from d2llm.ops import losses
from d2llm.ops.scoring import mean_best_cosines
from d2llm.recipe import Recipe
from d2llm.recipe.losses import Loss
from d2llm.training.processes import Processes

Normalisation = Literal["mean", "authors"]
"""``mean``: a loss is a mean over queries. ``authors``: as in the published code, for which the published weights are
meant. There the in-batch cross-entropy is divided by the number of queries once more, the contrastive imitation
compares with hard negatives alone and is divided by their number, and the feature imitation is a sum over queries."""
OFFSET = "offset."
"""Prefix of the parameter name of a data set's offset, followed by the data set's name."""
_OFFSET_QUERIES = 100


@dataclass
class Preparation:
    """A training before its first step: what losses may read, check, and add inputs to (``Loss.prepare``)."""

    recipe: Recipe
    student: Student
    sources: list[LabelledSource]
    processes: Processes
    device: str | None = None
    dtype: str | None = None

    @property
    def with_lists(self) -> list[LabelledSource]:
        """The data sets whose queries have lists, in contrast to labelled pairs."""
        return [source for source in self.sources if source.source.pairs is None]

    def add_pair_input(self, name: str, source: LabelledSource, values: ScorePassages) -> None:
        """Let every batch of a data set have a number for each query and passage (``LossInput.pair_input``)."""
        self._replace(source, replace(source, pair_inputs={**source.pair_inputs, name: values}))

    def add_query_input(self, name: str, source: LabelledSource, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Let every batch of a data set have the vectors of those queries that have one (``LossInput.query_input``)."""
        self._replace(source, replace(source, query_inputs={**source.query_inputs, name: vectors}))

    def _replace(self, source: LabelledSource, changed: LabelledSource) -> None:
        index = next(index for index, other in enumerate(self.sources) if other is source)
        self.sources[index] = changed


@dataclass
class LossInput:
    """A batch of Q queries and N passages, and what the student makes of it; masks and scores are [Q, N].

    ``vectors`` [Q + N, dim] are those of queries and passages, and ``vectors_after`` has those after fewer layers, by
    their number; both are empty in the second stage, which trains the interaction on lists of each query's own.
    ``offset``, for labelled pairs, is the logit at which yes and no are equally likely.
    """

    batch: DistillationBatch
    scores: PairScores
    student: Student
    vectors: Tensor | None = None
    vectors_after: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    offset: Tensor | None = None

    def on_device(self, values: NDArray[np.generic]) -> Tensor:
        """An array of the batch as a tensor beside the scores."""
        return torch.from_numpy(values).to(self.scores.logits.device)

    @cached_property
    def positive(self) -> Tensor:
        """Relevant passages."""
        return self.on_device(self.batch.positive)

    @cached_property
    def hard(self) -> Tensor:
        """Hard negatives."""
        return self.on_device(self.batch.hard)

    @cached_property
    def easy(self) -> Tensor:
        """Easy negatives, including those of other queries."""
        return self.on_device(self.batch.easy)

    @cached_property
    def labelled(self) -> Tensor:
        """Pairs with a label of the teacher."""
        return self.on_device(self.batch.labelled)

    @cached_property
    def negatives(self) -> Tensor:
        """Hard and easy negatives."""
        return self.hard | self.easy

    @cached_property
    def candidates(self) -> Tensor:
        """Positives and negatives; the rest does not count."""
        return self.positive | self.negatives

    @cached_property
    def log_odds(self) -> Tensor:
        """The teacher's log-odds; where there is no label, those of the judgements."""
        return self.on_device(self.batch.teacher_log_odds)

    @cached_property
    def probabilities(self) -> Tensor:
        """The teacher's P(yes)."""
        return torch.sigmoid(self.log_odds)

    @cached_property
    def logits(self) -> Tensor:
        """The student's scores with what words and tokens add; with two heads, of the one that learns judgements."""
        return self._final(self.scores)

    @cached_property
    def imitating(self) -> Tensor:
        """The same; with two heads, of the one that imitates the teacher."""
        return self.logits if self.scores.teacher is None else self._final(self.scores.teacher)

    def of_lists(self, values: Tensor) -> Tensor:
        """Values [Q, N, ...] of each query's own list [Q, n, ...]; where it is shorter, those of another passage."""
        columns = self.on_device(self.batch.gram_columns)
        return values[torch.arange(len(columns), device=columns.device).unsqueeze(1), columns.clamp(min=0)]

    def pair_input(self, name: str) -> Tensor | None:
        """What ``Preparation.add_pair_input`` added [Q, N]; None if this data set has none."""
        values = self.batch.pair_inputs.get(name)
        return None if values is None else self.on_device(values)

    def query_input(self, name: str) -> Tensor | None:
        """What ``Preparation.add_query_input`` added [Q, dim], NaN for queries without; None if it added none."""
        values = self.batch.query_inputs.get(name)
        return None if values is None else self.on_device(values)

    def encoded(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' and the passages' part of vectors [Q + N, dim]."""
        queries, passages = vectors.split([len(self.batch.query_ids), len(self.batch.passage_ids)])
        return queries, passages

    def for_products(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the queries' ready for inner products."""
        queries, passages = self.encoded(vectors)
        return self.student.interaction.query_vectors(queries, self.batch.source.task), passages

    def _final(self, scores: PairScores) -> Tensor:
        return _without_common_change(scores, self.candidates) + self._score_features

    @cached_property
    def _score_features(self) -> Tensor:
        """What words and tokens add to the scores: the gradient is then that of what they leave unexplained."""
        added = torch.zeros_like(self.scores.logits, dtype=torch.float32)
        if self.batch.word_scores is not None:
            added = added + self.on_device(self.batch.word_scores)
        if self.scores.tokens is not None:
            added = added + self.batch.token_weight * self.scores.tokens
        return added


def _without_common_change(scores: PairScores, candidates: Tensor) -> Tensor:
    """Logits minus the mean change that the interaction makes to a query's candidates, float32 [queries, passages].

    The mean does not affect the ranking, but it does affect the contrastive imitation loss: lowering every logit lowers
    that loss, and a bounded interaction would end with all its tanh at -1, where it has neither effect nor gradient.
    """
    logits = scores.logits.float()
    if scores.dot is None:
        return logits
    return logits - losses.masked_mean(logits - scores.dot.float(), candidates)[:, None]


class InBatchCrossEntropy(Loss, kind="in_batch_cross_entropy"):
    """Each relevant passage against all others of the batch."""

    paper = "van den Oord et al. 2018, arXiv 1807.03748 (InfoNCE)"
    needs = frozenset({"judgements"})
    measured = (
        "judgements alone are .009 above half list imitation by a teacher of 1,200 queries (95 % interval .003 "
        "to .014; qnli +.007, banking77 +.010; [three seeds](log/2026-11.md#2026-11-25-judgements-alone-and-"
        "score-regression-with-three-seeds-two-ways-with-an-unsure-teacher))"
    )

    normalisation: Normalisation = "mean"
    focus: float = Field(default=0.0, ge=0)
    """Positives that are recognised with probability p count (1 - p)^focus times as much: above 0, the hard ones count
    more (focal weights, as in KaLM-Embedding-V2)."""

    def __call__(self, inputs: LossInput) -> Tensor:
        value = losses.in_batch_cross_entropy(inputs.logits, inputs.positive, inputs.candidates, focus=self.focus)
        return value / len(inputs.batch.query_ids) if self.normalisation == "authors" else value


class DotCrossEntropy(Loss, kind="dot_cross_entropy"):
    """The same for the inner-product part alone (dot head): keeps the vectors useful on their own."""

    measured = "not measured alone: it trains the vectors in the recipe `d2llm-llm-teacher`"
    needs = frozenset({"judgements"})
    of_vectors: ClassVar[bool] = True

    def __call__(self, inputs: LossInput) -> Tensor | None:
        dot = inputs.scores.dot
        if dot is None:
            return None
        return losses.in_batch_cross_entropy(dot.float(), inputs.positive, inputs.candidates)


class TokenCrossEntropy(Loss, kind="token_cross_entropy"):
    """The same for the token embeddings alone, where they count in training (``score_features.in_training``)."""

    measured = "not measured alone: it trains the tokens in the recipe `d2llm-joint`"
    needs = frozenset({"judgements"})
    of_vectors: ClassVar[bool] = True

    def __call__(self, inputs: LossInput) -> Tensor | None:
        tokens = inputs.scores.tokens
        if tokens is None:
            return None
        logits = inputs.batch.token_weight * tokens
        return losses.in_batch_cross_entropy(logits, inputs.positive, inputs.candidates)


class PairCrossEntropy(Loss, kind="pair_cross_entropy"):
    """Yes or no for each labelled pair. Each was judged alone, so other pairs of the batch are not negatives."""

    needs = frozenset({"judgements"})
    measured = (
        "half grades: OCNLI .551, LCQMC .924, ATEC .561, PAWS-X .544, STS-B .816; a tuned cosine by labels .516, "
        ".918, .569, .572, .813 ([one seed](ablations.md#labelled-pairs), of the cosine three)"
    )
    of_pairs: ClassVar[bool] = True
    dot: float = Field(default=0.5, ge=0)
    """Weight, beside that of the whole score, of the same for the inner-product part alone (dot head)."""
    teacher_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of the teacher's P(yes) in the target; the rest is the data set's own label. Above 0, it is an imitation
    like the others: pairs are labelled by the teacher, whose gate is measured."""

    @property
    def learns_from(self) -> frozenset[Need]:
        return self.needs | frozenset[Need]({"labels"}) if self.teacher_weight else self.needs

    def without_imitation(self) -> Loss:
        return self.model_copy(update={"teacher_weight": 0.0})

    def __call__(self, inputs: LossInput) -> Tensor:
        scores, two = inputs.scores, inputs.scores.teacher
        value = self._of(inputs, scores.logits, None if two is None else two.logits)
        if self.dot and scores.dot is not None:
            value = value + self.dot * self._of(inputs, scores.dot, None if two is None else two.dot)
        return value

    def _of(self, inputs: LossInput, logits: Tensor, of_teacher: Tensor | None) -> Tensor:
        assert inputs.batch.targets is not None
        targets = inputs.on_device(inputs.batch.targets)
        judged = torch.isfinite(targets)
        targets, weight = targets.nan_to_num(), self.teacher_weight
        middle = 0.0 if inputs.offset is None else inputs.offset
        logits = logits.float() - middle
        if of_teacher is None:
            return losses.pair_cross_entropy(logits, (1 - weight) * targets + weight * inputs.probabilities, judged)
        # The cross-entropy is linear in its target, so this is the same loss if both heads have the same scores.
        imitation = losses.pair_cross_entropy(of_teacher.float() - middle, inputs.probabilities, judged)
        return (1 - weight) * losses.pair_cross_entropy(logits, targets, judged) + weight * imitation


class ListImitation(Loss, kind="list_imitation"):
    """The teacher's distribution over all candidates of the batch."""

    paper = "Cao et al., ICML 2007 (ListNet); Ren et al., EMNLP 2021, arXiv 2110.07367 (RocketQAv2)"
    needs = frozenset({"labels"})
    measured = (
        "judgements alone are level in `d2llm-small` ([three seeds](ablations.md#results)), .009 ahead of a "
        "teacher of 1,200 queries ([three seeds](log/2026-11.md#2026-11-25-judgements-alone-and-score-regression-"
        "with-three-seeds-two-ways-with-an-unsure-teacher)), .006 ±.003 ahead of [better "
        "grades](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student)"
    )

    def __call__(self, inputs: LossInput) -> Tensor:
        return losses.list_imitation(inputs.imitating, inputs.log_odds, inputs.candidates)


_PUBLISHED = "Liao et al., ACL 2024, arXiv 2406.17262 (D2LLM)"


class ContrastiveImitation(Loss, kind="contrastive_imitation"):
    """Each positive against the negatives, as far as the teacher tells them apart."""

    paper = _PUBLISHED
    needs = frozenset({"labels"})
    measured = (
        "left out +.009 ±.003 on squad-sent and banking77, -.011 ±.016 on wikiqa and quora (three seeds; "
        "[ablations](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student))"
    )

    normalisation: Normalisation = "mean"
    temperature: float = Field(default=1.0, gt=0)
    """The dot head also has a learned scale."""

    def __call__(self, inputs: LossInput) -> Tensor:
        authors = self.normalisation == "authors"
        value = losses.contrastive_imitation(
            inputs.imitating,
            inputs.probabilities,
            inputs.positive,
            inputs.hard if authors else inputs.negatives,
            temperature=self.temperature,
        )
        if authors:
            with_hard = inputs.hard.any(dim=1).sum().clamp(min=1)
            value = value * (with_hard / inputs.hard.sum().clamp(min=1))
        return value


class RankImitationPositiveHard(Loss, kind="rank_imitation_positive_hard"):
    """The teacher's order of positives and hard negatives, by correlation."""

    paper = _PUBLISHED
    needs = frozenset({"labels"})
    measured = (
        "left out -.015 ±.005 on squad-sent and banking77, -.018 ±.012 on wikiqa and quora (three seeds; "
        "[ablations](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student))"
    )
    least_hard: ClassVar[int] = 1

    def __call__(self, inputs: LossInput) -> Tensor:
        mask = inputs.positive | inputs.hard
        return losses.rank_imitation_positive_hard(inputs.imitating, inputs.log_odds, mask)


class RankImitationHardEasy(Loss, kind="rank_imitation_hard_easy"):
    """Hard negatives above easy ones, as far as the teacher scores them so."""

    paper = _PUBLISHED
    needs = frozenset({"labels"})
    measured = (
        "left out +.000 ±.002 on squad-sent and banking77, -.000 ±.003 on wikiqa and quora (three seeds; "
        "[ablations](ablations.md#the-published-objective-taught-by-grades-that-are-better-than-the-student))"
    )
    least_hard: ClassVar[int] = 1

    def __call__(self, inputs: LossInput) -> Tensor:
        return losses.rank_imitation_hard_easy(inputs.imitating, inputs.probabilities, inputs.hard, inputs.easy)


class FeatureImitation(Loss, kind="feature_imitation"):
    """Pairs of a query are to be as similar as they are for the teacher; for heads with an IEM."""

    paper = _PUBLISHED
    needs = frozenset({"labels", "features"})
    measured = (
        "left out +.0019 ±.0030 on squad-sent and banking77, three seeds, taught by SmolLM2-135M "
        "([ablations](ablations.md#feature-imitation-with-a-language-model-as-the-teacher))"
    )

    normalisation: Normalisation = "mean"

    def __call__(self, inputs: LossInput) -> Tensor | None:
        features, batch = inputs.scores.features, inputs.batch
        if features is None:
            return None
        mask = inputs.on_device(batch.gram_columns) >= 0
        value = losses.feature_imitation(inputs.of_lists(features).float(), inputs.on_device(batch.gram), mask)
        if self.normalisation == "authors":
            value = value * float(((batch.gram_columns >= 0).sum(axis=1) >= 2).sum())  # the others have none
        return value


def batch_tokens(student: Student, batch: DistillationBatch) -> list[list[int]]:
    """Token ids of the batch's texts: each query once, then each passage once."""
    source = batch.source
    tokenize = student.backbone.tokenize  # training truncates queries earlier than a search does
    texts = source.instructed_queries(batch.query_ids, student.config.backbone.query_prefix)
    queries = tokenize(texts, "query", prefix="")
    passages = tokenize([source.passage_text(passage_id) for passage_id in batch.passage_ids], "passage")
    return queries.ids + passages.ids


def embedded_positions(student: Student, batch: DistillationBatch, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of the tokens of each text that have vectors; none if token embeddings do not count in this batch."""
    projection = student.token_projection
    if projection is None or not batch.token_weight:
        return [[] for _ in ids]
    num_queries = len(batch.query_ids)
    return [
        *(projection.query_positions(row) for row in ids[:num_queries]),
        *(projection.positions(row) for row in ids[num_queries:]),
    ]


def score_vectors(
    student: Student, vectors: Tensor, batch: DistillationBatch, *, dots_only: bool = False
) -> PairScores:
    """Score all queries against all passages by their vectors [queries + passages, dim]; differentiable.

    ``dots_only`` scores by the inner product, without the interaction (dot head).
    """
    queries, passages = vectors.split([len(batch.query_ids), len(batch.passage_ids)])
    dtype = student.backbone.compute_dtype
    with torch.autocast(vectors.device.type, dtype, enabled=dtype != torch.float32):
        head = student.interaction
        task = batch.source.task
        if not isinstance(head, Interaction):
            return head(queries, passages, task)
        scores = head.score_dots(queries, passages, task) if dots_only else head(queries, passages, task)
        return scores if head.teacher_dots is None else head.score_heads(scores, queries, passages, task)


def with_tokens(
    student: Student,
    scores: PairScores,
    tokens: Sequence[Tensor],
    batch: DistillationBatch,
    ids: Sequence[Sequence[int]],
) -> PairScores:
    """The scores with the mean best cosines of tokens, if they count in this batch; differentiable.

    Args:
        student: the student.
        scores: the scores of the vectors.
        tokens: the vectors [tokens, token_dim] of each text's tokens (``embedded_positions``).
        batch: the batch.
        ids: token ids of its texts.
    """
    projection = student.token_projection
    if projection is None or not batch.token_weight:
        return scores
    num_queries = len(batch.query_ids)
    num_tokens = [len(projection.positions(row)) for row in ids[:num_queries]]
    return replace(scores, tokens=mean_best_cosines(tokens[:num_queries], tokens[num_queries:], num_tokens=num_tokens))


def batch_losses(objective: Mapping[str, Loss], inputs: LossInput) -> dict[str, Tensor]:
    """The value of each loss before its weight, by kind; of labelled pairs those for pairs, else the others.

    Raises:
        InputError: a loss has several values.
    """
    of_pairs = inputs.batch.targets is not None
    values = {kind: loss(inputs) for kind, loss in objective.items() if loss.of_pairs == of_pairs}
    for kind, value in values.items():
        if value is not None and value.ndim:
            raise InputError(f"losses.{kind} is a tensor of shape {[*value.shape]}, but must be one number: a mean")
    return {kind: value for kind, value in values.items() if value is not None}


def weighted_sum(values: Mapping[str, Tensor], objective: Mapping[str, Loss]) -> Tensor:
    """The total loss.

    Raises:
        InputError: no loss has a value.
    """
    if not values:
        raise InputError(
            "no loss has a weight above 0 that these data have (labelled pairs have pair_cross_entropy alone, and the "
            "inner product's are for the head 'dot'); set one in [losses]"
        )
    return torch.stack([objective[kind].weight * value for kind, value in values.items()]).sum()


def offset_name(source: TrainingSource) -> str:
    """The parameter name of a pair set's offset."""
    return f"{OFFSET}{source.dataset.name}"


def make_offsets(student: Student, sources: Sequence[LabelledSource]) -> dict[str, nn.Parameter]:
    """For each set of labelled pairs, the logit where yes and no are equally likely, initialised to the mean score."""
    offsets: dict[str, nn.Parameter] = {}
    for labelled in sources:
        source, entries = labelled.source, labelled.entries[:_OFFSET_QUERIES]
        if not any(entry.targets for entry in entries):
            continue
        asked = source.instructed_queries((entry.query_id for entry in entries), student.config.backbone.query_prefix)
        queries = student.encode_queries(asked, instruction="").vectors
        scores: list[float] = []
        for query, entry in zip(queries, entries, strict=True):
            texts = [source.passage_text(passage_id) for passage_id in entry.positives + entry.hard_negatives]
            scores += student.score(query, student.encode_passages(texts).vectors, source.task).tolist()
        offsets[offset_name(source)] = nn.Parameter(torch.tensor(fmean(scores), device=student.backbone.device))
    return offsets
