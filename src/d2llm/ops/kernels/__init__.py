"""Loops that numba compiles, where NumPy would take detours through large arrays.

The modules of this package need numba and compile their functions when they are imported, once for a machine: numba
keeps the machine code in a cache that a processor of another kind does not use. So nothing imports them but
``CompiledLoops``, and that only in programs that search large indexes again and again. What a kernel computes is also
computed by NumPy where it is called, bit for bit: that is its reference in tests, what answers until the kernels are
loaded, and what runs on a machine without numba.
"""

from __future__ import annotations

import logging
import threading
import time
from importlib import import_module
from typing import Any

from d2llm.core.fallbacks import fell_back

_log = logging.getLogger(__name__)
_COMPILING = 2.0  # seconds from which loading was compiling
MIN_PARTS = 20_000
"""With fewer words or token embeddings, NumPy is as fast."""
MIN_CALLS = 3
"""A program that asks less often has ended before kernels are loaded. A search asks twice."""


class CompiledLoops:
    """A module of kernels that is loaded in another thread once it is worth it.

    Example:
        >>> from d2llm.ops.kernels import BM25
        >>> BM25.load().RANGE
        32768
    """

    def __init__(self, name: str) -> None:
        """Args: ``name`` of the module in this package."""
        self.name = name
        self._module: Any = None
        self._calls = 0
        self._thread: threading.Thread | None = None

    def get(self, num_parts: int) -> Any:
        """The module, for a call about an index of so many words or token embeddings; None while it is not loaded.

        Numbers of calls and of parts alone decide whether it is loaded, so no call waits for it. None also if there are
        so few parts that NumPy is as fast.
        """
        if num_parts < MIN_PARTS:
            return None
        if self._module is None and self._thread is None:
            self._calls += 1
            if self._calls > MIN_CALLS:
                self._thread = threading.Thread(target=self.load, name=f"compile {self.name}", daemon=True)
                self._thread.start()
        return self._module

    def load(self) -> Any:
        """The module, loaded now; None, with a warning, on a machine that cannot compile it."""
        start = time.perf_counter()
        try:
            self._module = import_module(f"{__name__}.{self.name}")
        except Exception as error:  # noqa: BLE001 - numba is missing, broken, or does not know this processor
            fell_back("compiled loops", f"numba cannot be used ({error}); NumPy does their work, several times slower")
            return None
        seconds = time.perf_counter() - start
        if seconds > _COMPILING:
            _log.info("compiled the loops of %s in %.1f s; they are kept for the next start", self.name, seconds)
        return self._module


BM25 = CompiledLoops("bm25")
"""The loops of ``store.bm25``."""
MAXSIM = CompiledLoops("maxsim")
"""The loop of ``store.part_vectors``."""
ALL = (BM25, MAXSIM)
