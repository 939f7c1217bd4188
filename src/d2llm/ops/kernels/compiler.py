"""How the functions of this package are compiled. Imports numba."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportReturnType=false
# (numba ships no types that fit: what it returns is called as the function is)

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
from numba import types

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_kernels: list[Any] = []


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
            kernel = numba.njit(signature, nogil=True, cache=True)(function)
        except Exception as error:  # noqa: BLE001 - the cache cannot be read or written: numba has several errors
            kernel = numba.njit(signature, nogil=True)(function)
            _log.warning("compiled code cannot be kept (%s); set NUMBA_CACHE_DIR to a folder for it", error)
        _kernels.append(kernel)
        return kernel

    return compile_


class CompiledCode(NamedTuple):
    """Of the kernels of this process: how many, how many of them were compiled by it, and the folders that keep them.

    ``num_kept`` is smaller than ``num_functions`` where no folder can be written.
    """

    num_functions: int
    num_compiled: int
    num_kept: int
    folders: list[str]


def compiled_code() -> CompiledCode:
    """What was compiled, and where it is kept."""
    statistics = [kernel.stats for kernel in _kernels]
    folders = [kernel.cache_path for kernel in statistics if kernel.cache_path is not None]
    num_loaded = sum(bool(kernel.cache_hits) for kernel in statistics)
    return CompiledCode(len(_kernels), len(_kernels) - num_loaded, len(folders), sorted({*folders}))


def inlined(function: _Function) -> _Function:
    """A function that kernels call; it becomes a part of them."""
    return numba.njit(nogil=True)(inspect.unwrap(function))
