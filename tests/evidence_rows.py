"""What an index has of its rows beside their vectors, without an index."""

from __future__ import annotations

import numpy as np

from d2llm.store.bm25 import WordIndex
from d2llm.store.vector_formats import make_format
from d2llm.store.window_vectors import WindowVectors


class EvidenceRows:
    """The words of some texts, and vectors of windows [rows][windows, dim] where there are any.

    A row without windows is level with its own vector, of ``own`` [rows, dim].
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
            self.windows = WindowVectors(places, stored.encode(vectors, [""] * len(vectors)), stored)

    def best_windows(self, query, rows):
        scores = self.windows.best(query, rows)
        alone = np.isneginf(scores)
        scores[alone] = np.einsum("ij,j->i", self._own[rows[alone]].astype(np.float64), query.astype(np.float64))
        return scores
