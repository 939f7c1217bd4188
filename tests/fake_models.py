"""Tiny deterministic stand-ins for the student and the teacher: words hashed into vectors, no weights."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np

from d2llm.core.types import PART_KINDS
from d2llm.models.protocols import PlainStudent
from d2llm.models.score_features import FeatureWeights
from d2llm.models.teachers.pair_teacher import TeacherScores
from d2llm.models.tokens import EncodedTexts, TokenVectors
from d2llm.recipe import InteractionConfig, StudentConfig


@functools.cache
def _word_vector(word, dim):
    return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(dim).astype(np.float32)


class Interruption(Exception):
    """Raised by a fake model when ``fail_after`` is reached."""


class FakeStudent(PlainStudent):
    """Inner product: 2 <q, p>. Interaction: bounded by 1. Texts over ``max_words`` words are truncated.

    With ``fail_after`` it raises ``Interruption`` instead of encoding more than that many passages.
    """

    def __init__(
        self,
        *,
        dim: int = 16,
        fingerprint: str = "fake-student",
        head: str = "dot",
        max_words: int = 50,
        fail_after: int | None = None,
    ):
        self.fingerprint = fingerprint
        self.vector_dim = dim
        self.has_dot = head == "dot"
        self.config = StudentConfig(interaction=InteractionConfig(head=head))
        self.max_words = max_words
        self.encoded_passages = 0
        self.fail_after = fail_after

    def _encode(self, texts, advance):
        vectors = np.zeros((len(texts), self.vector_dim), np.float32)
        words = [text.lower().split() for text in texts]
        for row, of_text in enumerate(words):
            for word in of_text[: self.max_words]:
                vectors[row] += _word_vector(f"{self.fingerprint} {word}", self.vector_dim)
        if advance is not None:
            advance(len(texts))
        lengths = [len(of_text) for of_text in words]
        cut = tuple(index for index, n in enumerate(lengths) if n > self.max_words)
        return EncodedTexts(vectors, cut, sum(min(n, self.max_words) for n in lengths))

    def encode_queries(self, texts, *, instruction=None, advance=None):
        return self._encode([f"{instruction or ''}{text}" for text in texts], advance)

    def encode_passages(self, texts, *, advance=None):
        if self.fail_after is not None and self.encoded_passages + len(texts) > self.fail_after:
            raise Interruption
        self.encoded_passages += len(texts)
        return self._encode(texts, advance)

    def query_vectors(self, query_vectors, task):
        assert self.has_dot
        return 2 * query_vectors

    def score(self, query_vector, passage_vectors, task):
        sign = 1 if task == "asymmetric" else -1
        # Not a matrix product: in BLAS the summation order within a row depends on the number of rows.
        dot = 2 * np.einsum("ij,j->i", passage_vectors, query_vector)
        return dot + sign * np.tanh(passage_vectors[:, 0] * query_vector[1])


def with_exact_products(encoded):
    """The same vectors as multiples of 1/4, whose inner products are the same in whatever order they are summed."""
    return EncodedTexts(np.round(4 * encoded.vectors) / 4, encoded.truncated, encoded.num_tokens)


class DotStudent(FakeStudent):
    """The inner product is the whole score, and inner products are exact: vector values are multiples of 1/4."""

    def _encode(self, texts, advance):
        return with_exact_products(super()._encode(texts, advance))

    def score(self, query_vector, passage_vectors, task):
        return 2 * np.einsum("ij,j->i", passage_vectors, query_vector)


class PreparedDotStudent(DotStudent):
    """As AnchorStudent, and tells a search that the interaction has weight 0; the interaction must not be computed."""

    def prepare(self, query_vector, task):
        return FakeScorer(self.query_vectors(query_vector[None], task)[0])

    def passage_bound(self, passage_vectors):
        return np.ones(len(passage_vectors), np.float32)


@dataclass(frozen=True)
class FakeScorer:
    dot_query: np.ndarray
    bound: float = 0.0

    def __call__(self, passages):
        return passages @ self.dot_query

    def change(self, passages):
        raise AssertionError("an interaction without weight was asked")


class FakeTeacher:
    """Log-odds = number of shared words. Records the scored pairs; with ``fail_after`` it raises beyond that many."""

    def __init__(self, *, fingerprint: str = "fake-teacher", fail_after: int | None = None):
        self.fingerprint = fingerprint
        self.fail_after = fail_after
        self.pairs = []

    def prompt_fingerprint(self, task):
        return f"fake-prompt-{task}"

    def score_pairs(self, pairs, task, *, with_features=False, advance=None):
        assert not with_features
        if self.fail_after is not None and len(self.pairs) + len(pairs) > self.fail_after:
            raise Interruption
        self.pairs += pairs
        shared = [len(set(a.lower().split()) & set(b.lower().split())) for a, b in pairs]
        if advance is not None:
            advance(len(pairs))
        num_truncated = sum(len(b) > 1000 for _, b in pairs)
        return TeacherScores(np.array(shared, np.float32), None, num_truncated, num_tokens=0)


TOKEN_WEIGHTS = {"bm25": 0.25, "maxsim": 5.0}


class TokenStudent(FakeStudent):
    """A student with a vector of norm sqrt(dim) for each word, whose score counts them, if the index has them."""

    token_dim = 12

    def __init__(self, projection="first", **options):
        super().__init__(**options)
        self.token_fingerprint = projection

    def feature_weights(self, task, *, stored=PART_KINDS):
        if task != "asymmetric":
            return FeatureWeights()
        return FeatureWeights(terms=TOKEN_WEIGHTS if "token" in stored else {"bm25": 1.0})

    def encode_with_tokens(self, texts, kind, *, instruction=None, advance=None):
        encode = partial(self.encode_queries, instruction=instruction) if kind == "query" else self.encode_passages
        encoded = encode(texts, advance=advance)
        tokens = TokenVectors.join([self.words(text) for text in texts], self.token_dim)
        return EncodedTexts(encoded.vectors, encoded.truncated, encoded.num_tokens, tokens=tokens)

    def words(self, text):
        vectors = [_word_vector(f"{self.token_fingerprint} {w}", self.token_dim) for w in text.lower().split()]
        normed = [vector * (self.token_dim**0.5 / np.linalg.norm(vector)) for vector in vectors[: self.max_words]]
        return np.array(normed, np.float32).reshape(-1, self.token_dim)
