"""A corpus of any size with realistic relations between passages and queries.

Real passages, encoded by the student, come first. The others are variations of them: each vector lies between that
of a passage and that of one of its eight nearest neighbours, with some noise, and has the norm of the passage's vector;
the text combines the beginning of the first with the end of the second. So norms, neighbourhoods, words and lengths are
those of real passages, but there are fewer topics than in a million different passages.
"""

from __future__ import annotations

import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from d2llm import Student
from d2llm.core.types import Passage, Task
from d2llm.data.beir import read_beir
from d2llm.models.protocols import PlainStudent
from d2llm.models.tokens import EncodedTexts, TextKind, TokenVectors

FRACTIONS = {"squad-sent": 0.38, "quora": 0.50, "medquad": 0.12}  # data set -> its fraction of the real passages
ASKED: dict[Task, str] = {
    "symmetric": "quora",
    "asymmetric": "squad-sent",
}  # task -> the set whose dev queries are used
BLOCK = 16_384
_NEIGHBOURS = 8
_NOISE = 0.3  # relative to a vector's norm; noise alone gives a cosine of .96 with the original


class Queries(NamedTuple):
    """Queries of one task: texts and vectors [q, dim]."""

    texts: list[str]
    vectors: NDArray[np.float32]


class Corpus:
    """``size`` passages and their vectors, generated block by block; deterministic."""

    def __init__(
        self, passages: Sequence[Passage], vectors: NDArray[np.float32], size: int, *, longer: int = 1
    ) -> None:
        """Args: the real passages and vectors; ``longer``, how many times each text is repeated."""
        self._real = passages
        self._vectors = vectors
        self._longer = longer
        self.start, self.size = 0, size
        search = faiss.IndexFlatIP(vectors.shape[1])
        search.add(vectors)
        self._neighbours = search.search(vectors, _NEIGHBOURS + 1)[1][:, 1:]

    def blocks(self) -> Iterator[tuple[list[Passage], NDArray[np.float32]]]:
        """All passages with their vectors, ``BLOCK`` at a time."""
        for start in range(self.start, self.size, BLOCK):
            yield self._block(start, min(start + BLOCK, self.size))

    def first(self, number: int) -> Corpus:
        """The first passages."""
        part = copy.copy(self)
        part.size = min(number, self.size)
        return part

    def after(self, number: int) -> Corpus:
        """The passages after the first ones."""
        part = copy.copy(self)
        part.start = number
        return part

    def vectors(self) -> NDArray[np.float32]:
        """All vectors [size, dim]."""
        vectors = np.empty((self.size, self._vectors.shape[1]), np.float32)
        for start, (_, block) in zip(range(0, self.size, BLOCK), self.blocks(), strict=True):
            vectors[start : start + len(block)] = block
        return vectors

    def _block(self, start: int, end: int) -> tuple[list[Passage], NDArray[np.float32]]:
        random = np.random.default_rng(start)
        rows = np.arange(start, end)
        source = rows % len(self._real)
        other = self._neighbours[source, random.integers(_NEIGHBOURS, size=len(rows))]
        fraction = np.where(rows < len(self._real), 0, random.uniform(0, 0.5, len(rows))).astype(np.float32)
        noise = random.standard_normal((len(rows), self._vectors.shape[1]), np.float32)
        made = (1 - fraction[:, None]) * self._vectors[source] + fraction[:, None] * self._vectors[other]
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        made = with_noise(made, noise) * np.linalg.norm(self._vectors[source], axis=1, keepdims=True)
        made[rows < len(self._real)] = self._vectors[source[rows < len(self._real)]]
        parts = zip(rows.tolist(), source.tolist(), other.tolist(), fraction.tolist(), strict=True)
        return [self._passage(*part) for part in parts], made

    def _passage(self, row: int, source: int, other: int, fraction: float) -> Passage:
        one = self._real[source]
        words, ending = one.text.split(), self._real[other].text.split()
        kept = len(words) - int(fraction * len(words))
        text = " ".join([*words[:kept], *ending[len(ending) - int(fraction * len(ending)) :]])
        return Passage(f"passage-{row:07}", " ".join([text] * self._longer), one.title)


class KnownVectors(PlainStudent):
    """A student without encoder: it returns vectors that it was given, and scores as the real student does.

    Windows, for which no vectors were given, get random ones: only their time counts. A token gets the vector that it
    has in one of the real passages, with the noise that vectors of passages have; tokens of queries are real.
    """

    has_dot = True

    def __init__(self, student: Student, queries: Sequence[Queries], passages: Sequence[Passage] = ()) -> None:
        self._student = student
        self.token_dim, self.token_fingerprint = student.token_dim, student.token_fingerprint
        self._token_vectors: dict[int, NDArray[np.float32]] = {}
        if passages:
            texts = [passage.full_text for passage in passages]
            read = student.encode_with_tokens(texts, "passage").tokens
            assert read is not None
            for own, token_ids in zip(read.split(), self._tokens(texts), strict=True):
                self._token_vectors |= zip(token_ids, own, strict=True)
        self.fingerprint, self.config, self.vector_dim = student.fingerprint, student.config, student.vector_dim
        self.query_vectors, self.score = student.query_vectors, student.score
        self._queries = {text: vector for of_task in queries for text, vector in zip(*of_task, strict=True)}
        self._pending: defaultdict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self._random = np.random.default_rng(0)

    def prepare(self, query_vector: NDArray[np.float32], task: Task) -> Any:
        return self._student.prepare(query_vector, task)

    def passage_bound(self, passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._student.passage_bound(passage_vectors)

    def passages_of(self, corpus: Corpus) -> Iterator[Passage]:
        """The passages of a corpus; their vectors are stored for ``encode_passages``."""
        for passages, vectors in corpus.blocks():
            for passage, vector in zip(passages, vectors, strict=True):
                self._pending[passage.full_text].append(vector)
            yield from passages

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        del advance
        vectors = self._random.standard_normal((len(texts), self.vector_dim), np.float32)
        for index, text in enumerate(texts):
            if text in self._pending:
                vectors[index] = self._pending[text].pop(0)
                if not self._pending[text]:
                    del self._pending[text]
        return EncodedTexts(vectors, (), 0)

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """The known vectors; other queries are encoded, such as those that measure an approximate index."""
        del instruction, advance
        if unknown := [text for text in texts if text not in self._queries]:
            self._queries |= zip(unknown, self._student.encode_queries(unknown).vectors, strict=True)
        return EncodedTexts(np.stack([self._queries[text] for text in texts]), (), 0)

    def encode_with_tokens(
        self,
        texts: Sequence[str],
        kind: TextKind,
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """The known vectors, and those of the tokens that the real passages have."""
        del instruction
        if kind == "query":
            return replace(self.encode_queries(texts), tokens=self._student.encode_with_tokens(texts, kind).tokens)
        encoded, dim = self.encode_passages(texts, advance=advance), self.token_dim or 0
        tokens: list[NDArray[np.float32]] = []
        for token_ids in self._tokens(texts):
            known = [self._token_vectors[one] for one in token_ids if one in self._token_vectors]
            own = np.array(known, np.float32).reshape(-1, dim)
            noise = self._random.standard_normal(own.shape, np.float32)
            own = own + _NOISE * dim**0.5 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
            tokens.append(own * dim**0.5 / np.linalg.norm(own, axis=1, keepdims=True))
        return replace(encoded, tokens=TokenVectors.join(tokens, dim))

    def _tokens(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of each passage that have vectors."""
        projection = self._student.token_projection
        assert projection is not None, "a student without vectors of tokens"
        for ids in self._student.tokenize(texts, "passage").ids:
            yield [ids[index] for index in projection.positions(ids)]


def with_noise(vectors: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of norm 1 [n, dim] with some of the noise [n, dim], also of norm 1."""
    made = vectors + _NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def read_real(
    student: Student, data: Path, num_passages: int, num_queries: int, cache: Path | None
) -> tuple[list[Passage], NDArray[np.float32], dict[Task, Queries], float]:
    """Real passages and dev queries with their vectors, and the processor time in seconds for encoding them.

    Read from ``cache`` if they are in it.
    """
    passages: list[Passage] = []
    texts: dict[Task, list[str]] = {}
    for name, fraction in FRACTIONS.items():
        content = read_beir(data / name, splits=["dev"])
        passages += list(content.passages.values())[: round(fraction * num_passages)]
        for task, data_set in ASKED.items():
            if data_set == name:
                texts[task] = [content.queries[query_id].text for query_id in list(content.qrels["dev"])[:num_queries]]
    queries: dict[Task, Queries]
    cached = None if cache is None else cache / f"vectors-{student.fingerprint}-{num_passages}-{num_queries}.npz"
    if cached is not None and cached.is_file():
        with np.load(cached) as stored:
            queries = {task: Queries(texts[task], stored[task]) for task in texts}
            return passages, stored["passages"], queries, float(stored["seconds"])
    begin = time.process_time()
    vectors = student.encode_passages([passage.full_text for passage in passages]).vectors
    queries = {
        task: Queries(task_texts, student.encode_queries(task_texts).vectors) for task, task_texts in texts.items()
    }
    seconds = time.process_time() - begin
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {task: part.vectors for task, part in queries.items()}
        np.savez(cached, passages=vectors, seconds=seconds, **arrays)
    return passages, vectors, queries, seconds


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
