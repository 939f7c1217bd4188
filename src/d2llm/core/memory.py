"""Whether an error says that memory ran out: Python has a type for it, most libraries have only words."""

from __future__ import annotations

import errno
import re
from collections.abc import Generator

from d2llm.core.errors import D2LLMError, DataFormatError

_WORDS = re.compile(
    r"could not create a (?:primitive|memory)"  # oneDNN, below torch's products
    r"|(?:can.?t|cannot|could ?n.t|could not|unable to|failed to|fails to) (?:re)?allocate"  # torch, LLVM, ONNX Runtime
    r"|(?:out of|not enough|insufficient|running low on) memory"  # SQLite, CUDA, torch on Windows, Ray
    r"|storage size calculation overflowed"  # torch, of more than 64 bits can count
    r"|\bbad.?alloc"  # C++: OpenVINO, faiss
    r"|unable to mmap|failed to map segment"  # torch, the loader of libraries
    r"|can't start new thread|failed to (?:spawn|create) thread|resource temporarily unavailable"  # no memory for it
    r"|\bos error 12\b",  # Rust: tokenizers, safetensors
    re.IGNORECASE,
)
_TELLING = (RuntimeError, OSError, ImportError, SystemError)
_TELLING_MODULES = {
    "onnxruntime",
    "openvino",
    "pyo3_runtime",
    "safetensors",
    "safetensors_rust",
    "sqlite3",
    "tokenizers",
}
"""Whose exceptions say in words that memory ran out; those of other kinds may quote what a user wrote."""
_MAX_CHARS = 300


def out_of_memory(error: BaseException) -> str | None:
    """What an error, or one that led to it, says of memory that ran out, such as "memory ran out (bad allocation)".

    None if it says nothing of it. What d2llm says itself of a file that could not be read then, as that it is damaged,
    is left out, but not its name.
    """
    for cause in causes(error):
        if _says_so(cause):
            name = f"{error.path}: " if isinstance(error, DataFormatError) else ""
            text = name + (" ".join(str(cause).split()) or type(cause).__name__)
            return f"memory ran out ({text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + '...'})"
    return None


def causes(error: BaseException | None) -> Generator[BaseException]:
    """An error, and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, Ray's
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    kind = type(error)
    is_telling = isinstance(error, _TELLING) or kind is Exception or kind.__module__.split(".")[0] in _TELLING_MODULES
    return is_telling and not isinstance(error, D2LLMError) and _WORDS.search(str(error)) is not None
