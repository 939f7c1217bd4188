"""From a student's score to a probability: a logistic function per task, fitted on dev queries.

Scores only rank passages; their absolute values mean little, because training optimises only the ranking. The file
``probabilities.json`` in a student's folder has the parameters that turn a score into a probability. (``d2llm index
... calibrate`` is something else: it measures a student's errors against a teacher.)

Source: Platt, "Probabilistic outputs for support vector machines", 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from d2llm.core.errors import InputError
from d2llm.core.types import Task
from d2llm.models.fitted_part import FittedPart, FittedValues
from d2llm.store.word_segment import CountedTerms

WEAK, WEAK_WITHOUT_WORDS = 0.15, 0.5
"""A passage that lacks words of the query is called a weak match below the first probability, one that has none of them
below the second: nonsense has no words in common with a corpus, but can get a high score from a student."""


def fewer_terms(queries: Sequence[str]) -> NDArray[np.float64]:
    """-ln(1 + the number of distinct terms) of each query [n]."""
    terms = {query: len(CountedTerms.from_text(query).hashes) for query in dict.fromkeys(queries)}
    return -np.log1p([terms[query] for query in queries])


class TaskCalibration(FittedValues):
    """p = 1 / (1 + exp(-(slope * score - terms_slope * ln(1 + terms) + offset))) for a query of so many distinct terms.

    A score that counts words grows with the words that a query has, and says less. The slope is positive, and the terms
    are those of the query alone, so its rankings do not change.

    It was fitted on ``num_queries`` queries, by data set, and ``num_pairs`` pairs. The expected calibration errors are
    measured on those pairs: ``error_before`` with the plain logistic function of the score, ``error_after`` with the
    fitted one, where each query is measured with a fit that left it out.
    """

    slope: float = Field(gt=0)
    offset: float
    terms_slope: float = Field(0.0, ge=0)
    num_queries: dict[str, int]
    num_pairs: int
    error_before: float
    error_after: float


class ProbabilityCalibration(FittedPart):
    """The calibration of a student's scores, by task; false if there is none.

    ``tasks`` are for scores of vectors alone. ``with_features`` are for those that count score features too, of texts
    that are in no index (``Student.rank``); a task without features has none.

    A probability refers to a mixture of ``1 + num_hard + num_random`` passages per query: one is relevant,
    ``num_hard`` share the query's words (BM25's first ten, or judged and not relevant) and ``num_random`` are drawn
    from the corpus.
    """

    kind: ClassVar[str] = "probabilities"
    file_name: ClassVar[str] = "probabilities.json"
    without: ClassVar[str] = "go without probabilities"

    num_hard: int = 0
    num_random: int = 0
    tasks: dict[Task, TaskCalibration] = Field(default={})
    with_features: dict[Task, TaskCalibration] = Field(default={})

    def __bool__(self) -> bool:
        """Whether the scores of any task were calibrated."""
        return bool(self.tasks)

    @property
    def base_rate(self) -> float:
        """The fraction of relevant passages in the mixture of the fit."""
        return 1 / (1 + self.num_hard + self.num_random)

    def probabilities(
        self, scores: ArrayLike, task: Task, *, queries: Sequence[str] | None = None
    ) -> NDArray[np.float64]:
        """Probabilities [n] that passages with these scores [n] are relevant.

        Args:
            scores: of vectors alone, or, with ``queries``, those that count score features too.
            task: of the scores.
            queries: [n] the query of each score.

        Raises:
            InputError: none were fitted for such scores.
        """
        fitted = (self.tasks if queries is None else self.with_features).get(task)
        if fitted is None:
            raise InputError(
                f"this student's scores were not calibrated for {task} search, so it has no probabilities; use its "
                "scores, or calibrate them on judged dev queries (d2llm.training.fit_probabilities.fit_probabilities)"
            )
        log_odds = fitted.slope * np.asarray(scores, np.float64) + fitted.offset
        if queries is not None:
            log_odds += fitted.terms_slope * fewer_terms(queries)
        return np.exp(-np.logaddexp(0.0, -log_odds))  # no overflow, and exact for very negative log-odds
