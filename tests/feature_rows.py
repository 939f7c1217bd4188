"""The score features that an index holds for its rows besides their vectors, without an index."""

from __future__ import annotations

import numpy as np

from d2llm.store.bm25 import WordIndex
from d2llm.store.part_vectors import PartVectors
from d2llm.store.vector_formats import make_format


class FeatureRows:
    """The words of some texts, and optionally the vectors of their windows and tokens, [rows][parts, dim].

    A row without windows is scored by its own vector in ``own`` [rows, dim].
    """

    def __init__(self, texts, windows=None, own=None, tokens=None):
        self.words = WordIndex.from_texts(texts)
        self.windows = None
        self._own = own
        self.tokens = None
        self.num_cut = 0  # rows that got a bound of their sum instead
        if windows is not None:
            self.windows = part_vectors(windows, own.shape[1], "float32")
        if tokens is not None:
            self.tokens = part_vectors(tokens, tokens[0].shape[1], "int4")

    def vectors(self, rows):
        return self._own[rows]

    def best_windows(self, query, rows):
        scores = self.windows.best(query, rows)
        without_windows = np.isneginf(scores)
        scores[without_windows] = np.einsum(
            "ij,j->i", self._own[rows[without_windows]].astype(np.float64), query.astype(np.float64)
        )
        return scores

    def best_tokens(self, queries, rows, needed=None):
        sums = self.tokens.sum_of_best(queries, rows, needed)
        if needed is not None:
            self.num_cut += int((sums > self.tokens.sum_of_best(queries, rows)).sum())
        return sums


def part_vectors(parts, dim, vector_format):
    """The vectors of parts of rows, [rows][parts, dim], in a format."""
    counts = np.array([len(each) for each in parts], np.int64)
    vectors = np.concatenate([np.zeros((0, dim), np.float32), *parts]).astype(np.float32)
    stored = make_format(vector_format, dim)
    extents = np.stack([np.cumsum(counts) - counts, counts], axis=1)
    codes = stored.encode(vectors, [""] * len(vectors))
    return PartVectors(extents, codes, stored)
