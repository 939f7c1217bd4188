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
from d2llm.models.teachers.judge import Judge, Judgements, TextPair
from d2llm.runners.placement import HERE
from d2llm.runners.runner import Workers


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Pairs to judge in one call, with their features."""

    texts: list[TextPair]
    task: Task

    def __len__(self) -> int:
        return len(self.texts)


def judge_texts(judge: Judge, pairs: PairTexts, advance: Callable[[int], None]) -> Judgements:
    """Judge some pairs; ``advance`` is called with the number of pairs finished."""
    return judge.judge(pairs.texts, pairs.task, with_features=True, advance=advance)


@dataclass(frozen=True)
class Judging:
    """Where a teacher judges candidates: ``open`` starts workers that do ``judge_texts``.

    ``num_together`` calls to the teacher are made at a time, each about a few queries; on a cluster so many that its
    workers are busy.
    """

    open: Callable[[], AbstractContextManager[Workers[PairTexts, Judgements]]]
    num_together: int = 1

    @classmethod
    def here(cls, judge: Judge) -> Judging:
        """Judging by a teacher in this process."""
        return cls(partial(HERE.workers, judge, judge_texts))


class TeacherCheck:
    """Log-odds of candidates and positives, for the teacher's margin.

    Pairs in the store ``labels`` of this teacher and prompt are not judged again, and new labels are added to it;
    ``counts`` are those of the pairs judged now. If ``judging`` is None, only stored labels are used. A candidate with
    log-odds above the mean of the positives minus ``margin`` is not a negative.

    Workers are started by the first call that needs them; ``close`` ends them.
    """

    def __init__(
        self, labels: LabelStore, judging: Judging | None, task: Task, margin: float, passages: Mapping[str, Passage]
    ) -> None:
        self.labels = labels
        self.counts = JudgingCounts()
        self.num_together = 1 if judging is None else judging.num_together
        self._judging, self._margin, self._passages = judging, margin, passages
        self._open = ExitStack()
        self._judges: Workers[PairTexts, Judgements] | None = None
        self._task: Task = task
        self._writer = LabelWriter(labels)
        self._new_log_odds: dict[str, dict[str, float]] = {}
        self._features: dict[tuple[str, str], Float32[np.ndarray, " dim"]] = {}

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
        for pairs, judgements in zip(new, self._judges.map(shards, ignore), strict=True):
            for number, (query, passage_id) in enumerate(pairs):
                self._new_log_odds.setdefault(query.id, {})[passage_id] = float(judgements.log_odds[number])
                if judgements.features is not None:
                    self._features[query.id, passage_id] = judgements.features[number]
            self.counts.add(JudgingCounts.count(judgements))

    def close(self) -> None:
        """End the workers, if any were started."""
        self._open.close()
        self._judges = None

    def _without_label(self, query: Query, passage_ids: Sequence[str]) -> list[tuple[Query, str]]:
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
        new = self._new_log_odds.pop(query_id, {})
        features = {passage_id: self._features.pop((query_id, passage_id), None) for passage_id in new}
        if not new:
            return
        rows = [row for passage_id in listed if (row := features.get(passage_id)) is not None]
        gram = gram_matrix(np.stack(rows).astype(np.float32)) if len(rows) == len(listed) else None
        ids = tuple(dict.fromkeys((*listed, *new))) if gram is not None else tuple(new)
        values = np.array([new[passage_id] for passage_id in ids], np.float32)
        self._writer.add([QueryLabels(query_id, ids, values, gram)])

    def write(self) -> None:
        """Write the labels that are not in the store yet; raises the same errors as ``LabelWriter.write``."""
        self._writer.write()
