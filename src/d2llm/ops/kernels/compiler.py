"""How the functions of this package are compiled. Imports numba."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportReturnType=false
# (numba ships no types that fit: what it returns is called as the function is)

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba import types

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def read_only(dtype: Any, num_axes: int = 1) -> Any:
    """The type of a contiguous array that a kernel only reads, such as a part of a file in memory."""
    return types.Array(dtype, num_axes, "C", readonly=True)


def written(dtype: Any) -> Any:
    """The type of a contiguous array [n] that a kernel writes."""
    return types.Array(dtype, 1, "C")


def compiled(signature: Any) -> Callable[[_Function], _Function]:
    """Compile a function for arguments of these types, at once, or load what was compiled before.

    Sums are computed in the order of the code, each operation rounded (no ``fastmath``), so that a result does not
    depend on the processor. Other threads may run meanwhile.
    """

    def compile_(function: _Function) -> _Function:
        function = inspect.unwrap(function)  # tests check the types of arguments, by a wrapper
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except Exception as error:  # noqa: BLE001 - the cache cannot be read or written: numba has several errors
            kernel = numba.njit(signature, nogil=True)(function)
            _log.warning("compiled code cannot be kept (%s); set NUMBA_CACHE_DIR to a folder for it", error)
            return kernel

    return compile_


def inlined(function: _Function) -> _Function:
    """A function that kernels call; it becomes a part of them."""
    return numba.njit(nogil=True)(inspect.unwrap(function))
