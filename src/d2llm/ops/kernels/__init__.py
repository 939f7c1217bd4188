"""Loops that numba compiles, where NumPy would take detours through large arrays.

The modules of this package need numba and compile their functions when they are imported, once per machine: numba
keeps the machine code in a cache that a processor of another kind does not use. So they are imported by ``kernels``
alone, and only by programs that search or build an index. What a kernel computes is also computed by NumPy where it is
called, bit for bit; that is its reference in tests, and what runs on a machine without numba.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from d2llm.core.fallbacks import fell_back

if TYPE_CHECKING:
    from d2llm.ops.kernels import bm25

_log = logging.getLogger(__name__)
_COMPILING = 2.0  # seconds from which loading was compiling
MIN_ROWS = 10_000
"""With fewer rows, a search takes less time than loading the compiled loops for it would."""


@cache
def bm25_kernels() -> type[bm25] | None:  # pyright: ignore[reportGeneralTypeIssues] - a module
    """The compiled loops of BM25; None, with a warning, on a machine that cannot compile them."""
    start = time.perf_counter()
    try:
        module = import_module("d2llm.ops.kernels.bm25")
    except Exception as error:  # noqa: BLE001 - numba is missing, broken, or does not know this processor or Python
        fell_back("compiled loops", f"numba cannot be used ({error}); NumPy does their work, several times slower")
        return None
    seconds = time.perf_counter() - start
    if seconds > _COMPILING:
        _log.info("compiled the loops of BM25 for this processor in %.1f s; they are kept for the next start", seconds)
    return module
