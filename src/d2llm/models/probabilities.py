"""From a student's score to a probability: a logistic function for each task, fitted on dev queries.

A score orders passages; how large it is says little, since training asks only for the order. The file
``probabilities.json`` in a student's folder has what makes a probability of it. (``d2llm index ... calibrate`` is
something else: how far a student errs against a teacher.)

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
_REMEDY = "restore the student's folder, or delete the file to go without probabilities"


class TaskCalibration(FittedPart):
    """p = 1 / (1 + exp(-(slope * score + offset))); the slope is above 0, so that no order changes.

    ``num_queries`` by data set, and ``num_pairs``, are what it was fitted on. The expected calibration errors are of
    those pairs: ``error_before`` with the plain logistic function of the score, ``error_after`` with this one, each
    query by a fit without it.
    """

    slope: float = Field(gt=0)
    offset: float
    num_queries: dict[str, int]
    num_pairs: int
    error_before: float
    error_after: float


class ProbabilityCalibration(FittedFile):
    """What a student's scores mean, by task.

    A probability is that of being relevant for one of ``1 + num_hard + num_random`` passages: of each query one is
    relevant, ``num_hard`` share its words (BM25's first ten, or judged and not relevant) and ``num_random`` are drawn
    from the corpus.
    """

    kind: Literal["probabilities"] = "probabilities"
    num_hard: int
    num_random: int
    tasks: dict[Task, TaskCalibration]

    @property
    def base_rate(self) -> float:
        """How many of the passages that it was fitted on are relevant."""
        return 1 / (1 + self.num_hard + self.num_random)

    def probabilities(self, scores: ArrayLike, task: Task) -> NDArray[np.float64]:
        """How likely passages of these scores [n] are relevant, in [0, 1].

        Raises:
            InputError: nothing was fitted for this task.
        """
        fitted = self.tasks.get(task)
        if fitted is None:
            raise InputError(
                f"this student's scores were not calibrated for {task} search, so no probability is known; ask for "
                "scores, or fit them on judged dev queries (d2llm.fit_probabilities)"
            )
        log_odds = fitted.slope * np.asarray(scores, np.float64) + fitted.offset
        return np.exp(-np.logaddexp(0.0, -log_odds))  # without overflow, and exact far below 0


UNCALIBRATED = ProbabilityCalibration(student="", num_hard=0, num_random=0, tasks={})
"""Of a student about whose scores nothing is known."""


def read_calibration(folder: Path, student: str) -> ProbabilityCalibration:
    """The calibration in the folder of the student with this fingerprint; of no task where there is no file.

    Raises:
        DataFormatError: the file is damaged, newer, or another student's.
    """
    return read_fitted(folder / FILE_NAME, ProbabilityCalibration, student, remedy=_REMEDY) or UNCALIBRATED


def write_calibration(folder: Path, calibration: ProbabilityCalibration) -> None:
    """Write ``probabilities.json`` into a student's folder, atomically; nothing where no task was calibrated."""
    if calibration.tasks:
        write_json(folder / FILE_NAME, calibration.model_dump(mode="json"))
