"""The teacher's log-odds of candidates, from the label store or scored now and added to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float32

from d2llm.core.progress import Advance, ignore
from d2llm.core.types import Passage, Query, Task
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.evaluation.pool_scores import LabelWriter, ScoringCounts, gram_matrix
from d2llm.models.remote.kept_answers import KeptAnswers
from d2llm.models.teachers.pair_teacher import PairTeacher, PartialScores, TextPair, ranks_lists, score_until_error
from d2llm.runners.placement import HERE
from d2llm.runners.runner import Workers


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Pairs to score in one call, with their features."""

    texts: list[TextPair]
    task: Task

    def __len__(self) -> int:
        return len(self.texts)


def score_texts(teacher: PairTeacher, pairs: PairTexts, advance: Advance) -> PartialScores:
    """Score some pairs; ``advance`` is called with the number of pairs finished."""
    return score_until_error(teacher, pairs.texts, pairs.task, with_features=True, advance=advance)


@dataclass(frozen=True)
class TeacherWorkers:
    """Where a teacher scores candidates: ``open`` starts workers that do ``score_texts``.

    ``num_together`` calls to the teacher are made at a time, each about a few queries; on a cluster so many that its
    workers are busy. ``ranks_lists``: the teacher's log-odds compare only passages of one call.
    """

    open: Callable[[], AbstractContextManager[Workers[PairTexts, PartialScores]]]
    num_together: int = 1
    ranks_lists: bool = False

    @classmethod
    def here(cls, teacher: PairTeacher) -> TeacherWorkers:
        """A teacher in this process."""
        return cls(partial(HERE.workers, teacher, score_texts), ranks_lists=ranks_lists(teacher))


class TeacherCheck:
    """Log-odds of candidates and positives, for the teacher's margin.

    Pairs in the store ``labels`` of this teacher and prompt are not scored again, and new labels are added to it;
    ``counts`` are those of the pairs scored now. If ``workers`` is None, only stored labels are used. A candidate with
    log-odds above the mean of the positives minus ``margin`` is not a negative. A teacher that ranks lists scores the
    positives again with each of a query's candidates, and these labels are not stored: each is about another list.

    Workers are started by the first call that needs them; ``close`` ends them. Answers of an endpoint are kept until
    their labels are stored, or, of a teacher that ranks lists, until the block that uses ``answers`` has ended.
    """

    def __init__(
        self,
        labels: LabelStore,
        workers: TeacherWorkers | None,
        task: Task,
        margin: float,
        passages: Mapping[str, Passage],
    ) -> None:
        self.labels = labels
        self.counts = ScoringCounts()
        self.num_together = 1 if workers is None else workers.num_together
        self._teacher, self._margin, self._passages = workers, margin, passages
        self._open = ExitStack()
        self._workers: Workers[PairTexts, PartialScores] | None = None
        self._task: Task = task
        self._writer = LabelWriter(labels)
        self._finished: list[QueryLabels] = []
        self._new_log_odds: dict[str, dict[str, float]] = {}
        self._grades: dict[tuple[str, str], float] = {}
        self._features: dict[tuple[str, str], Float32[np.ndarray, " dim"]] = {}

    @property
    def answers(self) -> KeptAnswers:
        """Answers of an endpoint that are not stored yet."""
        return self._writer.answers

    def score(self, calls: Sequence[Sequence[tuple[Query, Sequence[str]]]]) -> None:
        """Let the teacher score the passages that have no label yet; no query is in two of the calls to it."""
        if self._teacher is None:
            return
        new = [[pair for query, ids in call for pair in self._without_label(query, ids)] for call in calls]
        new = [pairs for pairs in new if pairs]
        if not new:
            return
        if self._workers is None:
            self._workers = self._open.enter_context(self._teacher.open())
        shards = (
            PairTexts([(query.text, self._passages[passage_id].full_text) for query, passage_id in pairs], self._task)
            for pairs in new
        )
        for pairs, partly in zip(new, self._workers.map(shards, ignore), strict=True):
            scores = partly.scores
            for index, (query, passage_id) in enumerate(pairs):
                if not partly.is_scored[index]:
                    continue
                self._new_log_odds.setdefault(query.id, {})[passage_id] = float(scores.log_odds[index])
                if scores.features is not None:
                    self._features[query.id, passage_id] = scores.features[index]
                if scores.grades is not None:
                    self._grades[query.id, passage_id] = float(scores.grades[index])
            self.counts.add(ScoringCounts.count(partly))
            if partly.error is not None:
                raise partly.error

    def close(self) -> None:
        """Stop the workers and write all labels, including those of unfinished queries.

        Raises the same errors as ``LabelWriter.write``.
        """
        self._open.close()
        self._workers = None
        for query_id in [*self._new_log_odds]:
            self.keep(query_id, ())
        if not self._ranks_lists:
            self._writer.write()

    @property
    def _ranks_lists(self) -> bool:
        return self._teacher is not None and self._teacher.ranks_lists

    def _without_label(self, query: Query, passage_ids: Sequence[str]) -> list[tuple[Query, str]]:
        if self._ranks_lists:
            return [(query, name) for name in passage_ids]
        scored = self._new_log_odds.get(query.id, ())
        return [(query, name) for name in self.labels.missing(query.id, passage_ids) if name not in scored]

    def log_odds(self, query_id: str, passage_id: str) -> float | None:
        """The teacher's log-odds; None if there is no label."""
        new = self._new_log_odds.get(query_id, {}).get(passage_id)
        return new if new is not None else self.labels.log_odds(query_id).get(passage_id)

    def limit(self, query_id: str, positives: Sequence[str]) -> float | None:
        """The highest log-odds of a negative; None if no positive has a label.

        The limit is relative to the mean over the positives. With the minimum, one wrong positive would drop every good
        negative; with the maximum, one very relevant positive would let through passages as relevant as the others.
        """
        values = [value for passage_id in positives if (value := self.log_odds(query_id, passage_id)) is not None]
        return float(np.mean(values)) - self._margin if values else None

    def keep(self, query_id: str, listed: Sequence[str]) -> None:
        """Add the labels of a finished query to the store, with the Gram matrix of ``listed`` if possible.

        ``listed`` are its positives and hard negatives, in the order of ``label``. If their matrix is stored, ``label``
        only has to score the easy negatives.
        """
        labels = self._labels(query_id, listed)
        if labels is not None:
            self._finished.append(labels)
        if not self._new_log_odds:  # else answers would be forgotten that the others are made of
            self._writer.add(self._finished)
            self._finished = []

    def _labels(self, query_id: str, listed: Sequence[str]) -> QueryLabels | None:
        new = self._new_log_odds.pop(query_id, {})
        grades = [self._grades.pop((query_id, passage_id), np.nan) for passage_id in new]
        features = {passage_id: self._features.pop((query_id, passage_id), None) for passage_id in new}
        has_features = any(row is not None for row in features.values())
        if not new or self._ranks_lists or (has_features and not listed):
            return None  # labels without their Gram matrix would be those of a teacher without features
        rows = [row for passage_id in listed if (row := features.get(passage_id)) is not None]
        gram = gram_matrix(np.stack(rows).astype(np.float32)) if rows and len(rows) == len(listed) else None
        if gram is None:
            values = np.array([*new.values()], np.float32)
            return QueryLabels(query_id, tuple(new), values, grades=np.array(grades, np.float32))
        ids = tuple(dict.fromkeys((*listed, *new)))
        return QueryLabels(query_id, ids, np.array([new[name] for name in ids], np.float32), gram)
