"""Rankings of documents: passages of one document joined, and the passages around a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Grouping, Passage, RankedPassage


@dataclass(frozen=True, slots=True)
class GroupedDocument:
    """A document with its score, and the places of its passages among the candidates, best first."""

    id: str
    score: float
    places: list[int]


def group_passages(
    scores: NDArray[np.floating[Any]],
    best_first: NDArray[np.int64],
    documents: Sequence[str],
    how: Grouping,
    num_parts: int,
) -> list[GroupedDocument]:
    """Documents by score, best first, ties by the document's id.

    ``best`` is MaxP. ``sum`` is SumP over the best ``num_parts`` passages, with odds exp(score) in the place of
    probabilities, and shown as a logarithm: log sum exp(score). Odds, since probabilities near 1 hide which passage is
    the better one; a logarithm, since a document of one passage then has that passage's score, as with ``best``.

    Args:
        scores: [n] of passages, log-odds or logits.
        best_first: [n] their places, best first.
        documents: [n] the document of each.
        how: ``best`` or ``sum``.
        num_parts: at most so many passages of a document are summed.

    Source: Dai and Callan, "Deeper Text Understanding for IR with Contextual Neural Language Modeling", SIGIR 2019,
    section 3.
    """
    places: dict[str, list[int]] = {}
    order: list[int] = best_first.tolist()
    for place in order:
        places.setdefault(documents[place], []).append(place)
    summed = num_parts if how == "sum" else 1
    grouped = [
        GroupedDocument(name, float(np.logaddexp.reduce(scores[of_document[:summed]])), of_document)
        for name, of_document in places.items()
    ]
    return sorted(grouped, key=lambda document: (-document.score, document.id))


class _Surroundings(Protocol):
    def neighbours(self, passages: Sequence[Passage], distance: int) -> list[Passage]: ...


def with_neighbours(
    index: _Surroundings, places: tuple[RankedPassage, ...], distance: int
) -> tuple[RankedPassage, ...]:
    """Each place with the passages at most ``distance`` positions before and after it in its document."""
    around: dict[str, list[Passage]] = {}
    for passage in index.neighbours([place.passage for place in places], distance):
        around.setdefault(passage.document_id, []).append(passage)
    filled: list[RankedPassage] = []
    for place in places:
        at = place.passage.position
        others = [other for other in around.get(place.passage.document_id, []) if other.id != place.passage.id]
        before = tuple(other for other in others if at - distance <= other.position < at)
        after = tuple(other for other in others if at < other.position <= at + distance)
        filled.append(replace(place, before=before, after=after))
    return tuple(filled)
