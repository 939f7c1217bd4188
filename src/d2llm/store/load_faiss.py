"""Imports FAISS, in a build that multiplies in float32."""

from __future__ import annotations

import importlib
import os
from typing import Any

_LEVEL, _DISABLED = "FAISS_OPT_LEVEL", "FAISS_DISABLE_CPU_FEATURES"


def load_faiss() -> Any:
    """The module ``faiss``, which is slow to import and has no types.

    Its build for CPUs with AVX512-FP16 ("AVX512_SPR") rounds a query to bfloat16 where rows are bfloat16: too coarsely
    to prove that a search is exact within few candidates. The build for AVX512 is loaded instead, unless the
    environment chooses one, or something else has imported FAISS before.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    if _LEVEL in os.environ or _DISABLED in os.environ:
        return importlib.import_module("faiss")
    os.environ[_DISABLED] = "AVX512_SPR"
    try:
        return importlib.import_module("faiss")
    finally:
        del os.environ[_DISABLED]
