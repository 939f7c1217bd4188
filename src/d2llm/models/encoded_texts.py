"""What an encoder makes of texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64


@dataclass(frozen=True, slots=True)
class EncodedWindows:
    """Vectors of the windows of n passages, one passage's after the other, how many each has, and the tokens read."""

    vectors: Float32[np.ndarray, "windows dim"]
    counts: Int64[np.ndarray, " passages"]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Vectors of n texts, the places of those cut to the length limit, and the tokens read (``lengths``: of each)."""

    vectors: Float32[np.ndarray, "texts dim"]
    truncated: tuple[int, ...]
    num_tokens: int
    lengths: tuple[int, ...] = ()

    @property
    def num_truncated(self) -> int:
        """How many texts lost their end."""
        return len(self.truncated)
