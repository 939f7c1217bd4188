"""A store with given vectors and a student without an encoder, for tests of approximate indexes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from d2llm.core.types import Passage
from d2llm.models import protocols
from d2llm.models.tokens import EncodedTexts
from d2llm.recipe import StudentConfig
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.view import PassageView

DIM = 32


class PlainStudent(protocols.PlainStudent):
    """A student whose queries are the numbers of its vectors; without vectors, a text has one of its own."""

    config = StudentConfig()

    def __init__(self, vectors=None, *, has_dot=True, dim=DIM):
        self.fingerprint = "student"
        self.has_dot = has_dot
        self.vector_dim = dim
        self.vectors = vectors
        self.asked: list[str] = []

    def query_vectors(self, vectors, task):
        del task
        return vectors

    def encode_queries(self, texts, *, instruction=None, advance=None):
        del instruction, advance
        self.asked += texts
        if self.vectors is None:
            vectors = np.stack([clustered(1, seed=zlib.crc32(text.encode()), dim=self.vector_dim)[0] for text in texts])
        else:
            vectors = self.vectors[[int(text) for text in texts]]
        return EncodedTexts(vectors, (), len(texts))

    def score(self, query_vector, passage_vectors, task):
        del task
        return np.einsum("ij,j->i", passage_vectors, query_vector)


def clustered(num, seed=0, dim=DIM, num_clusters=25):
    """Vectors of norm sqrt(dim) around fixed centres."""
    centres = np.random.default_rng(99).standard_normal((num_clusters, dim))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, num_clusters, num)] + 0.7 * random.standard_normal((num, dim))
    return (vectors * np.sqrt(dim) / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def put_vectors(store: IndexStore, first: int, vectors: np.ndarray, text: str = "text") -> None:
    """Upsert passages p<first>, ... with these vectors."""
    passages = [Passage(f"p{first + index:06d}", f"{text} {first + index}") for index in range(len(vectors))]
    with store.writing():
        changes = store.compare(passages)
        assert len(changes.texts) == len(passages)
        store.write(changes, vectors)


def new_ann_store(folder: Path, vectors: np.ndarray, vector_format: str = "bfloat16") -> IndexStore:
    dim: Any = vectors.shape[1]
    store = IndexStore.create(folder, StoredSpec(student="student", dim=dim, vector_format=vector_format))
    put_vectors(store, 0, vectors)
    return store


def products(view: PassageView, query: np.ndarray) -> np.ndarray:
    """Inner products of a query with all stored vectors."""
    return view.vectors(np.arange(view.capacity)).astype(np.float64) @ query
