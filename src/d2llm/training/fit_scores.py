"""The verb ``fit-scores``: fit evidence weights and probabilities to a student's scores on dev, without training it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.recipe import EvidenceConfig
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset
from d2llm.models.student import Student
from d2llm.training.fit_evidence import fit_evidence
from d2llm.training.fit_probabilities import fit_probabilities


@dataclass(frozen=True, slots=True)
class FitScoresReport:
    """What was fitted for one task (``TaskEvidence``, ``TaskCalibration``); None where nothing was: too few queries."""

    task: Task
    evidence: dict[str, Any] | None
    probabilities: dict[str, Any] | None


def fit_scores(
    student: Student,
    data: Sequence[Dataset | PairDataset],
    task: Task,
    *,
    words: bool = True,
    window_vectors: bool = True,
    num_queries: int = 200,
    seed: int = 0,
    show_progress: bool | None = None,
) -> FitScoresReport:
    """Give a student new ``evidence`` and ``calibration`` for one task; what it has for the other is kept.

    Args:
        student: with an inner product, if words are to be weighed.
        data: data sets with judged dev queries.
        task: of their pairs.
        words: weigh what BM25 adds to the score, and what windows do; otherwise what there is stays.
        window_vectors: weigh what the vectors of windows add, which an index then reads and stores; else words alone.
        num_queries: of each data set, at most.
        seed: of the choice of queries and passages.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: labelled pairs, which have no corpus; no judged dev queries; or the head ``paper`` with words.
    """
    judged: list[tuple[Dataset, Task]] = []
    for dataset in data:
        if isinstance(dataset, PairDataset):
            raise InputError(f"{dataset.name}: these are labelled pairs, which have no corpus; give queries with one")
        judged.append((dataset, task))
    if words and not student.has_anchor:
        raise InputError("words are added to an inner product, which the head 'paper' has not; leave them out")
    evidence = None
    if words:
        terms = EvidenceConfig(words=True, window_words=True, window_vectors=window_vectors).terms
        weighed = fit_evidence(
            student, judged, terms=terms, num_queries=num_queries, seed=seed, show_progress=show_progress
        )
        student.evidence = weighed.model_copy(update={"tasks": {**student.evidence.tasks, **weighed.tasks}})
        evidence = weighed.tasks.get(task)
    fitted = fit_probabilities(student, judged, num_queries=num_queries, seed=seed, show_progress=show_progress)
    student.calibration = fitted.model_copy(update={"tasks": {**student.calibration.tasks, **fitted.tasks}})
    calibration = fitted.tasks.get(task)
    return FitScoresReport(
        task,
        None if evidence is None else evidence.model_dump(),
        None if calibration is None else calibration.model_dump(),
    )
