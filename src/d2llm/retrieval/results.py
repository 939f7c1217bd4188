"""Turns ordered candidates into results: texts, documents, neighbours, explanations, the teacher's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import (
    Certificate,
    Explanation,
    Grouping,
    Passage,
    Query,
    RankedDocument,
    RankedPassage,
    RerankReport,
    Selection,
    Span,
)
from d2llm.ops.diversity import DiverseResults
from d2llm.retrieval.row_features import FeatureParts
from d2llm.retrieval.segments import IndexView
from d2llm.store.view import CandidateRows

if TYPE_CHECKING:
    from d2llm.retrieval.reranker import Reranked


@dataclass(frozen=True, slots=True)
class GroupedDocument:
    """A document with its score, and the places of its passages among the candidates, best first."""

    id: str
    score: float
    places: list[int]


@dataclass(frozen=True, slots=True)
class ScoredCandidates:
    """A query's candidates with the student's scores, each source's proposals, and whether these are all candidates.

    ``rephrasing_scores`` are the student's scores of the same rows for other phrasings of the query.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    num_scored: int
    proposals: Mapping[str, CandidateRows]
    certificate: Certificate | None
    is_all: bool
    rephrasing_scores: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """The order of the candidates: their places, best first by ``scores``; or documents, best first.

    ``selection`` and ``chosen``, indices into this order, are set if only some of it are the results.
    """

    scored: ScoredCandidates
    scores: NDArray[np.floating[Any]]
    best_first: NDArray[np.int64]
    documents: Sequence[GroupedDocument] | None
    reranked: Reranked | None
    student_ranks: NDArray[np.int64] | None
    selection: Selection | None = None
    chosen: NDArray[np.int64] | None = None

    def selected(self, diverse: DiverseResults, near_duplicates: Mapping[str, str]) -> Order:
        """The same order, of which only some are shown."""
        length = len(self.best_first if self.documents is None else self.documents)
        ranks: list[int] = (diverse.indices + 1).tolist()
        selection = Selection(length, diverse.num_near_duplicates, tuple(ranks), near_duplicates)
        return replace(self, selection=selection, chosen=diverse.indices)

    @property
    def shown_documents(self) -> Sequence[GroupedDocument] | None:
        """The documents to show, or None in a ranking of passages."""
        if self.documents is None or self.chosen is None:
            return self.documents
        return [self.documents[index] for index in self.chosen.tolist()]

    @property
    def places(self) -> NDArray[np.int64]:
        """The passages to show, as places among the candidates."""
        documents = self.shown_documents
        if documents is None:
            return self.best_first if self.chosen is None else self.best_first[self.chosen]
        return np.array([document.places[0] for document in documents], np.int64)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the passages to show."""
        return self.scored.rows[self.places]

    def shown_rows(self, document_passages: int) -> NDArray[np.int64]:
        """The rows of all passages to show: ``rows``, and of documents at most so many passages each."""
        documents = self.shown_documents or ()
        others = [place for document in documents for place in document.places[1:document_passages]]
        return np.concatenate([self.rows, self.scored.rows[np.array(others, np.int64)]])

    @property
    def shown_scores(self) -> list[float]:
        """The scores of what is shown: passages, or documents."""
        documents = self.shown_documents
        if documents is None:
            return self.scores[self.places].tolist()
        return [document.score for document in documents]


def group_passages(
    scores: NDArray[np.floating[Any]],
    best_first: NDArray[np.int64],
    documents: Sequence[str],
    how: Grouping,
    num_parts: int,
) -> list[GroupedDocument]:
    """Documents by score, best first, ties by the document's id.

    ``best`` is MaxP. ``sum`` is SumP over the best ``num_parts`` passages, with odds exp(score) in place of
    probabilities, reported as a logarithm: log sum exp(score). Odds are used because probabilities near 1 hide which
    passage is better, and the logarithm so that a document of one passage has that passage's score, as with ``best``.

    The passages [n] have the ``scores`` (log-odds or logits), belong to ``documents``, and are in order ``best_first``.

    Source: Dai and Callan, "Deeper Text Understanding for IR with Contextual Neural Language Modeling", SIGIR 2019,
    section 3.
    """
    places: dict[str, list[int]] = {}
    order: list[int] = best_first.tolist()
    for place in order:
        places.setdefault(documents[place], []).append(place)
    summed = num_parts if how == "sum" else 1
    grouped = [
        GroupedDocument(name, float(np.logaddexp.reduce(scores[document_places[:summed]])), document_places)
        for name, document_places in places.items()
    ]
    return sorted(grouped, key=lambda document: (-document.score, document.id))


def show(
    index: IndexView,
    query: Query,
    dot_query: NDArray[np.float32] | None,
    order: Order,
    texts: Mapping[int, Passage],
    *,
    score_features: FeatureParts | None,
    document_passages: int,
    neighbours: int,
) -> tuple[RankedPassage, ...]:
    """The results of a ranking, with texts and the parts that the settings request (``SearchSettings``).

    ``texts`` has the passages at ``order.shown_rows``. ``score_features`` is that in the scores of the results; None:
    they are not explained.
    """
    rows = order.rows
    documents: list[RankedDocument | None] = [None] * len(rows)
    if order.shown_documents is not None:
        documents = _documents(order, order.shown_documents, document_passages, texts)
    dots: list[float | None] = [None] * len(rows)
    if dot_query is not None and len(rows):
        dots = (index.vectors(rows) @ dot_query).tolist()
    shown = tuple(
        RankedPassage(rank, passage, score, dot_score, document=document)
        for rank, (passage, score, dot_score, document) in enumerate(
            zip(map(texts.__getitem__, rows.tolist()), order.shown_scores, dots, documents, strict=True), start=1
        )
    )
    if score_features is not None:
        shown = _explained(query, shown, order, score_features)
    if neighbours:
        shown = with_neighbours(index, shown, neighbours)
    return shown if order.reranked is None else _with_teacher(shown, order, order.reranked)


def _documents(
    order: Order, documents: Sequence[GroupedDocument], shown: int, texts: Mapping[int, Passage]
) -> list[RankedDocument | None]:
    return [
        RankedDocument(
            document.id,
            float(order.scores[document.places[0]]),
            len(document.places),
            tuple(
                (texts[int(order.scored.rows[place])], float(order.scores[place])) for place in document.places[1:shown]
            ),
        )
        for document in documents
    ]


def with_neighbours(index: IndexView, places: Sequence[RankedPassage], distance: int) -> tuple[RankedPassage, ...]:
    """Each result with the passages up to ``distance`` positions before and after it in its document."""
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


def _explained(
    query: Query, passages: tuple[RankedPassage, ...], order: Order, added: FeatureParts
) -> tuple[RankedPassage, ...]:
    from d2llm.ops.bm25_words import placed_terms, terms

    query_terms = set(terms(query.text))
    proposals, shown = order.scored.proposals, order.places
    places = {name: {row: at for at, row in enumerate(proposal.rows.tolist())} for name, proposal in proposals.items()}
    explained: list[RankedPassage] = []
    rows, scores = order.scored.rows[shown].tolist(), order.scored.scores[shown].tolist()
    nothing: list[None] = [None] * len(rows)
    lexical = nothing if added.words is None else added.words.tolist()
    windows = nothing if added.windows is None else added.windows.tolist()
    tokens = nothing if added.tokens is None else added.tokens.tolist()
    for place, row, score, word_score, window_score, token_score in zip(
        passages, rows, scores, lexical, windows, tokens, strict=True
    ):
        at = {name: place_of[row] for name, place_of in places.items() if row in place_of}
        term_places: dict[str, tuple[Span, ...]] = {}
        for span, term in placed_terms(place.passage.full_text):
            if term in query_terms:
                term_places[term] = (*term_places.get(term, ()), span)
        why = Explanation(
            dot=place.dot_score,
            interaction=None
            if place.dot_score is None
            else score - place.dot_score - (word_score or 0.0) - (window_score or 0.0) - (token_score or 0.0),
            lexical=word_score,
            windows=window_score,
            tokens=token_score,
            source_ranks={name: index + 1 for name, index in at.items()},
            source_scores={name: float(proposals[name].scores[index]) for name, index in at.items()},
            terms={term: len(spans) for term, spans in term_places.items()},
            term_places=term_places,
        )
        explained.append(replace(place, explanation=why))
    return tuple(explained)


def _with_teacher(shown: tuple[RankedPassage, ...], order: Order, reranked: Reranked) -> tuple[RankedPassage, ...]:
    assert order.student_ranks is not None
    teacher_log_odds: dict[int, float] = {}
    if reranked.log_odds is not None:
        teacher_log_odds = dict(zip(reranked.read.tolist(), reranked.log_odds.tolist(), strict=True))
    return tuple(
        replace(one, log_odds=teacher_log_odds.get(place), student_rank=int(order.student_ranks[place]))
        for one, place in zip(shown, order.places.tolist(), strict=True)
    )


def rerank_report(kind: str, order: Order) -> RerankReport:
    """Report of a reranker: passages read, in doubt and moved, given by the student's ranks, before any selection."""
    assert order.reranked is not None
    assert order.student_ranks is not None
    ranks, reranked = order.student_ranks, order.reranked
    moved = tuple((int(old), new) for new, old in enumerate(ranks[order.best_first], start=1) if old != new)
    read, unsure = tuple(ranks[reranked.read].tolist()), tuple(sorted(ranks[reranked.unsure].tolist()))
    return RerankReport(kind, read, unsure, moved, reranked.num_truncated, reranked.seconds, reranked.out_of_time)
