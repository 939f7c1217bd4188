"""How the vectors of an index are stored: half the bytes of float32 by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from d2llm.core.errors import InputError

VectorDtype = Literal["bfloat16", "float16", "float32"]
STORED_AS = {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
"""The array type in the file; bfloat16 goes as its 16 bits, because .npy has no such type."""


def check_dtype(dtype: str) -> None:
    """Make sure that vectors can be stored as ``dtype``.

    Raises:
        InputError: they cannot.
    """
    if dtype not in STORED_AS:
        raise InputError(f"vector dtype {dtype!r} is unknown; use one of {', '.join(STORED_AS)}")


def compress(vectors: NDArray[np.float32], dtype: VectorDtype, ids: Sequence[str]) -> NDArray[Any]:
    """Vectors as they are stored; bfloat16 as uint16. ``ids`` name the rows in an error.

    Raises:
        InputError: a value is not finite, or not in ``dtype``.
    """
    if dtype == "bfloat16":
        rounded = torch.from_numpy(np.array(vectors, dtype=np.float32)).to(torch.bfloat16)
        stored = rounded.view(torch.int16).numpy().view(STORED_AS[dtype])
    else:
        with np.errstate(over="ignore"):  # what overflows is found and named below
            stored = np.asarray(vectors).astype(STORED_AS[dtype])
    bad = np.flatnonzero(~np.isfinite(expand(stored, dtype)).all(axis=1))
    if len(bad):
        raise InputError(
            f"{len(bad)} vectors are not finite as {dtype}, the first is that of passage {ids[int(bad[0])]!r}; "
            "check the student"
        )
    return stored


def expand(stored: NDArray[Any], dtype: VectorDtype) -> NDArray[np.float32]:
    """Stored vectors as float32; exact."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
