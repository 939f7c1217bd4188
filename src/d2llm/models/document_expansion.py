"""Words that a passage lacks and queries for it may have, predicted from its vector, for BM25 to count as well.

How likely a query for a passage has a word is a linear function of the passage's vector, for each word that several
queries of the fit had. An index stores the words with the largest counts times their rarity in each passage
(``store.bm25.AddedWords``), so that a search costs only their postings. The counts go on where those of the passage's
own words end: the likelihood of a word, in units of the mean likelihood of those that the passage has.

SPLADE (Formal et al. 2021, arXiv 2107.05720) reads such words from the output layer of a masked language model, and
doc2query (Nogueira et al. 2019, arXiv 1904.08375) from queries that a model writes. Here a student that does not change
predicts them, of which most have no output layer over words, and no passage is read again.

``document_expansion.safetensors`` in a student's folder has the function. Vectors do not depend on it, so an index is
valid for the student with or without it; an index with such words names the expansion that made them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from d2llm.core.batches import batched
from d2llm.core.errors import InputError, ModelError
from d2llm.core.json_values import parse_json
from d2llm.models.fitted_part import Widths
from d2llm.ops.bm25_words import terms
from d2llm.ops.words import WORD_RULE
from d2llm.store.word_segment import learned_term

NUM_WORDS = 20
"""Words that are added to a passage, at most."""
AMOUNT = 0.5
"""What part of its predicted count a word gets (docs/recipes.md)."""
_LEAST_MEAN = 0.01  # of the likelihoods of a passage's own words
_BLOCK = 512
_NUM_LEARNED = 256  # learned words of a passage, at most
_LEARNED_BLOCK = 256  # texts whose weights of learned words are in memory at once
_ARRAYS = ("usual", "middle", "weights", "rarity")


@dataclass(frozen=True, eq=False)
class DocumentExpansion:
    """Likelihood of word t in a query for a passage with vector y: max(0, usual_t + (y - middle) . weights_t).

    Attributes:
        terms: the words, as ``ops.bm25_words.terms`` writes them.
        usual: [terms], the mean likelihood in the fit.
        middle: [dim], the mean vector of the fit.
        weights: [dim, terms], float32.
        rarity: [terms], the idf of each word among the passages of the fit.
        num_passages: of each data set of the fit, the passages that a query of it has, by name.
        explained: of each data set, how much of the variance of the fractions is explained by fits that left them out.
        num_words: words that are added to a passage, at most.
        amount: what part of its predicted count a word gets.
    """

    file_name: ClassVar[str] = "document_expansion.safetensors"

    terms: tuple[str, ...]
    usual: NDArray[np.float32]
    middle: NDArray[np.float32]
    weights: NDArray[np.float32]
    rarity: NDArray[np.float32]
    num_passages: dict[str, int]
    explained: dict[str, float]
    num_words: int = NUM_WORDS
    amount: float = AMOUNT

    def words(self, vectors: NDArray[np.float32], full_texts: Sequence[str]) -> list[dict[str, float]]:
        """The words that each of some passages lacks, with counts above 0, by its vector [dim] of [n, dim]."""
        column_of = {term: index for index, term in enumerate(self.terms)}
        words: list[dict[str, float]] = []
        for start in range(0, len(full_texts), _BLOCK):
            texts, block = full_texts[start : start + _BLOCK], vectors[start : start + _BLOCK]
            likely = np.maximum(self.usual + (block.astype(np.float32) - self.middle) @ self.weights, 0)
            for text, row in zip(texts, likely, strict=True):
                present = [column_of[term] for term in {*terms(text)} if term in column_of]
                mean = max(float(row[present].mean()), _LEAST_MEAN) if present else _LEAST_MEAN
                counts = np.round(self.amount / mean * row, 2)
                counts[present] = 0
                best = np.argsort(-counts * self.rarity, kind="stable")[: self.num_words].tolist()
                words.append({self.terms[index]: round(float(counts[index]), 2) for index in best if counts[index] > 0})
        return words

    @property
    def fingerprint(self) -> str:
        """Content hash."""
        digest = hashlib.sha256(json.dumps([WORD_RULE, self.terms, self.num_words, self.amount]).encode())
        for array in (self.usual, self.middle, self.weights, self.rarity):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def write(self, folder: Path, student: str) -> None:
        """Write the expansion into the folder of the student with this fingerprint."""
        from d2llm.models.sources import write_arrays

        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        metadata = {"student": student, "word_rule": str(WORD_RULE), "facts": json.dumps(self.facts())}
        write_arrays(folder / self.file_name, arrays, metadata)

    def facts(self) -> dict[str, Any]:
        """Everything but the function's own numbers."""
        return {
            "terms": list(self.terms),
            "num_passages": self.num_passages,
            "explained": self.explained,
            "num_words": self.num_words,
            "amount": self.amount,
        }

    @classmethod
    def read(cls, folder: Path, student: str, widths: Widths) -> DocumentExpansion | None:
        """The expansion in the folder of the student with this fingerprint; None if there is none.

        Raises:
            ModelError: it cannot be read, does not fit the width of the vectors, or belongs to another student.
        """
        from d2llm.models.sources import load_arrays, load_metadata

        path = folder / cls.file_name
        if not path.is_file():
            return None
        less = "delete the file and its name in the manifest to index passages without further words"
        remedy = f"restore the student's folder, or {less}"
        arrays: dict[str, Any] = load_arrays(path, remedy=remedy)
        metadata = load_metadata(path)
        if (owner := metadata.get("student")) != student:
            raise ModelError(f"{path} was fitted to the student {owner}, but this one is {student}; {remedy}")
        try:
            facts: dict[str, Any] = parse_json(metadata["facts"])
            facts["terms"] = tuple(facts["terms"])
            expansion = cls(**facts, **arrays)
        except (ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{path} cannot be read ({error}); {remedy}") from error
        if (rule := metadata.get("word_rule")) != str(WORD_RULE):
            raise ModelError(
                f"{path} has words by rule {rule}, but this d2llm makes them by rule {WORD_RULE}; fit it again with "
                f"`d2llm fit-scores --document-expansion`, or {less}"
            )
        num = len(expansion.terms)
        shapes = {"usual": (num,), "middle": (widths.vectors,), "weights": (widths.vectors, num), "rarity": (num,)}
        wrong = [name for name in _ARRAYS if arrays[name].shape != shapes[name]]
        if wrong:
            raise ModelError(
                f"{path} does not fit {num} words and vectors of width {widths.vectors} ({', '.join(wrong)}); {remedy}"
            )
        return expansion


class LearnedWords:
    """Words of passages and queries, and their weights, by a student with the pooling ``splade``.

    An index has them as terms beside the words of its texts (``store.word_segment.learned_term``): a pair's BM25 and
    the inner product of their weights are one sum over postings, with one bound. Passages and queries are read once
    more, by that student. It is in the folder ``learned_words`` of the student that has these words.

    Source: Formal et al., "SPLADE v2: Sparse Lexical and Expansion Model for Information Retrieval", 2021 (arXiv
    2109.10086). Of a passage only the largest weights are kept.

    Raises:
        InputError: the student has another pooling.
    """

    folder_name: ClassVar[str] = "learned_words"
    num_words: ClassVar[int] = _NUM_LEARNED

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
            for block in batched(full_texts, _LEARNED_BLOCK)
            for weights in self._student.encode_passages(block).vectors
        ]

    def of_queries(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The terms of queries, by weight."""
        return [
            _largest(weights)
            for block in batched(texts, _LEARNED_BLOCK)
            for weights in self._student.query_vectors(self._student.encode_queries(block).vectors)
        ]

    def write(self, folder: Path, student: str) -> None:  # noqa: ARG002
        """Write the student of the words into the folder of the one that has them."""
        self._student.save(folder / self.folder_name)


def _largest(weights: NDArray[np.float32]) -> dict[str, float]:
    """The terms of the largest weights above 0 [vocabulary]."""
    best = np.argsort(-weights, kind="stable")[:_NUM_LEARNED]
    return {learned_term(index): round(float(weights[index]), 4) for index in best.tolist() if weights[index] > 0}
