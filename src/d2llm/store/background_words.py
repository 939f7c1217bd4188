"""How rare words are in general: the statistics of BM25 for texts that are in no index.

``shipped/words`` has a table for English and one for Chinese, counted by ``scripts/background_words.py``. A query is
weighted by the table of its script: Chinese if most of its letters are Han, otherwise English. A word that the
table lacks counts as one that a single passage has, so names and words of other languages are rare, but not unknown.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.core.files import write_bytes
from d2llm.core.shipped import WordLanguage, background_words
from d2llm.ops.words import WORD_RULE, is_mostly_han
from d2llm.store.word_segment import WordSegment, WordStatistics, vocabulary_indices


@dataclass(frozen=True, slots=True)
class BackgroundWords:
    """In how many passages of a collection each term occurs, and the collection's other statistics.

    Attributes:
        terms: [v] hashes of the terms that at least two passages have, ascending.
        counts: [v] how many passages have each.
        statistics: of the collection.
    """

    terms: NDArray[np.uint64]
    counts: NDArray[np.uint16]
    statistics: WordStatistics

    @classmethod
    def count(cls, segment: WordSegment) -> BackgroundWords:
        """The statistics of the texts of a segment."""
        counts = np.diff(segment.starts)
        kept = counts > 1
        columns = (segment.lengths, segment.num_windows, segment.window_lengths)
        statistics = WordStatistics(len(segment), *(int(column.sum(dtype=np.int64)) for column in columns))
        return cls(segment.terms[kept], counts[kept].astype(np.uint16), statistics)

    def count_words(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of passages that have each term [n], at least 1."""
        positions = vocabulary_indices(self.terms, hashes)
        return np.where(positions >= 0, self.counts[positions].astype(np.int64), 1)

    def write(self, path: Path) -> None:
        """Write the table."""
        buffer = io.BytesIO()
        one = self.statistics
        sums = [one.num_passages, one.num_words, one.num_windows, one.num_window_words]
        np.savez_compressed(buffer, terms=self.terms, counts=self.counts, sums=np.array(sums), rule=WORD_RULE)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> BackgroundWords:
        """The table in a file.

        Raises:
            DataFormatError: it is damaged, or has words by another rule.
        """
        try:
            with np.load(path) as arrays:
                rule, sums = int(arrays["rule"]), arrays["sums"].tolist()
                table = cls(arrays["terms"], arrays["counts"], WordStatistics(*sums))
        except (OSError, EOFError, BadZipFile, zlib.error, ValueError, LookupError, TypeError) as error:
            raise DataFormatError(path, f"cannot be read ({error}); install d2llm again") from error
        if rule != WORD_RULE:
            problem = f"has words by rule {rule}, but this d2llm makes them by rule {WORD_RULE}"
            raise DataFormatError(path, f"{problem}; run scripts/background_words.py")
        return table


def background_for(query: str) -> BackgroundWords:
    """The table for a query: Chinese or English."""
    return _table("chinese" if is_mostly_han(query) else "english")


@cache
def _table(language: WordLanguage) -> BackgroundWords:
    return BackgroundWords.read(background_words(language))
