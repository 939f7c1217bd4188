"""The exception tree. Every message says what was wrong, where, and what to do.

D2LLMError
├── InputError              the user's files or arguments are wrong
│   ├── DataFormatError     a file does not have the expected format (names file and line)
│   ├── DamagedFileError    a file of an index is damaged or missing
│   ├── DuplicateIdError    an id occurs twice
│   ├── FilterError         a filter cannot be parsed, or does not fit the fields of the index
│   └── RecipeError         a recipe has an unknown key or a bad value
├── ModelError              a model cannot be found, loaded or used
│   ├── ModelNotFoundError  no usable weights under the given name
│   └── AnswerTokenError    an answer word is not one distinct token
├── MismatchError           two artifacts do not belong together
│   ├── IndexMismatchError  the index was made by another student
│   └── LabelMismatchError  the labels belong to another teacher or prompt
├── StorageError            an index cannot be written (disk full, no permission)
│   ├── IndexLockedError    another process is writing to it
│   └── ShardAwayError      a shard of it on a cluster does not answer in time
├── TrainingDivergedError   the loss became NaN or infinite
├── OutOfTimeError          work was stopped by its time limit
└── MissingExtraError       an optional dependency is not installed

Outside this tree: Terminated, a KeyboardInterrupt that SIGTERM raises.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

_MAX_HALF = 4_000  # characters at the start and at the end of a message


class D2LLMError(Exception):
    """Base of every error that d2llm raises on purpose.

    Example:
        >>> from d2llm import D2LLMError, Index
        >>> try:
        ...     Index.open("nowhere.index")
        ... except D2LLMError as error:
        ...     print(type(error).__name__)
        DataFormatError
    """

    def __init__(self, message: str = "") -> None:
        left_out = len(message) - 2 * _MAX_HALF
        if left_out > 0:  # a damaged line of a file may be as long as the file
            message = f"{message[:_MAX_HALF]} ... ({left_out:,} characters) ... {message[-_MAX_HALF:]}"
        super().__init__(message)


class InputError(D2LLMError):
    """The user's files or arguments are wrong."""


class DataFormatError(InputError):
    """A file does not have the expected format; the message starts with ``path:line``."""

    def __init__(self, path: str | Path, problem: str, *, line: int | None = None) -> None:
        self.path = Path(path)
        self.problem = problem
        self.line = line
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is unpickled from its message alone, which fails if it comes from a worker process.
        return partial(type(self), self.path, self.problem, line=self.line), ()


class DamagedFileError(DataFormatError):
    """A file of an index is damaged or missing."""


class DuplicateIdError(DataFormatError):
    """An id occurs twice in one file."""


class FilterError(InputError):
    """A filter cannot be parsed, or does not fit the fields of the index."""


class RecipeError(InputError):
    """A recipe has an unknown key or a bad value."""


class ModelError(D2LLMError):
    """A model cannot be found, loaded or used."""


class ModelNotFoundError(ModelError):
    """There are no usable weights under the given name."""


class AnswerTokenError(ModelError):
    """An answer word is not exactly one token, or two answer words share a token."""


class MismatchError(D2LLMError):
    """Two artifacts do not belong together."""


class IndexMismatchError(MismatchError):
    """The index was made by another student."""


class LabelMismatchError(MismatchError):
    """Teacher labels belong to another teacher or prompt."""


class StorageError(D2LLMError):
    """An index cannot be written; earlier commits are kept."""


class IndexLockedError(StorageError):
    """Another process is writing to the index."""


class ShardAwayError(StorageError):
    """A shard of an index on a cluster does not answer in time."""


class TrainingDivergedError(D2LLMError):
    """The training loss became NaN or infinite; the last good checkpoint is kept."""


class OutOfTimeError(D2LLMError):
    """Work was stopped by its time limit (``core.time_limit``); what was finished is kept."""


class MissingExtraError(D2LLMError, ImportError):
    """An optional dependency is not installed."""


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM; every part of d2llm treats it like Ctrl-C."""
