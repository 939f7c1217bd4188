"""A student as a teacher that is there during the training: it scores every pair of a batch, labelled or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.models.student import Student


class LiveTeacher:
    """The scores of any query and passage of one data set by another student's vectors and interaction.

    Every text is read once, when it is first asked for, and its vector stays in memory.

    Source: Lin et al., "In-Batch Negatives for Knowledge Distillation with Tightly-Coupled Teachers for Dense
    Retrieval", RepL4NLP 2021 (TCT-ColBERT), whose teacher compares tokens; this one compares vectors.
    """

    def __init__(self, student: Student, dataset: Dataset, task: Task) -> None:
        self._student, self._dataset = student, dataset
        self._task: Task = task
        self._queries: dict[str, NDArray[np.float32]] = {}
        self._passages: dict[str, NDArray[np.float32]] = {}

    def __call__(self, query: str, passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """The scores [n] of a query's text with some passages of the data set."""
        if query not in self._queries:
            self._queries[query] = self._student.encode_queries([query]).vectors[0]
        new = [passage_id for passage_id in passage_ids if passage_id not in self._passages]
        if new:
            texts = [self._dataset.passages[passage_id].full_text for passage_id in new]
            self._passages.update(zip(new, self._student.encode_passages(texts).vectors, strict=True))
        passages = np.stack([self._passages[passage_id] for passage_id in passage_ids])
        return self._student.score(self._queries[query], passages, self._task)
