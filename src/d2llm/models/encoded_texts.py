"""What an encoder makes of texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


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
