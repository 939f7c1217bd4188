"""Query expansion: a language model writes other queries for a query, or passages that would answer it.

``multi``: the model writes other queries with the same meaning. Each of them, and the query itself, proposes candidates
and ranks the candidates of all by the student's full score. Reciprocal-rank fusion joins these rankings. That of
the query has as much weight as all others together, so that useless queries cannot outvote it.

``hyde``: the model writes hypothetical passages. Their vectors and the query's are averaged, and the search goes on
with the mean in place of the query's vector. The words that count are still those of the query alone.

Where the model fails, the plain query is searched, and the ranking says so (``QueryExpansion.problem``).

Source of ``hyde``: Gao, Ma, Lin, Callan, "Precise Zero-Shot Dense Retrieval without Relevance Labels", ACL 2023, eq. 8.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError, ModelError
from d2llm.core.inputs import strings_of
from d2llm.core.types import ExpansionMethod, QueryExpansion
from d2llm.data.same_text import comparable
from d2llm.models.protocols import SearchStudent
from d2llm.models.writers.writer import Assignment, Writer, WrittenQueries
from d2llm.retrieval.settings import EXPANSION_TEXTS, ExpansionSettings


class Expansion:
    """Expands the queries of a search.

    The same queries and seed give the same texts, as far as the writer promises that.

    Args:
        writer: an untuned writer (``load_writer``).
        expand, expansions: the method, and how many texts to write for each query (``ExpansionSettings``).
        seed: of the writer's random numbers.

    Raises:
        InputError: there is no such method, or ``expansions`` is below 1.
    """

    def __init__(
        self, writer: Writer, expand: ExpansionMethod = "multi", expansions: int | None = None, *, seed: int = 0
    ) -> None:
        settings = ExpansionSettings(expand=expand, expansions=expansions)
        self.writer = writer
        if settings.expand is None:
            raise InputError("expand is None, but must be 'multi' or 'hyde'; for no expansion, give no Expansion")
        self.method: ExpansionMethod = settings.expand
        self.num_texts = settings.expansions or EXPANSION_TEXTS[self.method]
        self.seed = seed

    @overload
    def expand(self, queries: str) -> QueryExpansion: ...  # pyright: ignore[reportOverlappingOverload] - no list of letters
    @overload
    def expand(self, queries: Iterable[str]) -> list[QueryExpansion]: ...
    def expand(self, queries: Iterable[str] | str) -> QueryExpansion | list[QueryExpansion]:
        """What the writer adds to one query, or to each of a list (a list).

        A failure of the writer is a ``problem`` of all of them, not an error.

        Raises:
            InputError: the writer cannot expand queries, or a query is longer than it can read.
        """
        if isinstance(queries, str):
            return self.expand([queries])[0]
        queries = strings_of(queries, "queries")
        if not queries:
            return []
        begin = time.perf_counter()
        assignments = [assignment for query in queries for assignment in self._assignments(query)]
        try:
            written = self.writer.write(assignments)
        except ModelError as error:
            seconds = (time.perf_counter() - begin) / len(queries)
            return [QueryExpansion(self.method, (), seconds, problem=str(error)) for _ in queries]
        seconds = (time.perf_counter() - begin) / len(queries)
        size = len(assignments) // len(queries)
        by_query = [written[start : start + size] for start in range(0, len(written), size)]
        return [self._result(query, part, seconds) for query, part in zip(queries, by_query, strict=True)]

    def _assignments(self, query: str) -> list[Assignment]:
        if self.method == "multi":
            return [Assignment(query, "rephrasing", self.num_texts, seed=self.seed)]
        return [Assignment(query, "answer", seed=self.seed + offset) for offset in range(self.num_texts)]

    def _result(self, query: str, written: Sequence[WrittenQueries], seconds: float) -> QueryExpansion:
        texts: dict[str, str] = {}
        for item in written:
            for text in item.queries:
                texts.setdefault(comparable(text), text)
        texts.pop(comparable(query), None)
        num_written = sum(len(item.queries) for item in written)
        num_dropped = sum(item.num_dropped for item in written) + num_written - len(texts)
        problem = None
        if not texts:
            problem = next((item.problem for item in written if item.problem), "the answer only repeats the query")
        truncated = any(item.truncated for item in written)
        return QueryExpansion(self.method, tuple(texts.values()), seconds, num_dropped, truncated, problem=problem)


def add_hypothetical_passages(
    student: SearchStudent, query_vectors: NDArray[np.float32], expansions: Sequence[QueryExpansion]
) -> tuple[NDArray[np.float32], list[QueryExpansion]]:
    """[q, dim] -> the mean of each query's vector and those of its hypothetical passages, [q, dim].

    Hypothetical passages are encoded as passages. The mean has the norm of the query's vector, so that the weight of
    inner products against that of words stays the same. The expansions come back with the number of passages that the
    student read only in part.
    """
    owners = [index for index, expansion in enumerate(expansions) for _ in expansion.texts]
    if not owners:
        return query_vectors, list(expansions)
    read = student.encode_passages([text for expansion in expansions for text in expansion.texts])
    sums = query_vectors.copy()
    np.add.at(sums, owners, read.vectors)
    norms, own_norms = (np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (sums, query_vectors))
    scaled = sums * (own_norms / np.where(norms > 0, norms, 1))
    expanded = np.isin(np.arange(len(sums)), owners)
    vectors = np.where(expanded[:, None], scaled, query_vectors).astype(np.float32)
    num_cut = np.bincount([owners[text] for text in read.truncated], minlength=len(sums)).tolist()
    return vectors, [replace(one, num_truncated=count) for one, count in zip(expansions, num_cut, strict=True)]
