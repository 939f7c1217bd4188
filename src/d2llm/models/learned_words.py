"""Words of passages and queries, and their weights, by a student with the pooling ``splade``.

An index has them as terms beside the words of its texts (``store.word_segment.learned_term``): a pair's BM25 and the
inner product of their weights are one sum over postings, with one bound. Passages and queries are read once more, by
that student. It is in the folder ``learned_words`` of the student that has these words. Vectors do not depend on them.

Source: Formal et al., "SPLADE v2: Sparse Lexical and Expansion Model for Information Retrieval", 2021 (arXiv
2109.10086). Of a passage only the largest weights are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.store.word_segment import learned_term

NUM_WORDS = 256
"""Words of a passage, at most."""
_BLOCK = 256  # texts whose weights are in memory at once


class LearnedWords:
    """The words that a student with the pooling ``splade`` has for texts.

    Raises:
        InputError: the student has another pooling.
    """

    folder_name: ClassVar[str] = "learned_words"
    num_words: ClassVar[int] = NUM_WORDS

    def __init__(self, student: Any) -> None:  # a Student, which imports this module
        if student.config.pooling.kind != "splade":
            raise InputError(
                f"learned words come from a student with the pooling splade, but this one has "
                f'{student.config.pooling.kind}; train one with student.pooling = "splade" (docs/recipes.md)'
            )
        self._student = student
        self.fingerprint: str = student.fingerprint

    def words(self, vectors: NDArray[np.float32], full_texts: Sequence[str]) -> list[dict[str, float]]:  # noqa: ARG002
        """The terms of passages, by weight; their vectors do not matter."""
        return [
            _largest(weights)
            for block in batched(full_texts, _BLOCK)
            for weights in self._student.encode_passages(block).vectors
        ]

    def of_queries(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The terms of queries, by weight."""
        return [
            _largest(weights)
            for block in batched(texts, _BLOCK)
            for weights in self._student.query_vectors(self._student.encode_queries(block).vectors)
        ]

    def write(self, folder: Path, student: str) -> None:  # noqa: ARG002
        """Write the student of the words into the folder of the one that has them."""
        self._student.save(folder / self.folder_name)


def _largest(weights: NDArray[np.float32]) -> dict[str, float]:
    """The terms of the largest weights above 0 [vocabulary]."""
    best = np.argsort(-weights, kind="stable")[:NUM_WORDS]
    return {learned_term(index): round(float(weights[index]), 4) for index in best.tolist() if weights[index] > 0}
