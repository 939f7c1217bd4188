"""How likely a passage is to answer any query at all, from its vector alone: a linear function, fitted on judgements.

The file ``quality.json`` in a student's folder has its weights. ``encode`` can leave out the passages that it puts
lowest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from d2llm.core.files import write_json
from d2llm.models.fitted_file import FittedFile, read_fitted

FILE_NAME = "quality.json"
_REMEDY = "restore the student's folder, or delete the file to go without quality"


class PassageQuality(FittedFile):
    """Quality of a passage = w . y / |y|, for its vector y; only differences mean anything.

    It was fitted on passages of data sets, by name, of which some are relevant to a query. ``auc``: how often a
    relevant passage has a higher quality than another one of its data set, by fits that left both out; 0.5 is chance.
    """

    kind: Literal["quality"] = "quality"
    weights: tuple[float, ...]
    num_passages: dict[str, int]
    num_relevant: dict[str, int]
    auc: dict[str, float]

    def of(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """[n, dim] -> quality [n]."""
        return directions(vectors) @ np.array(self.weights)


def directions(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors [n, dim] with length 1; 0 stays 0."""
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(lengths > 0, lengths, 1.0)


def read_quality(folder: Path, student: str) -> PassageQuality | None:
    """Read the quality in the folder of the student with this fingerprint; None if there is no file.

    Raises:
        DataFormatError: the file is damaged, newer, or another student's.
    """
    return read_fitted(folder / FILE_NAME, PassageQuality, student, remedy=_REMEDY)


def write_quality(folder: Path, quality: PassageQuality | None) -> None:
    """Write ``quality.json`` into a student's folder, atomically; nothing if none was fitted."""
    if quality is not None:
        write_json(folder / FILE_NAME, quality.model_dump(mode="json"))
