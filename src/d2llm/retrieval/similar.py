"""Passages of an index that mean the same: pairs of near duplicates and paraphrases, and clusters of them.

Candidates of a passage are its nearest neighbours by the vectors (by the approximate index, if there is one). A pair's
score is the student's full symmetric score, with the interaction, in both directions on average; its probability is
that of the student's calibration (``models.probabilities``), without words, windows and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from d2llm.core.batches import batched
from d2llm.core.inputs import check_kind
from d2llm.core.types import Query
from d2llm.models.tokens import EncodedTexts
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings, SimilaritySettings

if TYPE_CHECKING:
    from d2llm.models.student import Student

_CANDIDATES_PER_NEIGHBOUR = 4  # passages that get the full score, so that those near by the vectors may change places
_AT_ONCE = 8_192  # passages, whose vectors are in memory together


@dataclass(frozen=True, slots=True)
class SimilarPair:
    """The ids of two passages, their score and the probability that they mean the same."""

    first: str
    second: str
    score: float
    probability: float


@dataclass(frozen=True, slots=True)
class SimilarPairs:
    """Pairs of passages that probably mean the same, the most probable first.

    ``num_blank`` passages without text were left out. ``num_full`` passages had only such neighbours, so they may have
    more: raise ``neighbours``.
    """

    pairs: tuple[SimilarPair, ...]
    num_passages: int
    num_blank: int
    num_full: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """A passage and those that probably mean the same, most probable first, with their probabilities."""

    centre: str
    members: Mapping[str, float]


def similar_pairs(index: Index, settings: SimilaritySettings | None = None, **changes: Any) -> SimilarPairs:
    """The pairs of passages that mean the same with at least a probability; ``changes`` are single settings.

    Raises:
        InputError: a setting is invalid, or the student is not calibrated for symmetric search.
    """
    check_kind(index, "index", Index)
    settings = SimilaritySettings.of(settings, **changes)
    view, student = index.view, cast("Student", index.student)
    searched = SearchSettings(
        task="symmetric",
        top_k=settings.neighbours + 1,
        num_candidates=_CANDIDATES_PER_NEIGHBOUR * (settings.neighbours + 1),
        score_features={},
        typo_tolerance=False,
    )
    searcher = Searcher(view, index.student, searched)
    scores: dict[tuple[str, str], list[float]] = {}
    num_passages, num_full = 0, 0
    rows = view.live_rows()
    for block in batched(rows.tolist(), _AT_ONCE):
        passages = view.passages(np.array(block, np.int64))
        kept = [position for position, passage in enumerate(passages) if passage.full_text.strip()]
        num_passages += len(kept)
        vectors = view.vectors(np.array(block, np.int64)[kept])
        queries = [Query(passages[position].id, passages[position].full_text) for position in kept]
        for ranking in searcher.rank_ids(queries, title="comparing", encoded=EncodedTexts(vectors, (), 0)):
            others = [(other, score) for other, score in ranking.passages if other != ranking.query.id]
            others = others[: settings.neighbours]
            probable = student.calibration.probabilities([score for _, score in others], "symmetric")
            num_full += len(others) == settings.neighbours and bool((probable >= settings.threshold).all())
            for other, score in others:
                first, second = sorted((ranking.query.id, other))
                scores.setdefault((first, second), []).append(score)
    means = np.array([sum(both) / len(both) for both in scores.values()], np.float64)
    probabilities = student.calibration.probabilities(means, "symmetric").tolist()
    pairs = [
        SimilarPair(*ids, score, probability)
        for ids, score, probability in zip(scores, means.tolist(), probabilities, strict=True)
        if probability >= settings.threshold
    ]
    pairs.sort(key=lambda pair: (-pair.score, pair.first, pair.second))
    return SimilarPairs(tuple(pairs), num_passages, len(rows) - num_passages, num_full)


def clusters_of(found: SimilarPairs) -> list[Cluster]:
    """Clusters of similar passages, the largest first: each member is similar to the centre itself.

    The passage with the most similar ones that are in no cluster yet, by the sum of their probabilities, is the next
    centre. Passages without similar ones are in none.

    Source: Aslam, Pelekhov, Rus, "The Star Clustering Algorithm", Journal of Graph Algorithms and Applications, 2004.
    """
    near: dict[str, dict[str, float]] = {}
    for pair in found.pairs:
        near.setdefault(pair.first, {})[pair.second] = pair.probability
        near.setdefault(pair.second, {})[pair.first] = pair.probability
    clusters: list[Cluster] = []
    free = set(near)
    for name in sorted(near, key=lambda name: (-sum(near[name].values()), name)):
        members = {other: chance for other, chance in near[name].items() if other in free and other != name}
        if name in free and members:
            best_first = sorted(members, key=lambda other: (-members[other], other))
            clusters.append(Cluster(name, {other: members[other] for other in best_first}))
            free -= {name, *members}
    return sorted(clusters, key=lambda cluster: -len(cluster.members))
