"""The evidence that an index holds for its rows besides their vectors, without an index."""

from __future__ import annotations

import numpy as np

from d2llm.store.bm25 import WordIndex
from d2llm.store.vector_formats import make_format
from d2llm.store.part_vectors import PartVectors


class EvidenceRows:
    """The words of some texts, and optionally the vectors of their windows, [rows][windows, dim].

    A row without windows is scored by its own vector in ``own`` [rows, dim].
    """

    def __init__(self, texts, windows=None, own=None):
        self.words = WordIndex.from_texts(texts)
        self.windows = None
        self._own = own
        if windows is not None:
            counts = np.array([len(each) for each in windows], np.int64)
            dim = own.shape[1]
            vectors = np.concatenate([np.zeros((0, dim), np.float32), *windows]).astype(np.float32)
            stored = make_format("float32", dim)
            places = np.stack([np.cumsum(counts) - counts, counts], axis=1)
            self.windows = PartVectors(places, stored.encode(vectors, [""] * len(vectors)), stored)

    def best_windows(self, query, rows):
        scores = self.windows.best(query, rows)
        without_windows = np.isneginf(scores)
        scores[without_windows] = np.einsum(
            "ij,j->i", self._own[rows[without_windows]].astype(np.float64), query.astype(np.float64)
        )
        return scores
