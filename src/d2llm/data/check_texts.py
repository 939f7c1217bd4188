"""Single-pass building blocks of the data check: text hashes, samples, token lengths and languages."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from d2llm.core.extras import require
from d2llm.data.check_report import Languages, Lengths

_PERCENTILES = (50, 75, 90, 95, 99, 100)
_NUM_BARS = 8
_BATCH_TEXTS = 512

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Texts -> number of tokens of each, including special tokens."""


def hash64(text: str) -> int:
    """A 64-bit hash, the same in every process; 10 million texts have a collision with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Sample:
    """Up to ``size`` texts drawn uniformly from a stream of ``num_seen`` texts (reservoir sampling)."""

    def __init__(self, size: int, *, seed: int = 0) -> None:
        self.texts: list[str] = []
        self.num_seen = 0
        self._size = size
        self._random = random.Random(seed)

    def add(self, text: str) -> None:
        """Process the next text of the stream."""
        self.num_seen += 1
        if len(self.texts) < self._size:
            self.texts.append(text)
        elif (index := self._random.randrange(self.num_seen)) < self._size:
            self.texts[index] = text


def measure_lengths(
    label: str, sample: Sample, count_tokens: CountTokens, limit: int, advance: Callable[[int], None]
) -> Lengths | None:
    """Token lengths of the sampled texts; None if there are none. ``advance`` is called with each batch's size."""
    lengths: list[int] = []
    for start in range(0, len(sample.texts), _BATCH_TEXTS):
        batch = sample.texts[start : start + _BATCH_TEXTS]
        lengths += count_tokens(batch)
        advance(len(batch))
    if not lengths:
        return None
    values = np.array(lengths)
    # method: the length of an actual text, not an interpolated value
    percentiles = {p: int(np.percentile(values, p, method="inverted_cdf")) for p in _PERCENTILES}
    # Bars of equal width up to the limit, and one for longer texts.
    bounds = sorted({-(-limit * index // _NUM_BARS) for index in range(1, _NUM_BARS + 1)})
    bar_indices = np.searchsorted(bounds, values)  # the first bar whose upper bound is not below the value
    fractions = np.bincount(bar_indices, minlength=len(bounds) + 1) / len(values)
    bars = tuple(zip([*bounds, None], fractions.tolist(), strict=True))
    fraction_over = float((values > limit).mean())
    return Lengths(label, len(lengths), sample.num_seen, percentiles, limit, fraction_over, bars)


def guess_languages(label: str, texts: Sequence[str]) -> Languages | None:
    """Guessed languages of ``texts``; None if there are no texts. Guesses for short texts are often wrong.

    Without py3langid there is a ``MissingExtraError``.
    """
    if not texts:
        return None
    langid = require("py3langid", extra="check", purpose="telling languages")
    counts = Counter(str(langid.classify(text)[0]) for text in texts)
    return Languages(label, len(texts), dict(counts.most_common()))
