"""One batch per core: on a CPU, several batches in parallel are faster than one batch on all cores.

A batch that fits a core's cache is too small to split: the cores wait for each other at every operation, and everything
but matrix products runs on one core. With two cores and 512 tokens per batch, one batch per core encoded 25 % more
texts per second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Barrier
from typing import TypeVar

import torch

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")

if hasattr(os, "register_at_fork"):  # the threads of OpenMP do not survive a fork, and work for them hangs or crashes
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def map_on_cores(work: Callable[[_Batch], _Result], batches: Sequence[_Batch]) -> Iterator[_Result]:
    """Apply ``work`` to each batch on one core, results in order; a single batch uses all cores.

    Uses ``torch.get_num_threads()`` cores. ``work`` runs in other threads, so it must itself set thread-local state
    such as ``torch.inference_mode``.
    """
    if torch.get_num_threads() == 1 or len(batches) == 1:
        return map(work, batches)
    return core_pool().map(work, batches)


def core_pool() -> ThreadPoolExecutor:
    """The threads of ``map_on_cores``: ``torch.get_num_threads()`` of them, in each of which torch uses one core."""
    return _workers(torch.get_num_threads(), os.getpid())


@lru_cache(maxsize=2)
def _workers(num_cores: int, process: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each; cached per process, since threads do not survive a fork."""
    del process
    workers = ThreadPoolExecutor(num_cores, thread_name_prefix="d2llm-core")
    started = Barrier(num_cores + 1)

    def use_one_core() -> None:
        torch.get_num_threads()  # the first call in a thread takes the global number, so make it before setting 1
        torch.set_num_threads(1)
        started.wait()

    for _ in range(num_cores):
        workers.submit(use_one_core)
    started.wait()
    torch.set_num_threads(num_cores)  # the setting is per thread, but new threads take the last one set
    return workers
