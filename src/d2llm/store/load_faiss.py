"""Imports FAISS, and has it multiply in float32."""

from __future__ import annotations

import importlib
import os
from typing import Any

_LEVEL = "FAISS_SIMD_LEVEL"


def load_faiss() -> Any:
    """The module ``faiss``, which is slow to import and has no types.

    On CPUs with AVX512-FP16 (its level ``AVX512_SPR``) it rounds a query to bfloat16 where rows are bfloat16: too
    coarsely to prove that a search is exact within few candidates. So the level is AVX512 instead, for the whole
    process, unless ``FAISS_SIMD_LEVEL`` chooses one. A FAISS whose level cannot be set while it runs stays as it is.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    faiss = importlib.import_module("faiss")
    levels = getattr(faiss, "SIMDConfig", None)
    if levels is not None and _LEVEL not in os.environ and levels.get_level() == faiss.SIMDLevel_AVX512_SPR:
        levels.set_level(faiss.SIMDLevel_AVX512)
    return faiss
