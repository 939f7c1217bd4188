"""How much each word of a query counts in BM25: a linear function of the word's state in the query.

A word's factor is the fraction of the query's relevant passages that can be expected to contain it, so that a word of
which relevant passages have synonyms counts less than its rarity says. A search multiplies the idf of the word by it;
BM25 remains a sum over the postings of the query's words, so exact searches stay exact and indexes stay as they are.

The file ``term_weights.json`` in a student's folder has the function. Source: Dai and Callan, "Context-Aware
Sentence/Passage Term Importance Estimation For First Stage Retrieval", 2019 (arXiv 1910.10687): its DeepCT-Query, here
on the states of a student that does not change. Factors of passages' words (DeepCT-Index) would need another index, and
gained nothing beside vectors (docs/log).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from d2llm.models.fitted_part import FittedPart, Widths


class TermWeights(FittedPart):
    """Factor of a word = max(floor, offset + w . x) for its state x, the mean of those of its tokens in the query.

    It was fitted on ``num_words`` words of queries of data sets, by name. ``explained`` is how much of the variance
    of the true fractions of each set the factors explain, by fits that left these queries out.
    """

    kind: ClassVar[str] = "term_weights"
    file_name: ClassVar[str] = "term_weights.json"
    without: ClassVar[str] = "weigh words by their rarity alone"

    weights: tuple[float, ...]
    offset: float
    usual: float
    """The factor of a word without a state, because the query was cut before it: the mean over the words of the fit."""
    floor: float = 0.05
    num_words: dict[str, int]
    explained: dict[str, float]

    def factors(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """[n, dim] -> factors [n]."""
        return np.maximum(self.offset + states.astype(np.float64) @ np.array(self.weights), self.floor)

    def fits(self, widths: Widths) -> bool:
        """Whether there is a weight for each number of a state."""
        return len(self.weights) == widths.states
