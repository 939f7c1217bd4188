"""A student with a bounded interaction and weighted score features, and passages for tests of sharded indexes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d2llm.core.types import PART_KINDS, Passage
from d2llm.models.score_features import FeatureWeights
from fake_models import TokenStudent, with_exact_products

WORDS = ("apple", "pear", "quince", "medlar", "plum", "cherry", "sloe", "fig", "date", "lime")
WEIGHTS = {"bm25": 0.7, "window_bm25": 0.4, "window_vectors": 0.3, "maxsim": 2.0}


@dataclass(frozen=True)
class BoundedScorer:
    """2 <q, p> + tanh(p_0 q_1), summed in a fixed order, so that a score does not depend on the other rows."""

    query: np.ndarray
    bound: float = 1.0

    @property
    def dot_query(self):
        return 2 * self.query

    def __call__(self, passages):
        dots = np.einsum("ij,j->i", passages, self.dot_query)
        return dots + np.float32(self.bound) * self.change(passages)

    def change(self, passages):
        # In float64, because the last bits of numpy's tanh depend on the place in the array.
        return np.tanh((passages[:, 0] * self.query[1]).astype(np.float64)).astype(np.float32)


class BoundedStudent(TokenStudent):
    """A score like that of a real student: inner product, bounded interaction, words, windows and tokens."""

    bound = 1.0
    weights = WEIGHTS

    def _encode(self, texts, advance):
        return with_exact_products(super()._encode(texts, advance))

    def prepare(self, query_vector, task):
        return BoundedScorer(query_vector, self.bound)

    def passage_bound(self, passage_vectors):
        return np.ones(len(passage_vectors), np.float32)

    def score(self, query_vector, passage_vectors, task):
        return self.prepare(query_vector, task)(passage_vectors)

    def feature_weights(self, task, *, stored=PART_KINDS):
        named = {term: weight for term, weight in self.weights.items() if term.endswith("bm25")}
        of_parts = {"window": "window_vectors", "token": "maxsim"}
        return FeatureWeights(terms=named | {of_parts[kind]: self.weights.get(of_parts[kind], 0.0) for kind in stored})


def random_passages(number, seed=0, start=0):
    """Passages of one to three sentences, many of them equal; half of them belong to documents."""
    rng = np.random.default_rng(seed)
    return [
        Passage(
            f"p{n}",
            ". ".join(" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(rng.integers(1, 4))),
            document_id=f"d{n // 6}" if n % 2 else "",
            position=n % 6,
            metadata={"year": 2000 + n % 4},
        )
        for n in range(start, start + number)
    ]


def results_of(ranking):
    """Ids and scores, best first."""
    return [(one.passage.id, one.score) for one in ranking.passages]
