"""How long the threads of numerical libraries spin while they wait for work.

A library with several threads lets those without work spin for a while, since it takes a few microseconds to wake one
that sleeps. By default GNU OpenMP (PyTorch, Faiss) spins for milliseconds and OpenBLAS (NumPy) for longer. Between
the many small operations of a search this takes the cores from the threads that do have work, above all if other
programs run on them too. A search of 2,527 passages on two cores took 129 ms with the defaults and 47 ms with these
settings; beside another program that keeps one of the two cores busy, over 300 ms and 70 ms, and training took 9 times
as long as on idle cores, with these settings twice as long. Large operations take as long as before.
"""

from __future__ import annotations

import os

_SETTINGS = {"GOMP_SPINCOUNT": "3000", "OPENBLAS_THREAD_TIMEOUT": "10"}  # rounds; the binary logarithm of cycles


def limit_spinning() -> None:
    """Set the environment variables that the libraries read when they are loaded, if the user has not set them."""
    for name, value in _SETTINGS.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(name, value)
