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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.files import write_json
from d2llm.core.types import Task

FILE_NAME = "probabilities.json"
FORMAT_VERSION = 1
_REMEDY = "restore the student's folder, or delete the file to go without probabilities"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskCalibration(_Part):
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


class ProbabilityCalibration(_Part):
    """What a student's scores mean, by task.

    A probability is that of being relevant for one of ``1 + num_hard + num_random`` passages: of each query one is
    relevant, ``num_hard`` share its words (BM25's first ten, or judged and not relevant) and ``num_random`` are drawn
    from the corpus. ``student`` is the fingerprint of the student that it is for.
    """

    kind: Literal["probabilities"] = "probabilities"
    format_version: int = FORMAT_VERSION
    student: str
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
    path = folder / FILE_NAME
    if not path.is_file():
        return UNCALIBRATED
    try:
        found = ProbabilityCalibration.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataFormatError(path, f"cannot be read ({problems}); {_REMEDY}") from error
    if found.format_version > FORMAT_VERSION:
        raise DataFormatError(
            path, f"has format version {found.format_version}, this d2llm reads up to {FORMAT_VERSION}; update d2llm"
        )
    if found.student != student:
        raise DataFormatError(path, f"was fitted to the student {found.student}, but this one is {student}; {_REMEDY}")
    return found


def write_calibration(folder: Path, calibration: ProbabilityCalibration) -> None:
    """Write ``probabilities.json`` into a student's folder, atomically; nothing where no task was calibrated."""
    if calibration.tasks:
        write_json(folder / FILE_NAME, calibration.model_dump(mode="json"))
