"""How much memory a piece of work takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 2**20


@contextmanager
def peak_memory() -> Generator[Callable[[], float | None]]:
    """Gives a function for the largest resident memory of this process, in MiB, since the block began.

    Linux can start counting anew; elsewhere it is the largest since the process began, and None where the system does
    not say.
    """
    with suppress(OSError):
        _RESET.write_text("5")
    yield _peak


def _peak() -> float | None:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / _MIB if sys.platform == "darwin" else largest / 1024
