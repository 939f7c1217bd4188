"""What says that memory ran out; the errors of libraries at hand are real ones."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from fastapi.exceptions import RequestValidationError
from safetensors import SafetensorError

from d2llm.core.errors import DataFormatError, IndexLockedError, InputError
from d2llm.core.memory import out_of_memory
from prepared_process import PreparedProcess, script

TOO_MANY = 1 << 60
"""Bytes that no machine has."""


def of_numpy() -> object:
    return np.zeros(TOO_MANY, np.int8)


def of_torch() -> object:
    return torch.zeros(TOO_MANY, dtype=torch.int8)


def of_python() -> object:
    return bytearray(TOO_MANY)


OF_SQLITE = """
import sqlite3
from d2llm.core.memory import out_of_memory

connection = sqlite3.connect(":memory:")
try:
    connection.execute("PRAGMA hard_heap_limit = 1")
    connection.execute("SELECT randomblob(1000000)").fetchall()
except Exception as error:
    print(out_of_memory(error))
"""


@pytest.mark.parametrize("allocate", [of_numpy, of_torch, of_python])
def test_what_libraries_raise(allocate):
    with pytest.raises(Exception) as raised:
        allocate()
    assert (out_of_memory(raised.value) or "").startswith("memory ran out")


def test_what_sqlite_raises():
    """In a process of its own: the limit holds for all connections, until the process ends."""
    with PreparedProcess(script, OF_SQLITE) as process:
        assert process.wait() == 0, process.errors
        assert process.output.startswith("memory ran out")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),  # oneDNN, by torch
        RuntimeError("could not create a primitive descriptor for an inner product forward propagation primitive"),
        RuntimeError("unable to mmap 90405214 bytes from file </a>: Cannot allocate memory (12)"),  # torch
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB"),  # torch
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
        RuntimeError("Exception from src/core.cpp:90:\nstd::bad_alloc"),  # OpenVINO
        RuntimeError("bad allocation"),  # C++ on Windows
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 8]"),  # torch
        type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"
        ),
        RuntimeError("LLVM ERROR: Unable to allocate section memory!"),  # numba
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        SafetensorError("Cannot allocate memory (os error 12)"),
        type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})(
            'failed to spawn thread: Os { code: 11, kind: WouldBlock, message: "Resource temporarily unavailable" }'
        ),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_words_of_libraries(error):
    text = str(error)
    assert out_of_memory(error) == f"memory ran out ({' '.join(text.split())})"


def test_an_error_that_another_led_to():
    """The file stays, but not the advice to delete it."""
    error = DataFormatError("labels/1.parquet", "damaged label shard (malloc failed); delete this file")
    error.__cause__ = MemoryError("malloc of size 64 failed")
    assert out_of_memory(error) == "memory ran out (labels/1.parquet: malloc of size 64 failed)"
    second = KeyError("not made")
    second.__context__ = MemoryError()  # while it was handled
    assert out_of_memory(second) == "memory ran out (MemoryError)"
    long = RuntimeError("bad allocation " + "x" * 9_000)
    assert len(out_of_memory(long) or "") < 350


@pytest.mark.parametrize(
    "error",
    [
        InputError("the query 'out of memory' has no results"),
        ValueError("could not convert string to float: 'out of memory'"),
        KeyError("out of memory"),
        RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "x", "input": "out of memory"}]),
        RuntimeError("the size of tensor a (3) must match the size of tensor b (4)"),
        OSError(errno.ENOSPC, "No space left on device"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),  # a lock that another process has
    ],
)
def test_other_errors(error):
    assert out_of_memory(error) is None
    locked = IndexLockedError("another process is writing")
    locked.__cause__ = error
    assert out_of_memory(locked) is None
