"""Classes of texts from some examples of each: the classes of the nearest examples by the student's full score.

The score of a class is 2 log sum exp(score / 2) over its ten best examples: more than its best one counts, and one good
example counts more than several bad ones. On 741 dev messages of banking77 with 5 examples a class, accuracy .869, by
the best example alone .849, by log sum exp(score) .862.

Probabilities are softmax over slope times these scores, and over a constant for "none of these". Slope and constant are
fitted on the examples: each is classified by the others, once with its class, and once without, where "none" is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from d2llm.core.errors import InputError
from d2llm.core.names import counted, suggestion
from d2llm.core.types import IdRanking, Query
from d2llm.data.python_records import QueryLike, queries_of
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import ClassifySettings, SearchSettings

if TYPE_CHECKING:
    from d2llm.retrieval.index import Index

_NUM_CANDIDATES = 200
_MAX_EXAMPLES = 10  # of a class that count
_MAX_FITTED = 1_000  # examples on which slope and constant are fitted
_MIN_LOG_PROBABILITY = -20.0  # a class that no candidate has


@dataclass(frozen=True, slots=True)
class Classification:
    """The class of a text.

    Attributes:
        query: the text.
        label: the most probable class; None for none of these.
        probability: that of the label.
        probabilities: those of the most probable classes, at most five.
        none_probability: that it belongs to no class.
        nearest: the id of the best example.
    """

    query: Query
    label: str | None
    probability: float
    probabilities: Mapping[str, float]
    none_probability: float
    nearest: str | None


class Classifier:
    """Classifies texts by the examples in an index.

    Attributes:
        labels: the classes.
        slope: by which scores of classes are multiplied.
        none_score: the score of "none of these", times the slope.
    """

    def __init__(self, index: Index, settings: ClassifySettings | None = None, **changes: Any) -> None:
        """Fit the probabilities; takes a search for each example, of at most 1,000.

        Args:
            index: its passages are the examples.
            settings: the metadata field with the classes, and how often no class is right.
            changes: override single settings, as in ``Classifier(index, field="intent")``.

        Raises:
            InputError: a setting is invalid, or the index has fewer than two classes with two examples each.
        """
        self.settings = settings = ClassifySettings.of(settings, **changes)
        view, field = index.view, settings.field
        if field not in view.metadata.fields:
            raise InputError(
                f"{index.folder}: there is no metadata field {field!r} with the classes; "
                f"{suggestion(field, view.metadata.fields, 'there are')}"
            )
        searched = SearchSettings(top_k=_NUM_CANDIDATES, num_candidates=_NUM_CANDIDATES)
        self._searcher = Searcher(view, index.student, searched)
        rows = view.live_rows()
        names, values = view.ids(rows), view.field_values(rows, field)
        self._label_of = {name: str(value) for name, value in zip(names, values, strict=True) if value is not None}
        self.labels = sorted(set(self._label_of.values()))
        self._columns = {label: column for column, label in enumerate(self.labels)}
        counts = np.bincount([self._columns[label] for label in self._label_of.values()], minlength=2)
        if np.count_nonzero(counts > 1) < 2:
            raise InputError(
                f"{index.folder}: classes are told apart by examples, but fewer than two values of {field!r} have two "
                "passages or more; add examples, 5 to 50 of each class"
            )
        examples = sorted(self._label_of)
        sample = random.Random(0).sample(examples, min(_MAX_FITTED, len(examples)))
        texts = [Query(passage.id, passage.full_text) for passage in index.get(sample) if passage.full_text.strip()]
        self.slope, self.none_score = self._fit(texts)

    def __repr__(self) -> str:
        return f"Classifier({counted(len(self.labels), 'class', 'classes')}, {counted(len(self._label_of), 'example')})"

    def classify(self, texts: Iterable[QueryLike] | QueryLike) -> list[Classification]:
        """The class of each text.

        Raises:
            InputError: something is no text.
        """
        rankings = self._searcher.rank_ids(queries_of(texts), title="classifying")
        scores = np.array([self._scores(ranking) for ranking in rankings]).reshape(len(rankings), -1)
        log_probabilities = _log_probabilities(scores, self.slope, self.none_score)
        return [self._result(*item) for item in zip(rankings, np.exp(log_probabilities), strict=True)]

    def _result(self, ranking: IdRanking, probabilities: NDArray[np.float64]) -> Classification:
        best = np.argsort(-probabilities[:-1], kind="stable")[:5].tolist()
        none = float(probabilities[-1])
        listed = {self.labels[column]: float(probabilities[column]) for column in best if probabilities[column] > 0}
        nearest = next((name for name, _ in ranking.passages if name in self._label_of), None)
        label = max(listed, key=listed.__getitem__, default=None)
        if label is None or none >= listed[label]:
            return Classification(ranking.query, None, none, listed, none, nearest)
        return Classification(ranking.query, label, listed[label], listed, none, nearest)

    def _scores(self, ranking: IdRanking) -> NDArray[np.float64]:
        """The scores of the classes [c] for a query; minus infinity for those that no candidate has.

        An example is not compared with itself.
        """
        by_class: dict[int, list[float]] = {}
        for name, score in ranking.passages:
            label = self._label_of.get(name)
            if label is not None and name != ranking.query.id:
                by_class.setdefault(self._columns[label], []).append(score)
        scores = np.full(len(self.labels), -np.inf)
        for column, values in by_class.items():
            scores[column] = 2 * logsumexp(np.array(values[:_MAX_EXAMPLES]) / 2)
        return scores

    def _fit(self, examples: Sequence[Query]) -> tuple[float, float]:
        """The slope and the score of "none" that make the examples' classes most probable."""
        rankings = self._searcher.rank_ids(examples, title="fitting probabilities")
        scores = np.array([self._scores(ranking) for ranking in rankings])
        truth = np.array([self._columns[self._label_of[query.id]] for query in examples])
        rows = np.arange(len(truth))
        without = scores.copy()
        without[rows, truth] = -np.inf
        rate = self.settings.none_rate

        def loss(parameters: NDArray[np.float64]) -> float:
            slope, none_score = float(np.exp(parameters[0])), float(parameters[1])
            right = _log_probabilities(scores, slope, none_score)[rows, truth]
            none = _log_probabilities(without, slope, none_score)[:, -1]
            known = np.maximum(right, _MIN_LOG_PROBABILITY).mean()
            return -float((1 - rate) * known + rate * np.maximum(none, _MIN_LOG_PROBABILITY).mean())

        best = scores.max(1)
        start = np.array([0.0, float(np.median(best[np.isfinite(best)]))])
        fitted = minimize(loss, start, method="Nelder-Mead").x
        return float(np.exp(fitted[0])), float(fitted[1])


def _log_probabilities(scores: NDArray[np.float64], slope: float, none_score: float) -> NDArray[np.float64]:
    """[n, c] -> the log-probabilities of the classes and of none of them [n, c + 1]."""
    none = np.full((len(scores), 1), none_score)
    return log_softmax(np.concatenate([slope * scores, none], axis=1), axis=1)
