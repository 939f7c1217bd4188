"""The grades that a large language model once gave to some passages (`judgements`), and the teacher that repeats them.

The teacher is the one of `--recorded`: it looks the grades up by the texts of a data set. A pair that was not recorded
is undecided, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from d2llm.core.types import Task
from d2llm.recipe import TeacherConfig

RECORDED = Path(__file__).parent / "judgements"


@dataclass(frozen=True, slots=True)
class GradedList:
    """The passages of a query in the order in which they were shown, and their grades, 0 to 100."""

    query_id: str
    split: Literal["train", "dev"]
    judging: int
    task: Task
    passages: tuple[str, ...]
    grades: tuple[int, ...]


def read_graded_lists(name: str) -> list[GradedList]:
    """The recorded lists of a data set; a dev query has two, of two judgings in different orders."""
    lines = (RECORDED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        GradedList(
            line["query_id"],
            line["split"],
            line["judging"],
            line["task"],
            tuple(line["passages"]),
            tuple(line["grades"]),
        )
        for line in map(json.loads, lines)
    ]


def mean_grades(lists: Sequence[GradedList]) -> dict[str, dict[str, float]]:
    """The grade of each passage by query, the mean over judgings."""
    found: dict[str, dict[str, list[int]]] = {}
    for each in lists:
        own = found.setdefault(each.query_id, {})
        for passage_id, grade in zip(each.passages, each.grades, strict=True):
            own.setdefault(passage_id, []).append(grade)
    return {query: {name: fmean(grades) for name, grades in own.items()} for query, own in found.items()}


def sets_with_dev() -> list[str]:
    """The data sets with graded lists of dev queries, by name; the others have train queries alone, or pairs."""
    names = sorted(path.stem for path in RECORDED.glob("*.jsonl"))
    return [name for name in names if any(each.judging == 2 for each in read_graded_lists(name))]


def recorded_teacher(data: Path, *, unlisted: float | None = None) -> TeacherConfig:
    """The graded teacher that repeats the lists of a data set.

    ``unlisted`` is the grade of the passages that are in no list of a recorded query; None leaves them undecided.
    """
    recorded = {"lists": str(RECORDED / f"{data.name}.jsonl"), "data": [str(data)], "unlisted": unlisted}
    return TeacherConfig.model_validate({"model": "recorded", "kind": "graded", "recorded": recorded})
