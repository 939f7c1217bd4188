"""Evidence: what counts in a score beside the vectors.

    z(q, p) = t <U y_q, V y_p> + w max_k t <U y_q, V y_pk> + l(q) sum_j w_j e_j(q, p) + B r_q r_p tanh(g(y_q, y_p))

One vector does not hold all that a teacher reads in a passage. The sums beside it are of other views of it, each of
things that an index stores of the passage once. y_pk are the vectors of its windows, each read alone
(``ops.words.windows``). e_j are its words (BM25) and the words of its best window, both as they are and divided by the
query's limit, which no passage reaches. The weights w are at least 0, each task's own, and fitted on dev
(``training.fit_evidence``). l(q) is what the words of this query count for among other queries: an exponential function
of how many words it has, what they weigh, and how many of them are unknown; 1 where it is not fitted. BM25 needs a
corpus, so a pair that is scored outside an index has the score of its vectors alone.

The weights are the file ``evidence.json`` in a student's folder. No passage's vector depends on them: an index holds
for the student with them and without. Vectors of windows take space and time, so an index may do without: its scores
go by other weights, fitted without them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from d2llm.core.files import write_json
from d2llm.core.types import EvidenceTerm, Task
from d2llm.models.fitted_file import FittedFile, FittedPart, read_fitted

FILE_NAME = "evidence.json"


class WordsFactor(FittedPart):
    """l(q) = exp(offset + slopes * statistics), the statistics being those of ``store.bm25.QueryWords``.

    The exponent stays between ``lowest`` and ``highest``, those of the queries that it was fitted on: a larger corpus
    gives words weights that the fit has not seen.
    """

    slopes: tuple[float, ...]
    offset: float
    lowest: float
    highest: float

    def __call__(self, statistics: NDArray[np.floating[Any]]) -> float:
        """Of the statistics [n] of one query."""
        exponent = self.offset + float(np.dot(statistics.astype(np.float64), self.slopes))
        return math.exp(min(max(exponent, self.lowest), self.highest))


class EvidenceWeights(FittedPart):
    """What counts in the score of an index's passages, by weight; the student's own score has weight 1."""

    terms: dict[EvidenceTerm, NonNegativeFloat] = Field(default_factory=dict[EvidenceTerm, float])
    words_factor: WordsFactor | None = None

    def __bool__(self) -> bool:
        """Whether anything counts but the student's own score."""
        return any(self.terms.values())

    @property
    def counts_words(self) -> bool:
        """Whether BM25 counts, of passages or of windows."""
        return any(weight for term, weight in self.terms.items() if term != "window_vectors")

    @property
    def counts_windows(self) -> bool:
        """Whether the vectors of windows count."""
        return bool(self.terms.get("window_vectors"))

    def without(self, terms: Collection[EvidenceTerm]) -> EvidenceWeights:
        """The same with some terms left out."""
        return self.model_copy(update={"terms": {term: w for term, w in self.terms.items() if term not in terms}})


class TaskEvidence(FittedPart):
    """The weights of one task, beside the student's own score, which has weight 1.

    ``words_factor`` is l(q), None for 1. ``dev`` has for each data set nDCG@10 of its lists by the student's own score,
    and with evidence whose weights were fitted without the queries measured; ``num_queries`` is how many dev queries
    there were of each. ``without_windows`` is of an index without the vectors of windows, None where these have no
    weight.
    """

    weights: dict[EvidenceTerm, NonNegativeFloat]
    words_factor: WordsFactor | None = None
    dev: dict[str, tuple[float, float]]
    num_queries: dict[str, int]
    without_windows: TaskEvidence | None = None


class Evidence(FittedFile):
    """The weights of the evidence in one student's score, by task; a task without an entry has none."""

    kind: Literal["evidence"] = "evidence"
    tasks: dict[Task, TaskEvidence]

    def weights(self, task: Task, *, windows: bool = True) -> EvidenceWeights:
        """Those of one task that are not 0; ``windows``: for an index that stores the vectors of windows."""
        fitted = self.tasks.get(task)
        if fitted is not None and not windows:
            fitted = fitted.without_windows or fitted
        if fitted is None:
            return EvidenceWeights()
        kept: dict[EvidenceTerm, float] = {term: weight for term, weight in fitted.weights.items() if weight}
        return EvidenceWeights(terms=kept, words_factor=fitted.words_factor)


NO_EVIDENCE = Evidence(student="", tasks={})
"""Of a student whose score is that of its vectors."""


def read_evidence(folder: Path, student: str) -> Evidence:
    """The weights in the folder of the student with this fingerprint; none where there is no file.

    Raises:
        DataFormatError: the file is damaged, newer, or another student's.
    """
    remedy = "restore the student's folder, or delete the file to go without"
    return read_fitted(folder / FILE_NAME, Evidence, student, remedy=remedy) or NO_EVIDENCE


def write_evidence(folder: Path, evidence: Evidence) -> None:
    """Write ``evidence.json`` into a student's folder, atomically; nothing where no task has been fitted."""
    if evidence.tasks:
        write_json(folder / FILE_NAME, evidence.model_dump(mode="json"))
