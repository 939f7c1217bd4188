"""How long the threads of numerical libraries spin while they wait for work.

A library with several threads lets those without work spin for a while, since it takes a few microseconds to wake one
that sleeps. By default GNU OpenMP (PyTorch, Faiss) spins for milliseconds and OpenBLAS (NumPy) for longer. Between
the many small operations of a search this takes the cores from the threads that do have work, above all if other
programs run on them too. A search of 2,355 passages on two cores took 102 ms with the defaults and 41 ms with these
settings; beside a program that kept one of the two busy, 115 and 55 ms, and a pass of training 5.2 and 2.9 s. Large
operations take as long as before (``benchmarks/waiting_threads.py``).
"""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Set the environment variables that the libraries read when they are loaded, if the user has not set them."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")  # the binary logarithm of processor cycles
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # rounds
