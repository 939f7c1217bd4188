"""How likely a passage is to answer any query at all, from its vector alone: a linear function, fitted on judgements.

The file ``quality.json`` in a student's folder has its weights. ``encode`` can leave out the passages that it puts
lowest.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from d2llm.models.fitted_part import FittedPart, Widths


class PassageQuality(FittedPart):
    """Quality of a passage = w . y / |y|, for its vector y; only differences mean anything.

    It was fitted on passages of data sets, by name, of which some are relevant to a query. ``auc``: how often a
    relevant passage has a higher quality than another one of its data set, by fits that left both out; 0.5 is chance.
    """

    kind: ClassVar[str] = "quality"
    file_name: ClassVar[str] = "quality.json"
    without: ClassVar[str] = "go without quality"

    weights: tuple[float, ...]
    num_passages: dict[str, int]
    num_relevant: dict[str, int]
    auc: dict[str, float]

    def of(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """[n, dim] -> quality [n]."""
        return directions(vectors) @ np.array(self.weights)

    def fits(self, widths: Widths) -> bool:
        """Whether there is a weight for each number of a vector."""
        return len(self.weights) == widths.vectors


def directions(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors [n, dim] with length 1; 0 stays 0."""
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(lengths > 0, lengths, 1.0)
