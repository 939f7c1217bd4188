"""Evidence: what a score stands on beside the vectors.

    z(q, p) = t <U y_q, V y_p> + sum_j w_j e_j(q, p) + B r_q r_p tanh(g(y_q, y_p))

One vector does not hold all that a teacher reads in a passage. e are other views of it, each of things that an index
stores of the passage once: its words (BM25) and the words of its best window, both as they are and divided by the
query's limit, which no passage reaches; and max_k t <U y_q, V y_pk>, y_pk being the vectors of its windows, each read
alone (``ops.words.windows``). The weights w are at least 0, each task's own, and fitted on dev
(``pipeline.fit_evidence``). BM25 needs a corpus, so a pair that is scored outside an index has the score of its
vectors alone.

The weights are the file ``evidence.json`` in a student's folder. No passage's vector depends on them: an index holds
for the student with them and without. Vectors of windows take space and time, so an index may do without: its scores
go by other weights, fitted without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat

from d2llm.core.files import write_json
from d2llm.core.types import EvidenceTerm, Task
from d2llm.models.fitted_file import FittedFile, FittedPart, read_fitted

FILE_NAME = "evidence.json"


class TaskEvidence(FittedPart):
    """The weights of one task, beside the student's own score, which has weight 1.

    ``dev`` has for each data set nDCG@10 of its lists by the student's own score, and with evidence whose weights
    were fitted without the queries measured; ``num_queries`` is how many dev queries there were of each.
    ``without_windows`` is of an index without the vectors of windows, None where these have no weight.
    """

    weights: dict[EvidenceTerm, NonNegativeFloat]
    dev: dict[str, tuple[float, float]]
    num_queries: dict[str, int]
    without_windows: TaskEvidence | None = None


class Evidence(FittedFile):
    """The weights of the evidence in one student's score, by task; a task that is not there has none."""

    kind: Literal["evidence"] = "evidence"
    tasks: dict[Task, TaskEvidence]

    def weights(self, task: Task, *, windows: bool = True) -> dict[EvidenceTerm, float]:
        """Those of one task that are not 0; ``windows``: for an index that stores the vectors of windows."""
        found = self.tasks.get(task)
        if found is not None and not windows:
            found = found.without_windows or found
        return {term: weight for term, weight in found.weights.items() if weight} if found else {}


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
