"""From a student's score to a probability: a logistic function per task, fitted on dev queries.

Scores only rank passages; their absolute values mean little, because training optimises only the ranking. The file
``probabilities.json`` in a student's folder has the parameters that turn a score into a probability. (``d2llm index
... calibrate`` is something else: it measures a student's errors against a teacher.)

Source: Platt, "Probabilistic outputs for support vector machines", 1999.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from d2llm.core.errors import InputError
from d2llm.core.files import write_json
from d2llm.core.types import Task
from d2llm.models.fitted_file import FittedFile, FittedPart, read_fitted

FILE_NAME = "probabilities.json"
WEAK, WEAK_WITHOUT_WORDS = 0.15, 0.5
"""A passage that lacks words of the query is called a weak match below the first probability, one that has none of them
below the second: nonsense has no words in common with a corpus, but can get a high score from a student."""
_REMEDY = "restore the student's folder, or delete the file to go without probabilities"


class TaskCalibration(FittedPart):
    """p = 1 / (1 + exp(-(slope * score + offset))); the slope is positive, so rankings do not change.

    It was fitted on ``num_queries`` queries, by data set, and ``num_pairs`` pairs. The expected calibration errors are
    measured on those pairs: ``error_before`` with the plain logistic function of the score, ``error_after`` with the
    fitted one, where each query is measured with a fit that left it out.
    """

    slope: float = Field(gt=0)
    offset: float
    num_queries: dict[str, int]
    num_pairs: int
    error_before: float
    error_after: float


class ProbabilityCalibration(FittedFile):
    """The calibration of a student's scores, by task.

    A probability refers to a mixture of ``1 + num_hard + num_random`` passages per query: one is relevant,
    ``num_hard`` share the query's words (BM25's first ten, or judged and not relevant) and ``num_random`` are drawn
    from the corpus.
    """

    kind: Literal["probabilities"] = "probabilities"
    num_hard: int
    num_random: int
    tasks: dict[Task, TaskCalibration]

    @property
    def base_rate(self) -> float:
        """The share of relevant passages in the mixture of the fit."""
        return 1 / (1 + self.num_hard + self.num_random)

    def probabilities(self, scores: ArrayLike, task: Task) -> NDArray[np.float64]:
        """Probabilities [n] that passages with these scores [n] are relevant; ``InputError`` if none were fitted."""
        fitted = self.tasks.get(task)
        if fitted is None:
            raise InputError(
                f"this student's scores were not calibrated for {task} search, so it has no probabilities; use its "
                "scores, or calibrate them on judged dev queries (d2llm.training.fit_probabilities.fit_probabilities)"
            )
        log_odds = fitted.slope * np.asarray(scores, np.float64) + fitted.offset
        return np.exp(-np.logaddexp(0.0, -log_odds))  # no overflow, and exact for very negative log-odds


UNCALIBRATED = ProbabilityCalibration(student="", num_hard=0, num_random=0, tasks={})
"""For a student without a calibration."""


def read_calibration(folder: Path, student: str) -> ProbabilityCalibration:
    """Read the calibration in the folder of the student with this fingerprint; ``UNCALIBRATED`` if there is no file.

    Raises:
        DataFormatError: the file is damaged, newer, or another student's.
    """
    return read_fitted(folder / FILE_NAME, ProbabilityCalibration, student, remedy=_REMEDY) or UNCALIBRATED


def write_calibration(folder: Path, calibration: ProbabilityCalibration) -> None:
    """Write ``probabilities.json`` into a student's folder, atomically; nothing if no task was calibrated."""
    if calibration.tasks:
        write_json(folder / FILE_NAME, calibration.model_dump(mode="json"))
