"""What the teacher says of candidates: labels of the store, and new ones that are put there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from d2llm.core.types import Passage, Query, Task
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.models.teachers.judge import Judge

_SHARD_SECONDS = 30.0  # the most work that is lost when the run is killed


@dataclass
class TeacherCheck:
    """Log-odds of candidates and positives, for the teacher's margin.

    Args:
        labels: the store of this teacher and prompt; what is there is not judged again, what is judged goes there.
        judge_model: the teacher; None means the stored labels alone.
        task: which question to ask.
        margin: a candidate above (mean log-odds of the positives - margin) is no negative.
        passages: by id.
    """

    labels: LabelStore
    judge_model: Judge | None
    task: Task
    margin: float
    passages: Mapping[str, Passage]
    num_judged: int = 0
    num_truncated: int = 0
    seconds: float = 0.0
    _fresh: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    _features: dict[tuple[str, str], Float32[np.ndarray, " dim"]] = field(
        default_factory=dict[tuple[str, str], np.ndarray]
    )
    _unwritten: list[QueryLabels] = field(default_factory=list[QueryLabels])
    _last_written: float = field(default_factory=time.monotonic)

    def judge(self, wanted: Sequence[tuple[Query, Sequence[str]]]) -> None:
        """Let the teacher judge those passages of queries that have no label yet, all in one call."""
        if self.judge_model is None:
            return
        pairs = [
            (query, passage_id)
            for query, passage_ids in wanted
            for passage_id in self.labels.missing(query.id, passage_ids)
            if passage_id not in self._fresh.get(query.id, ())
        ]
        if not pairs:
            return
        begin = time.monotonic()
        texts = [(query.text, self.passages[passage_id].full_text) for query, passage_id in pairs]
        said = self.judge_model.judge(texts, self.task, with_features=True)
        for number, (query, passage_id) in enumerate(pairs):
            self._fresh.setdefault(query.id, {})[passage_id] = float(said.log_odds[number])
            if said.features is not None:
                self._features[query.id, passage_id] = said.features[number]
        self.num_judged += len(pairs)
        self.num_truncated += said.num_truncated
        self.seconds += time.monotonic() - begin

    def log_odds(self, query_id: str, passage_id: str) -> float | None:
        """The teacher's log-odds; None where there is no label."""
        fresh = self._fresh.get(query_id, {}).get(passage_id)
        return fresh if fresh is not None else self.labels.log_odds(query_id).get(passage_id)

    def limit(self, query_id: str, positives: Sequence[str]) -> float | None:
        """Above this a candidate is no negative; None where no positive has a label.

        The mean over the positives: with their minimum one wrong positive would drop every good negative, with their
        maximum an outstanding one would let through what is as relevant as the others.
        """
        values = [value for passage_id in positives if (value := self.log_odds(query_id, passage_id)) is not None]
        return float(np.mean(values)) - self.margin if values else None

    def keep(self, query_id: str, listed: Sequence[str]) -> None:
        """Put what was judged of a finished query into the store, with the Gram matrix of ``listed`` if possible.

        ``listed`` are its positives and hard negatives, as ``label`` would list them: with their matrix here, it has
        only the easy negatives left to judge.
        """
        fresh = self._fresh.pop(query_id, {})
        features = {passage_id: self._features.pop((query_id, passage_id), None) for passage_id in fresh}
        if fresh:
            rows = [row for passage_id in listed if (row := features.get(passage_id)) is not None]
            gram = _gram(rows) if len(rows) == len(listed) else None
            ids = tuple(dict.fromkeys((*listed, *fresh))) if gram is not None else tuple(fresh)
            values = np.array([fresh[passage_id] for passage_id in ids], np.float32)
            self._unwritten.append(QueryLabels(query_id, ids, values, gram))
        if time.monotonic() - self._last_written > _SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is not yet in the store."""
        self.labels.write(self._unwritten)
        self._unwritten, self._last_written = [], time.monotonic()


def _gram(rows: Sequence[Float32[np.ndarray, " dim"]]) -> Float32[np.ndarray, "m m"]:
    features = np.stack(rows).astype(np.float32)
    directions = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    return directions @ directions.T
