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
│   ├── IndexLockedError    another process or thread is writing to it
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

    The message says what is wrong, where, and what to do. Catch this class to handle all of them.

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
    """The user's files or arguments are wrong.

    Raised before anything is changed, as far as it can be known then. Correct what the message names.
    """


class DataFormatError(InputError):
    """A file does not have the expected format; the message starts with ``path:line``.

    Also if a file or an index is missing. Correct the line, or check the path. ``path``, ``line`` and ``problem`` are
    what the message is made of.
    """

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
    """A file of an index is damaged or missing.

    ``d2llm index INDEX verify --repair`` (``Index.verify(repair=True)``) mends what it can; else restore a snapshot or
    a copy, or index the documents again.
    """


class DuplicateIdError(DataFormatError):
    """An id occurs twice in one file or call, or ``Index.add`` gets a passage that the index has.

    Give each an id of its own, or use ``upsert`` to change passages.
    """


class FilterError(InputError):
    """A filter cannot be parsed, or does not fit the fields of the index.

    The message says what is wrong with it; docs/index.md has what a filter can be.
    """


class RecipeError(InputError):
    """A recipe has an unknown key or a bad value, or there is no such recipe, teacher, writer or reranker.

    The message names the key and the nearest known one; docs/recipe-settings.md has all of them.
    """


class ModelError(D2LLMError):
    """A model cannot be found, loaded or used.

    Such as an endpoint that does not answer or refuses the key, weights that cannot be read, or scores that are not
    finite numbers. Work can be repeated once the cause is gone; what was finished is kept.
    """


class ModelNotFoundError(ModelError):
    """There are no usable weights under the given name, or an endpoint has no such model.

    Check the name or path; a name of the Hub needs the network, or a copy in its cache.
    """


class AnswerTokenError(ModelError):
    """An answer word of a teacher's prompt is not exactly one token, or two answer words share a token.

    Choose other words in a prompt file, or another teacher.
    """


class MismatchError(D2LLMError):
    """Two artifacts do not belong together, such as a reranker and an index of another student.

    Use those that were made together, or make the second again.
    """


class IndexMismatchError(MismatchError):
    """The index was made by another student, or another index has taken its place since it was opened.

    Open it again with ``Index.open``, without a student or with the one that made it. ``d2llm index INDEX reencode``
    gives it another student.
    """


class LabelMismatchError(MismatchError):
    """Teacher labels belong to another teacher or prompt.

    Use the teacher and prompt that made them, or label again.
    """


class StorageError(D2LLMError):
    """An index cannot be written; earlier commits are kept.

    Free disk space or grant the right to write, then repeat the call: it continues after the last commit.
    """


class IndexLockedError(StorageError):
    """Another process or thread is writing to the index.

    Wait and repeat the call. Reading and searching are possible meanwhile.
    """


class ShardAwayError(StorageError):
    """A shard of an index on a cluster does not answer in time.

    Repeat the search; ``allow_missing`` (``allow_missing_shards`` of a server) searches without the shard.
    """


class TrainingDivergedError(D2LLMError):
    """The training loss became NaN or infinite; the last good checkpoint is kept.

    Lower the learning rate, or compute in bfloat16 or float32, and repeat the step.
    """


class OutOfTimeError(D2LLMError):
    """Work was stopped by its time limit (``core.time_limit``); what was finished is kept.

    Repeat the call to continue, with more time if it is to finish.
    """


class MissingExtraError(D2LLMError, ImportError):
    """An optional dependency is not installed.

    The message has the ``pip install`` that brings it. It is an ``ImportError``, too.
    """


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM; every part of d2llm treats it like Ctrl-C.

    It is outside the tree of ``D2LLMError``. What was finished is kept; repeat the command to continue.
    """
