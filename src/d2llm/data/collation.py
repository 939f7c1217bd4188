"""Batches for distillation: which passages are read together, and what each is to each query."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry
from d2llm.data.same_text import SameText
from d2llm.data.training import TrainingSource

_CERTAIN = 20.0  # log-odds of a data set's own judgement


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """A data set whose plan the teacher has labelled."""

    source: TrainingSource
    labels: LabelStore
    same_text: SameText
    entries: tuple[PlanEntry, ...]
    """The queries to train on, in the order of their ids."""
    num_unlabelled: int
    """Queries of the plan whose labels are missing."""

    @classmethod
    def join(cls, source: TrainingSource, labels: LabelStore, *, keep_unlabelled: bool = False) -> LabelledSource:
        """Join a source and its labels.

        Args:
            source: the data set with its plan.
            labels: what the teacher said.
            keep_unlabelled: train the queries without all their labels on the data set's own judgements; otherwise
                they are left out.
        """
        plan = sorted(source.plan.entries, key=lambda entry: entry.query_id)
        labelled = [entry for entry in plan if not labels.missing(entry.query_id, entry.passage_ids)]
        kept = plan if keep_unlabelled else labelled
        return cls(source, labels, SameText(source.dataset), tuple(kept), len(plan) - len(labelled))


@dataclass(frozen=True, slots=True)
class DistillationBatch:
    """Q queries of one data set against the N passages that any of them brings.

    All arrays are [Q, N] but the last two. ``teacher_log_odds`` is -inf where there is no label (P(yes) = 0).
    ``own`` [Q, n] holds for each query the columns of its positive and hard negatives, -1 for padding and where the
    store has no cosines, and ``gram`` [Q, n, n] the cosines of the teacher's features over them.
    """

    source: TrainingSource
    query_ids: tuple[str, ...]
    passage_ids: tuple[str, ...]
    positive: NDArray[np.bool_]
    hard: NDArray[np.bool_]
    easy: NDArray[np.bool_]
    teacher_log_odds: NDArray[np.float32]
    own: NDArray[np.int64]
    gram: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one query brings to one batch."""

    entry: PlanEntry
    positive: str
    hard: list[str]
    easy: list[str]


def batches_per_epoch(sources: Sequence[LabelledSource], batch_queries: int) -> int:
    """How many batches ``epoch_batches`` gives, without drawing them; the last of a source may be smaller."""
    return sum(-(-len(source.entries) // batch_queries) for source in sources)


def epoch_batches(
    sources: Sequence[LabelledSource], *, epoch: int, batch_queries: int, num_hard: int, num_easy: int, seed: int
) -> list[tuple[LabelledSource, list[Draw]]]:
    """All batches of an epoch, each of one data set, in an order fixed by seed and epoch.

    Each query brings one of its positives and some of its negatives, drawn anew each epoch; the draw depends on the
    seed, the epoch and the query alone.
    """
    batches: list[tuple[LabelledSource, list[Draw]]] = []
    for source in sources:
        entries = list(source.entries)
        random.Random(f"{seed}:{epoch}:{source.source.dataset.name}").shuffle(entries)
        for start in range(0, len(entries), batch_queries):
            draws = [_draw(e, epoch, num_hard, num_easy, seed) for e in entries[start : start + batch_queries]]
            batches.append((source, draws))
    random.Random(f"{seed}:{epoch}").shuffle(batches)
    return batches


def _draw(entry: PlanEntry, epoch: int, num_hard: int, num_easy: int, seed: int) -> Draw:
    rng = random.Random(f"{seed}:{epoch}:{entry.query_id}")
    hard = rng.sample(entry.hard_negatives, min(num_hard, len(entry.hard_negatives)))
    easy = rng.sample(entry.easy_negatives, min(num_easy, len(entry.easy_negatives)))
    return Draw(entry, rng.choice(entry.positives), hard, easy)


def collate(labelled: LabelledSource, draws: Sequence[Draw]) -> DistillationBatch:
    """Put the draws of a batch side by side.

    A passage that another query brings is an easy negative, with its label where there is one, unless it is a known
    positive of this query or repeats the text of one: such a passage takes no part. For a query that the teacher has
    not labelled, the data set's own word stands in for the teacher's, and there are no features to imitate.
    """
    passage_ids = list(dict.fromkeys(p for draw in draws for p in (draw.positive, *draw.hard, *draw.easy)))
    column = {passage_id: index for index, passage_id in enumerate(passage_ids)}
    shape = (len(draws), len(passage_ids))
    positive, hard, easy = np.zeros(shape, bool), np.zeros(shape, bool), np.ones(shape, bool)
    log_odds = np.full(shape, -np.inf, np.float32)
    width = max(1 + len(draw.hard) for draw in draws)
    own = np.full((len(draws), width), -1, np.int64)
    gram = np.zeros((len(draws), width, width), np.float32)
    for row, draw in enumerate(draws):
        positive[row, column[draw.positive]] = True
        hard[row, [column[passage_id] for passage_id in draw.hard]] = True
        known = set(draw.entry.positives)
        for passage_id in (known | labelled.same_text.as_any_of(known)) & column.keys():
            easy[row, column[passage_id]] = False
        easy[row] &= ~hard[row]
        if labelled.labels.missing(draw.entry.query_id, draw.entry.passage_ids):
            log_odds[row, positive[row]], log_odds[row, hard[row]] = _CERTAIN, -_CERTAIN
            continue
        for passage_id, value in labelled.labels.log_odds(draw.entry.query_id).items():
            if passage_id in column:
                log_odds[row, column[passage_id]] = value
        own[row], gram[row] = _features(labelled.labels, draw, column, width)
    return DistillationBatch(
        source=labelled.source,
        query_ids=tuple(draw.entry.query_id for draw in draws),
        passage_ids=tuple(passage_ids),
        positive=positive,
        hard=hard,
        easy=easy,
        teacher_log_odds=log_odds,
        own=own,
        gram=gram,
    )


def _features(
    labels: LabelStore, draw: Draw, column: Mapping[str, int], width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Columns [width] and teacher's cosines [width, width] of a draw's positive and hard negatives, in this order."""
    own, gram = np.full(width, -1, np.int64), np.zeros((width, width), np.float32)
    passage_ids, cosines = labels.gram(draw.entry.query_id) or ((), np.zeros((0, 0), np.float32))
    place = {passage_id: index for index, passage_id in enumerate(passage_ids)}
    listed = [passage_id for passage_id in (draw.positive, *draw.hard) if passage_id in place]
    chosen = [place[passage_id] for passage_id in listed]
    own[: len(listed)] = [column[passage_id] for passage_id in listed]
    gram[: len(listed), : len(listed)] = cosines[np.ix_(chosen, chosen)]
    return own, gram
