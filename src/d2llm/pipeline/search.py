"""The verb ``search``: queries become rankings with texts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import Certificate, Explanation, Query, RankedPassage, Ranking, SourceName, Task
from d2llm.ops.ranking import reciprocal_rank_scores
from d2llm.ops.selection import top_rows
from d2llm.pipeline.candidates import (
    AnnSource,
    CandidateSource,
    LexicalSource,
    SearchableIndex,
    VectorSource,
)
from d2llm.pipeline.exact_search import FoundRows, certified_top_k, passage_reaches
from d2llm.pipeline.progress import progress_bar
from d2llm.pipeline.protocols import BoundedStudent, SearchStudent

_ENCODED_AT_ONCE = 256  # queries: enough for full batches, few enough that the progress bar moves


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How to search.

    Attributes:
        task: which branch of the IEM; None means the index's own.
        top_k: length of a ranking; every passage when it is beyond the corpus.
        num_candidates: passages that each source proposes; when it is below ``top_k``, ``top_k`` are proposed.
        filter: an SQL-like condition on metadata (``index.filters``); it is applied before the choice of the first k.
        sources: who proposes candidates; several are united, and all get the student's full score. "ann" is "vectors"
            by an approximate index (``build_ann``): quicker, with the recall that was measured when it was built.
        fuse: rank by reciprocal-rank fusion of the student's ranking and BM25's, not by the student's score alone.
        exact: the exact ranking of all passages by the full score, with its certificate. A head without an
            inner-product part ("paper") is always searched so.
        budget_ms: of an exact search: stop scoring in time; the certificate says what is proved.
        explain: say of each passage why it stands where it does.
    """

    task: Task | None = None
    top_k: int = 10
    num_candidates: int = 1000
    filter: str | None = None
    sources: tuple[SourceName, ...] = ("vectors",)
    fuse: bool = False
    exact: bool = False
    budget_ms: float | None = None
    explain: bool = False

    def check(self) -> None:
        """Make sure that the settings go together.

        Raises:
            InputError: they do not.
        """
        if self.top_k < 1 or self.num_candidates < 1:
            raise InputError(
                f"top_k is {self.top_k} and num_candidates is {self.num_candidates}; both must be at least 1"
            )
        if not self.sources:
            raise InputError("sources is empty; name 'vectors', 'ann', 'bm25' or several")
        if self.exact and (self.fuse or self.sources != ("vectors",)):
            raise InputError("an exact search ranks all passages by the student's score: leave fuse and sources alone")
        if self.budget_ms is not None and not self.exact:
            raise InputError("budget_ms is for an exact search; set exact as well, or leave it out")


@dataclass(frozen=True, slots=True)
class _Ranked:
    """A ranking of rows: final scores (what it is sorted by), the student's scores, and who proposed what."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    student_scores: NDArray[np.float32]
    num_scored: int
    proposals: Mapping[str, FoundRows]
    certificate: Certificate | None


def search(
    index: SearchableIndex,
    student: SearchStudent,
    queries: Sequence[Query] | Sequence[str],
    settings: SearchSettings | None = None,
    *,
    show_progress: bool | None = False,
    **changes: Any,
) -> list[Ranking]:
    """Rank the passages of an index for each query: candidates, then the student's full score (IEM).

    Args:
        index: made by this student.
        student: encodes the queries and scores.
        queries: texts, or queries with ids; texts get the ids "1", "2", ...
        settings: how to search.
        show_progress: None means: if standard error is a terminal.
        changes: single fields of the settings, as in ``search(index, student, queries, top_k=3)``.

    Returns:
        One ranking per query, best first, ties by passage id. ``seconds`` holds "encode" (the mean over queries encoded
        together), "candidates" and "score".

    Raises:
        InputError: settings that do not go together, or a query without text.
        FilterError: the filter cannot be read, or does not fit the metadata.
        IndexMismatchError: the index was made by another student.
        ModelError: the student gave a score that is not a number.
    """
    searcher = Searcher(index, student, replace(settings or SearchSettings(), **changes))
    return searcher.rank(queries, show_progress=show_progress)


class Searcher:
    """``search`` for many calls: what does not depend on the queries is done once. Arguments as there."""

    def __init__(
        self,
        index: SearchableIndex,
        student: SearchStudent,
        settings: SearchSettings | None = None,
        *,
        reaches: NDArray[np.float32] | None = None,
    ) -> None:
        """Args: ``reaches``, for exact searches, as ``passage_reaches`` gives them; else they are computed once."""
        self.settings = settings or SearchSettings()
        self.settings.check()
        index.check_student(student.fingerprint)
        self._index = index
        self._student = student
        self._task: Task = self.settings.task or index.task
        self._allowed = index.select(self.settings.filter)
        by_vectors = not {"vectors", "ann"}.isdisjoint(self.settings.sources)
        self._exact = self.settings.exact or (by_vectors and not student.has_anchor)
        self._reaches = reaches
        self._sources: list[CandidateSource] = []
        if "vectors" in self.settings.sources and not self._exact:
            self._sources.append(VectorSource(index, self._allowed))
        if "ann" in self.settings.sources and not self._exact:
            self._sources.append(AnnSource(index, self._allowed))
        if "bm25" in self.settings.sources or self.settings.fuse:
            self._sources.append(LexicalSource(index, self.settings.filter))

    def rank(
        self,
        queries: Sequence[Query] | Sequence[str],
        *,
        show_progress: bool | None = False,
        title: str = "searching",
    ) -> list[Ranking]:
        """Rank the passages for each query; ``title`` is the progress bar's."""
        asked = _as_queries(queries)
        rankings: list[Ranking] = []
        with progress_bar(title, len(asked), show=show_progress) as advance:
            for start in range(0, len(asked), _ENCODED_AT_ONCE):
                block = asked[start : start + _ENCODED_AT_ONCE]
                begin = time.perf_counter()
                vectors = self._student.encode_queries([query.text for query in block]).vectors
                anchors = self._anchors(vectors)
                seconds = (time.perf_counter() - begin) / len(block)
                for query, vector, anchor in zip(block, vectors, anchors, strict=True):
                    rankings.append(self._rank_one(query, vector, anchor, seconds))
                    advance(1)
        return rankings

    def _anchors(self, vectors: NDArray[np.float32]) -> Sequence[NDArray[np.float32] | None]:
        if not self._student.has_anchor:
            return [None] * len(vectors)
        return list(self._student.anchor_queries(vectors, self._task))

    def _rank_one(
        self, query: Query, vector: NDArray[np.float32], anchor: NDArray[np.float32] | None, encode_seconds: float
    ) -> Ranking:
        begin = time.perf_counter()
        proposals = {
            source.name: source.propose(query, anchor, max(self.settings.num_candidates, self.settings.top_k))
            for source in self._sources
        }
        proposed = time.perf_counter()
        ranked = (
            self._rank_exactly(query, vector, proposals) if self._exact else self._rescore(query, vector, proposals)
        )
        anchor_scores = [None] * len(ranked.rows)
        if anchor is not None and len(ranked.rows):
            anchor_scores = (self._index.vectors(ranked.rows) @ anchor).tolist()
        passages = tuple(
            RankedPassage(rank, passage, score, anchor_score)
            for rank, (passage, score, anchor_score) in enumerate(
                zip(self._index.passages(ranked.rows), ranked.scores.tolist(), anchor_scores, strict=True), start=1
            )
        )
        if self.settings.explain:
            passages = _explained(query, passages, ranked)
        seconds = {
            "encode": encode_seconds,
            "candidates": proposed - begin,
            "score": time.perf_counter() - proposed,
        }
        return Ranking(query, passages, ranked.num_scored, seconds, ranked.certificate, self._index.version)

    def _rescore(self, query: Query, vector: NDArray[np.float32], proposals: Mapping[str, FoundRows]) -> _Ranked:
        # In the rows' order the vectors are read from the disk in one direction; the final order is made below.
        rows = np.unique(np.concatenate([found.rows for found in proposals.values()]))
        scores = self._student.score(vector, self._index.vectors(rows), self._task) if len(rows) else _NOTHING
        _refuse_nan(scores, query)
        return self._chosen(rows, scores, proposals, len(rows), None)

    def _rank_exactly(self, query: Query, vector: NDArray[np.float32], proposals: Mapping[str, FoundRows]) -> _Ranked:
        if self._reaches is None and isinstance(self._student, BoundedStudent):
            self._reaches = passage_reaches(self._index, self._student)
        top_k = max(self.settings.num_candidates, self.settings.top_k) if self.settings.fuse else self.settings.top_k
        try:
            found = certified_top_k(
                self._index, self._student, vector, self._task, top_k,
                allowed=self._allowed, budget_ms=self.settings.budget_ms, reaches=self._reaches,
            )  # fmt: skip
        except ModelError as error:
            raise ModelError(f"query {query.id!r}: {error}") from error
        return self._chosen(found.rows, found.scores, proposals, found.certificate.num_scored, found.certificate)

    def _chosen(
        self,
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        proposals: Mapping[str, FoundRows],
        num_scored: int,
        certificate: Certificate | None,
    ) -> _Ranked:
        """The first ``top_k`` by the student's score, or by its fusion with BM25."""

        def ids_of(places: NDArray[np.int64]) -> Sequence[str]:
            return self._index.ids(rows[places])

        final = scores
        if self.settings.fuse:
            by_score = top_rows(scores, len(scores), ids_of)
            fused = reciprocal_rank_scores([rows[by_score].tolist(), proposals["bm25"].rows.tolist()])
            final = np.array([fused[row] for row in rows.tolist()], np.float32)
        best = top_rows(final, self.settings.top_k, ids_of)
        return _Ranked(rows[best], final[best], scores[best], num_scored, proposals, certificate)


_NOTHING = np.zeros(0, np.float32)


def _explained(query: Query, passages: tuple[RankedPassage, ...], ranked: _Ranked) -> tuple[RankedPassage, ...]:
    from d2llm.index.lexical import tokenize

    asked = set(tokenize(query.text))
    places = {name: {row: at for at, row in enumerate(found.rows.tolist())} for name, found in ranked.proposals.items()}
    explained: list[RankedPassage] = []
    for place, row, score in zip(passages, ranked.rows.tolist(), ranked.student_scores.tolist(), strict=True):
        at = {name: rows[row] for name, rows in places.items() if row in rows}
        counts = Counter(term for term in tokenize(place.passage.full_text) if term in asked)
        why = Explanation(
            anchor=place.anchor_score,
            interaction=None if place.anchor_score is None else score - place.anchor_score,
            source_ranks={name: found + 1 for name, found in at.items()},
            source_scores={name: float(ranked.proposals[name].scores[found]) for name, found in at.items()},
            terms=dict(counts),
        )
        explained.append(replace(place, explanation=why))
    return tuple(explained)


def _as_queries(queries: Sequence[Query] | Sequence[str]) -> list[Query]:
    if isinstance(queries, str):
        raise InputError("queries is one string; give a list of texts or queries")
    asked = [Query(str(n), query) if isinstance(query, str) else query for n, query in enumerate(queries, start=1)]
    for query in asked:
        if not query.text.strip():
            raise InputError(f"query {query.id!r} has no text; remove it or write one")
    return asked


def _refuse_nan(scores: NDArray[np.float32], query: Query) -> None:
    num_wrong = int(np.isnan(scores).sum())
    if num_wrong:
        raise ModelError(
            f"query {query.id!r}: {num_wrong} of {len(scores)} scores are NaN and cannot be ranked; check the student"
        )
