"""An OpenAI-compatible endpoint that repeats the grades that a large language model once gave to some passages.

It stands for a strong teacher where none can be reached: everything between `d2llm label` or `d2llm gate` and the
answers is as with a live endpoint. `judgements/NAME.jsonl` has the grades by query and passage id, so the texts come
from the data set itself. A pair that was not recorded gets no grade, which a teacher with `unanswered = "undecided"`
counts. With `--unlisted GRADE`, passages that are in no list of a recorded query get this grade, as
`training.in_batch_labels` needs (judgements/README.md says why 0 is near the truth); queries without a list still get
none.

    python benchmarks/recorded_judge.py DATA --port 8123      # then: url = "http://127.0.0.1:8123/v1"
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from recorded_endpoint import recorded_endpoint

from d2llm.core.recipe import TeacherConfig
from d2llm.core.types import Task
from d2llm.data.beir import read_beir

RECORDED = Path(__file__).parent / "judgements"
_QUERY = re.compile(r"^Query: (.*)$", re.M)
_PASSAGE = re.compile(r"^\[(\d+)\] (.*)$", re.M)


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


def recorded_teacher(url: str) -> TeacherConfig:
    """The graded teacher that asks ``recorded_judge``."""
    remote = {"url": url, "unanswered": "undecided", "revision": "2026-11"}
    return TeacherConfig.model_validate({"model": "recorded", "kind": "graded", "remote": remote})


@contextmanager
def recorded_judge(data: Path, *, port: int = 0, unlisted: float | None = None) -> Iterator[str]:
    """Serve the recorded grades of a data set on a local port; yields the address for ``teacher.remote.url``.

    ``unlisted`` is the grade of the passages that are in no list of a recorded query; None gives them no grade.
    """
    dataset = read_beir(data, splits=["train", "dev"])
    by_ids = mean_grades(read_graded_lists(data.name))
    grades: dict[str, dict[str, float]] = {}
    for query_id, own in by_ids.items():
        by_text = grades.setdefault(_plain(dataset.queries[query_id].text), {})
        for passage_id, grade in own.items():
            by_text[_plain(dataset.passages[passage_id].full_text)] = grade

    def answer(prompt: str) -> str:
        queries = _QUERY.findall(prompt)
        own = grades.get(_plain(queries[0])) if queries else None
        if own is None:
            return ""
        graded = [(place, _grade(own, _plain(text))) for place, text in _PASSAGE.findall(prompt)]
        shown = [(place, unlisted if grade is None else grade) for place, grade in graded]
        return "\n".join(f"[{place}] {grade:g}" for place, grade in shown if grade is not None)

    def usage(prompt: str, written: str) -> dict[str, int]:
        return {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(written) // 4}

    with recorded_endpoint(answer, port=port, usage=usage) as url:
        yield url


def _plain(text: str) -> str:
    return " ".join(text.split())


def _grade(grades: dict[str, float], shown: str) -> float | None:
    """The grade of a passage, of which a prompt shows the beginning."""
    found = [grades[shown]] if shown in grades else [grade for text, grade in grades.items() if text.startswith(shown)]
    return fmean(found) if shown and found else None


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--unlisted", type=float, metavar="GRADE", help="grade of passages outside a query's lists")
    given = parser.parse_args()
    with recorded_judge(given.data, port=given.port, unlisted=given.unlisted) as url:
        print(f"recorded grades of {given.data.name} at {url}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
