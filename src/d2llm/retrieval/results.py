"""Turns ordered candidates into results: texts, documents, neighbours, explanations, the teacher's scores.

Excerpts are results with the passages around them, merged into consecutive parts of their documents.

Facets: how often the values of metadata fields occur in a search. Without words that a passage must have, every passage
that the filter allows matches a query more or less. So a facet has two counts for each value: of all these passages,
whatever the query, and of the query's candidates, which got the full score.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.names import suggestion
from d2llm.core.types import (
    Certificate,
    Excerpt,
    Explanation,
    Facet,
    FacetValue,
    Grouping,
    Passage,
    Query,
    RankedDocument,
    RankedPassage,
    RerankReport,
    Selection,
    Span,
)
from d2llm.models.row_features import FeatureParts
from d2llm.ops.diversity import DiverseResults
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.schema import MetadataSchema
from d2llm.store.view import CandidateRows

if TYPE_CHECKING:
    from d2llm.retrieval.reranker import Reranked


@dataclass(frozen=True, slots=True)
class GroupedDocument:
    """A document with its score, and the places of its passages among the candidates, best first."""

    id: str
    score: float
    positions: list[int]


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
    def positions(self) -> NDArray[np.int64]:
        """The passages to show, as places among the candidates."""
        documents = self.shown_documents
        if documents is None:
            return self.best_first if self.chosen is None else self.best_first[self.chosen]
        return np.array([document.positions[0] for document in documents], np.int64)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the passages to show."""
        return self.scored.rows[self.positions]

    def shown_rows(self, document_passages: int) -> NDArray[np.int64]:
        """The rows of all passages to show: ``rows``, and of documents at most so many passages each."""
        documents = self.shown_documents or ()
        others = [position for document in documents for position in document.positions[1:document_passages]]
        return np.concatenate([self.rows, self.scored.rows[np.array(others, np.int64)]])

    @property
    def shown_scores(self) -> list[float]:
        """The scores of what is shown: passages, or documents."""
        documents = self.shown_documents
        if documents is None:
            return self.scores[self.positions].tolist()
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
    positions: dict[str, list[int]] = {}
    order: list[int] = best_first.tolist()
    for index in order:
        positions.setdefault(documents[index], []).append(index)
    summed = num_parts if how == "sum" else 1
    grouped = [
        GroupedDocument(name, float(np.logaddexp.reduce(scores[indices[:summed]])), indices)
        for name, indices in positions.items()
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
            float(order.scores[document.positions[0]]),
            len(document.positions),
            tuple(
                (texts[int(order.scored.rows[position])], float(order.scores[position]))
                for position in document.positions[1:shown]
            ),
        )
        for document in documents
    ]


def with_neighbours(index: IndexView, ranked: Sequence[RankedPassage], distance: int) -> tuple[RankedPassage, ...]:
    """Each result with the passages up to ``distance`` positions before and after it in its document."""
    around: dict[str, list[Passage]] = {}
    for passage in index.neighbours([result.passage for result in ranked], distance):
        around.setdefault(passage.document_id, []).append(passage)
    filled: list[RankedPassage] = []
    for result in ranked:
        at = result.passage.position
        others = [other for other in around.get(result.passage.document_id, []) if other.id != result.passage.id]
        before = tuple(other for other in others if at - distance <= other.position < at)
        after = tuple(other for other in others if at < other.position <= at + distance)
        filled.append(replace(result, before=before, after=after))
    return tuple(filled)


def _explained(
    query: Query, passages: tuple[RankedPassage, ...], order: Order, added: FeatureParts
) -> tuple[RankedPassage, ...]:
    from d2llm.ops.bm25_words import placed_terms, terms

    query_terms = set(terms(query.text))
    proposals, shown = order.scored.proposals, order.positions
    ranks_by_source = {
        name: {row: at for at, row in enumerate(proposal.rows.tolist())} for name, proposal in proposals.items()
    }
    explained: list[RankedPassage] = []
    rows, scores = order.scored.rows[shown].tolist(), order.scored.scores[shown].tolist()
    nothing: list[None] = [None] * len(rows)
    lexical = nothing if added.words is None else added.words.tolist()
    windows = nothing if added.windows is None else added.windows.tolist()
    tokens = nothing if added.tokens is None else added.tokens.tolist()
    for result, row, score, word_score, window_score, token_score in zip(
        passages, rows, scores, lexical, windows, tokens, strict=True
    ):
        at = {name: ranks[row] for name, ranks in ranks_by_source.items() if row in ranks}
        term_spans: dict[str, list[Span]] = {}
        for span, term in placed_terms(result.passage.full_text):
            if term in query_terms:
                term_spans.setdefault(term, []).append(span)
        why = Explanation(
            dot=result.dot_score,
            interaction=None
            if result.dot_score is None
            else score - result.dot_score - (word_score or 0.0) - (window_score or 0.0) - (token_score or 0.0),
            lexical=word_score,
            windows=window_score,
            tokens=token_score,
            source_ranks={name: index + 1 for name, index in at.items()},
            source_scores={name: float(proposals[name].scores[index]) for name, index in at.items()},
            terms={term: len(spans) for term, spans in term_spans.items()},
            term_spans={term: tuple(spans) for term, spans in term_spans.items()},
        )
        explained.append(replace(result, explanation=why))
    return tuple(explained)


def _with_teacher(shown: tuple[RankedPassage, ...], order: Order, reranked: Reranked) -> tuple[RankedPassage, ...]:
    assert order.student_ranks is not None
    teacher_log_odds: dict[int, float] = {}
    if reranked.log_odds is not None:
        teacher_log_odds = dict(zip(reranked.read.tolist(), reranked.log_odds.tolist(), strict=True))
    return tuple(
        replace(one, log_odds=teacher_log_odds.get(position), student_rank=int(order.student_ranks[position]))
        for one, position in zip(shown, order.positions.tolist(), strict=True)
    )


def rerank_report(kind: str, order: Order) -> RerankReport:
    """Report of a reranker: passages read, in doubt and moved, given by the student's ranks, before any selection."""
    assert order.reranked is not None
    assert order.student_ranks is not None
    ranks, reranked = order.student_ranks, order.reranked
    moved = tuple((int(old), new) for new, old in enumerate(ranks[order.best_first], start=1) if old != new)
    read, unsure = tuple(ranks[reranked.read].tolist()), tuple(sorted(ranks[reranked.unsure].tolist()))
    return RerankReport(kind, read, unsure, moved, reranked.num_truncated, reranked.seconds, reranked.out_of_time)


_LEAST_REPEATED = 8  # characters; a shorter repetition is more likely a coincidence than an overlap of passages


def merge_neighbours(results: Sequence[RankedPassage], *, overlapping: bool = False) -> list[Excerpt]:
    """Results with the passages before and after them as excerpts, in the order of their best results.

    Results of one document belong to the same excerpt if the passages around them overlap or follow each other
    directly, by position. A passage without a document is an excerpt of its own.

    Args:
        results: results of a search, best first, with their neighbours in ``before`` and ``after``.
        overlapping: whether a passage may begin with text that repeats the end of the one before (``chunk_overlap``);
            such text is kept once.
    """
    by_document: dict[str, list[RankedPassage]] = {}
    for result in results:
        passage = result.passage
        name = f"document {passage.document_id}" if passage.document_id else f"passage {passage.id}"
        by_document.setdefault(name, []).append(result)
    stretches = [stretch for members in by_document.values() for stretch in _stretches(members)]
    excerpts = [_excerpt(stretch, overlapping=overlapping) for stretch in stretches]
    return sorted(excerpts, key=lambda excerpt: excerpt.results[0].rank)


@dataclass(slots=True)
class _Stretch:
    """Results whose neighbourhoods touch, and the highest position that these reach."""

    results: list[RankedPassage]
    end: int


def _stretches(results: Sequence[RankedPassage]) -> list[_Stretch]:
    """The results of one document, grouped; in the order of the document."""
    spans = sorted((*_span(result), index) for index, result in enumerate(results))
    stretches: list[_Stretch] = []
    for start, end, index in spans:
        if stretches and start <= stretches[-1].end + 1:
            stretches[-1].results.append(results[index])
            stretches[-1].end = max(stretches[-1].end, end)
        else:
            stretches.append(_Stretch([results[index]], end))
    return stretches


def _span(result: RankedPassage) -> tuple[int, int]:
    """The first and the last position of a result and its neighbours."""
    positions = [passage.position for passage in (*result.before, result.passage, *result.after)]
    return min(positions), max(positions)


def _excerpt(stretch: _Stretch, *, overlapping: bool) -> Excerpt:
    results = sorted(stretch.results, key=lambda result: result.rank)
    neighbours = [passage for result in results for passage in (*result.before, *result.after)]
    # A result replaces the same passage among the neighbours of another: it may be shortened.
    by_id = {passage.id: passage for passage in [*neighbours, *(result.passage for result in results)]}
    passages = tuple(sorted(by_id.values(), key=lambda passage: (passage.position, passage.id)))
    return Excerpt(tuple(results), passages, _joined(passages, overlapping=overlapping))


def num_repeated(passages: Sequence[Passage]) -> list[int]:
    """How many characters at the start of each of some consecutive passages repeat the end of the one before it.

    Passages with different titles are of different sections, which do not overlap.
    """
    return [0] + [
        _num_repeated(before.text, passage.text) if passage.title == before.title else 0
        for before, passage in itertools.pairwise(passages)
    ]


def _joined(passages: Sequence[Passage], *, overlapping: bool) -> str:
    """The texts of consecutive passages, a line each; a new title begins a paragraph."""
    text = passages[0].text
    counts = num_repeated(passages) if overlapping else [0] * len(passages)
    for (before, passage), repeated in zip(itertools.pairwise(passages), counts[1:], strict=True):
        if passage.title != before.title:
            text = f"{text}\n\n{passage.title}\n{passage.text}" if passage.title else f"{text}\n\n{passage.text}"
            continue
        rest = passage.text[repeated:].lstrip() if repeated else passage.text
        text = f"{text}\n{rest}" if rest else text
    return text


def _num_repeated(before: str, after: str) -> int:
    """How many characters at the start of a text repeat the end of the one before it."""
    beginning = after[:_LEAST_REPEATED]
    start = before.find(beginning) if len(beginning) == _LEAST_REPEATED else -1
    while start >= 0 and not after.startswith(before[start:]):
        start = before.find(beginning, start + 1)
    return len(before) - start if start >= 0 else 0


MAX_VALUES = 100
"""Values of a field that are listed."""


def check_fields(settings: SearchSettings, schema: MetadataSchema) -> None:
    """Check that the index has the fields by which a search counts and sorts.

    Raises:
        InputError: it has no such metadata field.
    """
    sorted_by = () if settings.sort is None else (_field(settings.sort),)
    for setting, names in (("sort", sorted_by), ("facets", settings.facets or ())):
        for name in names:
            if name not in schema.fields:
                known = suggestion(name, schema.fields, "there are") if schema.fields else "the index has none"
                raise InputError(f"{setting}: there is no metadata field {name!r}; {known}")


def facet(allowed: Counter[Any], candidates: Sequence[Any]) -> Facet:
    """The facet of a field from the counts of its values, None included, and the value of each candidate."""
    scored = Counter(candidates)
    present = [(value, count) for value, count in allowed.items() if value is not None]
    present.sort(key=lambda item: (-item[1], item[0]))
    values = tuple(FacetValue(value, count, scored[value]) for value, count in present[:MAX_VALUES])
    return Facet(values, len(present), allowed[None])


def in_order_of(passages: Sequence[RankedPassage], sort: str) -> tuple[RankedPassage, ...]:
    """Results by a field (``SearchSettings.sort``): equal ones by score, those without a value last."""
    name, is_descending = _field(sort), sort.endswith(":desc")
    with_value = [one for one in passages if one.passage.metadata.get(name) is not None]
    with_value.sort(key=lambda one: one.passage.metadata[name], reverse=is_descending)  # pyright: ignore[reportArgumentType]
    return (*with_value, *(one for one in passages if one.passage.metadata.get(name) is None))


def _field(sort: str) -> str:
    return sort.partition(":")[0]
