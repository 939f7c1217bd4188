"""The systems that ``evaluate`` compares: each ranks the same queries, and is timed on a few of them asked alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2llm.core.types import Passage, Query, Task
from d2llm.index.folder import FolderIndex
from d2llm.index.lexical import LexicalIndex
from d2llm.pipeline.progress import progress_bar
from d2llm.pipeline.protocols import PairJudge, SearchStudent
from d2llm.pipeline.search import Searcher


@dataclass(frozen=True, slots=True)
class System:
    """One measured system.

    ``rankings``: query_id -> passage ids, best first. ``milliseconds``: mean time of one query asked alone.
    ``bytes_per_passage``: kept of a passage besides its text; None where the system keeps nothing of its own.
    """

    name: str
    rankings: Mapping[str, Sequence[str]]
    milliseconds: float
    bytes_per_passage: float | None


@dataclass(frozen=True, slots=True)
class Trial:
    """What is asked of every system. ``probes`` are the queries that are timed."""

    queries: Sequence[Query]
    probes: Sequence[Query]
    task: Task
    top_k: int
    show_progress: bool | None


def lexical_system(name: str, lexical: LexicalIndex, trial: Trial) -> System:
    """Rank by BM25."""
    rankings: dict[str, list[str]] = {}
    with progress_bar(f"ranking by {name}", len(trial.queries), show=trial.show_progress) as advance:
        found = lexical.iterate([query.text for query in trial.queries], trial.top_k)
        for query, candidates in zip(trial.queries, found, strict=True):
            rankings[query.id] = [candidate.passage_id for candidate in candidates]
            advance(1)
    milliseconds = _mean_milliseconds(lambda query: lexical.search([query.text], trial.top_k), trial.probes)
    return System(name, rankings, milliseconds, lexical.num_bytes / len(lexical))


def student_system(
    name: str, index: FolderIndex, student: SearchStudent, trial: Trial, *, num_candidates: int
) -> System:
    """Rank by a student's search."""
    searcher = Searcher(index, student, task=trial.task, top_k=trial.top_k, num_candidates=num_candidates)
    rankings = {
        ranking.query.id: [place.passage.id for place in ranking.passages]
        for ranking in searcher.rank(trial.queries, show_progress=trial.show_progress)
    }
    milliseconds = _mean_milliseconds(lambda query: searcher.rank([query]), trial.probes)
    return System(name, rankings, milliseconds, index.vector_bytes_per_passage)


def teacher_system(
    name: str,
    teacher: PairJudge,
    first_stages: Sequence[System],
    passages: Mapping[str, Passage],
    trial: Trial,
    *,
    depth: int,
) -> tuple[System, int]:
    """Let the teacher reorder the first ``depth`` of each first stage together; ties by passage id.

    What the last first stage ranks behind keeps its order, below everything judged. The time of a query includes the
    first stages'.

    Returns:
        The system, and the number of pairs that were truncated.
    """
    rankings: dict[str, list[str]] = {}
    num_truncated = 0
    begin = time.perf_counter()
    with progress_bar("asking the teacher (queries)", len(trial.queries), show=trial.show_progress) as advance:
        for query in trial.queries:
            judged = sorted({place for stage in first_stages for place in stage.rankings[query.id][:depth]})
            judgements = teacher.judge([(query.text, passages[place].full_text) for place in judged], trial.task)
            order = np.argsort(-judgements.log_odds, kind="stable")
            rest = [place for place in first_stages[-1].rankings[query.id] if place not in set(judged)]
            rankings[query.id] = ([judged[place] for place in order.tolist()] + rest)[: trial.top_k]
            num_truncated += judgements.num_truncated
            advance(1)
    milliseconds = (time.perf_counter() - begin) * 1000 / len(trial.queries)
    milliseconds += sum(stage.milliseconds for stage in first_stages)
    return System(name, rankings, milliseconds, None), num_truncated


def _mean_milliseconds(ask: Callable[[Query], object], probes: Sequence[Query]) -> float:
    ask(probes[0])  # the first call pays for what is set up once
    begin = time.perf_counter()
    for query in probes:
        ask(query)
    return (time.perf_counter() - begin) * 1000 / len(probes)
