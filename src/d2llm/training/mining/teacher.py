"""The teacher's log-odds of candidates, from the label store or judged now and added to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float32

from d2llm.core.progress import ignore
from d2llm.core.types import Passage, Query, Task
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.evaluation.judging import JudgingCounts, LabelWriter, gram_matrix
from d2llm.models.remote.kept_answers import KeptAnswers
from d2llm.models.teachers.judge import Judge, PartlyJudged, TextPair, judge_until_error, ranks_lists
from d2llm.runners.placement import HERE
from d2llm.runners.runner import Workers


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Pairs to judge in one call, with their features."""

    texts: list[TextPair]
    task: Task

    def __len__(self) -> int:
        return len(self.texts)


def judge_texts(judge: Judge, pairs: PairTexts, advance: Callable[[int], None]) -> PartlyJudged:
    """Judge some pairs; ``advance`` is called with the number of pairs finished."""
    return judge_until_error(judge, pairs.texts, pairs.task, with_features=True, advance=advance)


@dataclass(frozen=True)
class Judging:
    """Where a teacher judges candidates: ``open`` starts workers that do ``judge_texts``.

    ``num_together`` calls to the teacher are made at a time, each about a few queries; on a cluster so many that its
    workers are busy. ``ranks_lists``: the teacher's log-odds compare only passages of one call.
    """

    open: Callable[[], AbstractContextManager[Workers[PairTexts, PartlyJudged]]]
    num_together: int = 1
    ranks_lists: bool = False

    @classmethod
    def here(cls, judge: Judge) -> Judging:
        """Judging by a teacher in this process."""
        return cls(partial(HERE.workers, judge, judge_texts), ranks_lists=ranks_lists(judge))


class TeacherCheck:
    """Log-odds of candidates and positives, for the teacher's margin.

    Pairs in the store ``labels`` of this teacher and prompt are not judged again, and new labels are added to it;
    ``counts`` are those of the pairs judged now. If ``judging`` is None, only stored labels are used. A candidate with
    log-odds above the mean of the positives minus ``margin`` is not a negative. A teacher that ranks lists judges the
    positives again with each of a query's candidates, and these labels are not stored: each is about another list.

    Workers are started by the first call that needs them; ``close`` ends them. Answers of an endpoint are kept until
    their labels are stored, or, of a teacher that ranks lists, until the block that uses ``answers`` has ended.
    """

    def __init__(
        self, labels: LabelStore, judging: Judging | None, task: Task, margin: float, passages: Mapping[str, Passage]
    ) -> None:
        self.labels = labels
        self.counts = JudgingCounts()
        self.num_together = 1 if judging is None else judging.num_together
        self._judging, self._margin, self._passages = judging, margin, passages
        self._open = ExitStack()
        self._judges: Workers[PairTexts, PartlyJudged] | None = None
        self._task: Task = task
        self._writer = LabelWriter(labels)
        self._finished: list[QueryLabels] = []
        self._new_log_odds: dict[str, dict[str, float]] = {}
        self._grades: dict[tuple[str, str], float] = {}
        self._features: dict[tuple[str, str], Float32[np.ndarray, " dim"]] = {}

    @property
    def answers(self) -> KeptAnswers:
        """The answers of an endpoint of which nothing is stored yet."""
        return self._writer.answers

    def judge(self, calls: Sequence[Sequence[tuple[Query, Sequence[str]]]]) -> None:
        """Let the teacher judge the passages that have no label yet; no query is in two of the calls to it."""
        if self._judging is None:
            return
        new = [[pair for query, ids in call for pair in self._without_label(query, ids)] for call in calls]
        new = [pairs for pairs in new if pairs]
        if not new:
            return
        if self._judges is None:
            self._judges = self._open.enter_context(self._judging.open())
        shards = (
            PairTexts([(query.text, self._passages[passage_id].full_text) for query, passage_id in pairs], self._task)
            for pairs in new
        )
        for pairs, partly in zip(new, self._judges.map(shards, ignore), strict=True):
            judgements = partly.judgements
            for number, (query, passage_id) in enumerate(pairs):
                if not partly.is_judged[number]:
                    continue
                self._new_log_odds.setdefault(query.id, {})[passage_id] = float(judgements.log_odds[number])
                if judgements.features is not None:
                    self._features[query.id, passage_id] = judgements.features[number]
                if judgements.grades is not None:
                    self._grades[query.id, passage_id] = float(judgements.grades[number])
            self.counts.add(JudgingCounts.count(partly))
            if partly.error is not None:
                raise partly.error

    def close(self) -> None:
        """End the workers, if any were started, and write all labels, also those of queries that are not finished.

        Raises the same errors as ``LabelWriter.write``.
        """
        self._open.close()
        self._judges = None
        for query_id in [*self._new_log_odds]:
            self.keep(query_id, ())
        if not self._ranks_lists:
            self._writer.write()

    @property
    def _ranks_lists(self) -> bool:
        return self._judging is not None and self._judging.ranks_lists

    def _without_label(self, query: Query, passage_ids: Sequence[str]) -> list[tuple[Query, str]]:
        if self._ranks_lists:
            return [(query, name) for name in passage_ids]
        judged = self._new_log_odds.get(query.id, ())
        return [(query, name) for name in self.labels.missing(query.id, passage_ids) if name not in judged]

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
        only has to judge the easy negatives.
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
