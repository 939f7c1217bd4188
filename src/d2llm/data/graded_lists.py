"""Lists of passages with grades from 0 to 100 that somebody recorded: a person, or a language model asked elsewhere.

A file has one JSON object a line: ``query_id``, ``passages`` (ids) and ``grades``, with the ids of a data set,
or ``query`` and ``passages`` with the texts themselves. Of a set of labelled pairs, the id of a text is split and id of
the first pair of that split that has it (``train/17``), and each pair is a list of one passage. ``task`` says which
question was answered, if not both. Other keys are not read. A list may occur several times, as when it was judged in
two orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.types import TASKS, Task
from d2llm.data.lines import Fields, read_records

MAX_GRADE = 100


@dataclass(frozen=True, slots=True)
class GradedList:
    """A query, some passages and their grades; ``are_texts`` says whether they are texts or ids."""

    line: int
    query: str
    passages: tuple[str, ...]
    grades: tuple[float, ...]
    tasks: tuple[Task, ...]
    are_texts: bool


def read_graded_lists(path: str | Path) -> Iterator[GradedList]:
    """The lists of a file, in its order.

    Raises:
        DataFormatError: the file cannot be read, or a line is no such list (the message names it).
    """
    for number, values in read_records(Path(path)):
        yield _graded_list(Path(path), number, values)


def _graded_list(path: Path, number: int, values: Fields) -> GradedList:
    def problem(text: str) -> DataFormatError:
        return DataFormatError(path, text, line=number)

    names = [name for name in ("query_id", "query") if isinstance(values.get(name), str)]
    if len(names) != 1:
        raise problem('needs either "query_id", an id, or "query", a text')
    passages: Any = values.get("passages")
    grades: Any = values.get("grades")
    task: Any = values.get("task")
    if not _is_list(passages, str) or len({*passages}) != len(passages):
        raise problem('"passages" must be a list of different ids or texts')
    if not _is_list(grades, (int, float)) or not all(0 <= grade <= MAX_GRADE for grade in grades):
        raise problem(f'"grades" must be a list of numbers from 0 to {MAX_GRADE}')
    if len(passages) != len(grades):
        raise problem(f"has {len(passages)} passages and {len(grades)} grades; each passage needs one")
    if task is not None and task not in TASKS:
        raise problem(f'"task" is {task!r}, but must be one of {", ".join(TASKS)}')
    tasks = TASKS if task is None else (task,)
    return GradedList(
        number, values[names[0]], tuple(passages), tuple(map(float, grades)), tuple(tasks), names == ["query"]
    )


def _is_list(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in cast("list[Any]", value)
    )
