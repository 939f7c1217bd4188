"""A graded teacher whose grades were recorded: it repeats them and asks no endpoint; and the files of such grades.

It is the same teacher as one of kind ``graded`` with the same settings behind an endpoint, so either goes on with the
labels of the other. A pair that was not recorded is undecided, and counted.

A file has one JSON object a line: ``query_id``, ``passages`` (ids) and ``grades``, with the ids of a data set,
or ``query`` and ``passages`` with the texts themselves. Of a set of labelled pairs, the id of a text is split and id of
the first pair of that split that has it (``train/17``), and each pair is a list of one passage. ``task`` says which
question was answered, if not both. Other keys are not read. A list may occur several times, as when it was judged in
two orders.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import Advance
from d2llm.core.types import TASKS, Task
from d2llm.data.beir import Dataset
from d2llm.data.lines import Fields, read_records
from d2llm.data.open_data import open_data
from d2llm.data.pair_training import read_pair_training_set
from d2llm.models.teachers.lists import GradedTeacher, log_odds_of_grades
from d2llm.models.teachers.pair_teacher import IdentifiedTeacher, TeacherScores, TextPair
from d2llm.recipe import GradedTeacherConfig, ListEndpointConfig, RecordedConfig, TeacherIdentity

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
    for line_number, values in read_records(Path(path)):
        yield _graded_list(Path(path), line_number, values)


def _graded_list(path: Path, line_number: int, values: Fields) -> GradedList:
    def problem(text: str) -> DataFormatError:
        return DataFormatError(path, text, line=line_number)

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
        line_number, values[names[0]], tuple(passages), tuple(map(float, grades)), tuple(tasks), names == ["query"]
    )


def _is_list(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in cast("list[Any]", value)
    )


_log = logging.getLogger(__name__)

_NOWHERE = ListEndpointConfig(url="http://recorded.invalid/v1")
"""Stands for the endpoint where none is set: the identity of a teacher depends on its other settings alone."""
_Grades = dict[str, dict[str, list[float]]]


class RecordedTeacher(IdentifiedTeacher):
    """Repeats the grades of the lists in ``config.recorded``."""

    gives_grades = True

    def __init__(self, config: GradedTeacherConfig) -> None:
        """Read the lists, and the texts of their ids.

        Raises:
            DataFormatError: a file is no file of graded lists.
            InputError: there are no lists, or their texts are not known.
        """
        if config.recorded is None:
            raise InputError(f"nothing was recorded for the teacher '{config.model}'; set teacher.recorded.lists")
        self.config = config
        self.recorded = config.recorded
        self._identity = self.identify(config)
        self._grades: dict[Task, _Grades] = {task: {} for task in TASKS}
        for file, data in _files(self.recorded):
            self._add(file, data)
        self._has_warned = False

    @classmethod
    def load(cls, config: GradedTeacherConfig, *, device: Any = None, dtype: Any = None) -> RecordedTeacher:
        """Like the constructor; ``device`` and ``dtype`` do not apply."""
        return cls(config)

    @staticmethod
    def identify(config: GradedTeacherConfig) -> TeacherIdentity:
        """The identity of the graded teacher behind its endpoint; grades of ``unlisted`` passages make it another."""
        live = config if config.remote is not None else config.model_copy(update={"remote": _NOWHERE})
        identity = GradedTeacher.identify(live)
        unlisted = None if config.recorded is None else config.recorded.unlisted
        if unlisted is None:
            return identity
        prompts: dict[Task, str] = {
            task: fingerprint_json([prompt, "unlisted", unlisted]) for task, prompt in identity.prompts.items()
        }
        return TeacherIdentity(identity.fingerprint, prompts)

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Look the pairs up (``PairTeacher.score_pairs``), by their texts; several grades of a pair are averaged."""
        grades = np.array([self._grade(self._grades[task], *pair) for pair in pairs], np.float64)
        undecided = np.isnan(grades)
        if undecided.any() and not self._has_warned:  # pairs come in parts, so only the caller can count them
            _log.warning(
                "%s: not every pair was recorded, the others count as undecided (log-odds 0); the first is of query %r",
                *(self.recorded.lists, pairs[int(undecided.argmax())][0][:80]),
            )
            self._has_warned = True
        if advance is not None:
            advance(len(pairs))
        return TeacherScores(
            np.where(undecided, 0, log_odds_of_grades(grades)).astype(np.float32),
            None,
            num_truncated=0,
            num_tokens=0,
            num_undecided=int(undecided.sum()),
            grades=grades.astype(np.float32),
        )

    def _grade(self, grades: _Grades, query: str, passage: str) -> float:
        listed = grades.get(_plain(query))
        if listed is None:
            return np.nan
        found = listed.get(_plain(passage))
        if found is not None:
            return fmean(found)
        return np.nan if self.recorded.unlisted is None else self.recorded.unlisted

    def _add(self, file: Path, data: str | None) -> None:
        texts = _Texts(file, data)
        for graded in read_graded_lists(file):
            query, passages = texts.of(graded)
            for task in graded.tasks:
                by_passage = self._grades[task].setdefault(_plain(query), {})
                for passage, grade in zip(passages, graded.grades, strict=True):
                    by_passage.setdefault(_plain(passage), []).append(grade)


class _Texts:
    """The texts that the ids of a file stand for."""

    def __init__(self, file: Path, data: str | None) -> None:
        self._file, self._data = file, data

    def of(self, graded: GradedList) -> tuple[str, list[str]]:
        """The texts of a list: its query's, and its passages'."""
        if graded.are_texts:
            return graded.query, list(graded.passages)
        queries, passages = self._dataset.queries, self._dataset.passages
        if graded.query not in queries:
            raise self._unknown(graded, "query", graded.query)
        for name in graded.passages:
            if name not in passages:
                raise self._unknown(graded, "passage", name)
        return queries[graded.query].text, [passages[name].full_text for name in graded.passages]

    @cached_property
    def _dataset(self) -> Dataset:
        if self._data is None:
            raise InputError(
                f"{self._file}: its queries and passages are ids, and the data set with their texts is not known; name "
                "its folder (--data, or teacher.recorded.data). With several data sets, a file of lists has the name "
                "of its own: NAME.jsonl"
            )
        dataset = open_data(self._data)
        return dataset if isinstance(dataset, Dataset) else read_pair_training_set(dataset).dataset

    def _unknown(self, graded: GradedList, what: str, name: str) -> InputError:
        return InputError(
            f"{self._file}:{graded.line}: {self._data} has no {what} '{name}'; give the data set that these lists were "
            "made of, or delete the line"
        )


def _files(recorded: RecordedConfig) -> Sequence[tuple[Path, str | None]]:
    """The files of lists, each with the folder of its data set: that of its name, or the only one."""
    by_name: Mapping[str, str] = {Path(folder).name: folder for folder in recorded.data}
    location = Path(recorded.lists)
    if not location.is_dir():
        only = recorded.data[0] if len(recorded.data) == 1 else None
        return [(location, by_name.get(location.stem, only))]
    file_of = {name: file for name in by_name if (file := location / f"{name}.jsonl").is_file()}
    files = [(file, by_name[name]) for name, file in file_of.items()]
    missing = [name for name in by_name if name not in file_of]
    if not files:
        raise InputError(
            f"{location}: has no file NAME.jsonl of a data set NAME ({', '.join(missing) or 'none is given'})"
        )
    if missing:
        _log.warning("%s: nothing was recorded for %s, whose pairs are all undecided", location, ", ".join(missing))
    return files


def _plain(text: str) -> str:
    return " ".join(text.split())
