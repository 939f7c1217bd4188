"""How fast this process does what a fit plans, measured on a few passages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from d2llm.core.types import Query, Task
from d2llm.fitting.served_index import ServedIndex
from d2llm.recipe import GradedTeacherConfig, TeacherConfig

if TYPE_CHECKING:
    from d2llm.core.types import Passage

_TIMED_PASSAGES, _TIMED_AT_ONCE, _TIMED_SECONDS = 512, 64, 2.0  # encoding is timed on so many, or for so long
_TIMED_PAIRS, _TIMED_SEARCHES = 8, 8
_QUERY_CHARACTERS = 60  # of the queries of timed judgements and searches
_SECONDS_TO_LOOK_UP = 1e-5  # of a recorded grade


def passages_per_second(served: ServedIndex) -> float:
    """How fast the index's student encodes passages."""
    texts = [passage.full_text for passage in served.sample(_TIMED_PASSAGES)]
    student = served.index.student
    student.encode_passages(texts[: _TIMED_AT_ONCE // 4])  # the first call takes longer
    started, num_encoded, seconds = time.perf_counter(), 0, 0.0
    while num_encoded < len(texts) and seconds < _TIMED_SECONDS:
        block = texts[num_encoded : num_encoded + _TIMED_AT_ONCE]
        student.encode_passages(block)
        num_encoded, seconds = num_encoded + len(block), time.perf_counter() - started
    return num_encoded / seconds


def seconds_per_search(served: ServedIndex) -> float:
    """How long a search of the index takes for one query."""
    from d2llm.retrieval.search import Searcher
    from d2llm.retrieval.settings import SearchSettings

    searcher = Searcher(served.index.view, served.index.student, SearchSettings(task=served.task, top_k=100))
    texts = [passage.text[:_QUERY_CHARACTERS] for passage in served.sample(_TIMED_SEARCHES)]
    queries = [Query(str(number), text) for number, text in enumerate(texts)]
    searcher.rank_ids(queries[:1])
    started = time.perf_counter()
    searcher.rank_ids(queries)
    return (time.perf_counter() - started) / len(queries)


def seconds_per_pair(
    teacher: TeacherConfig, passages: Sequence[Passage], task: Task, *, device: str | None, dtype: str | None
) -> float:
    """How long a teacher takes to score one pair."""
    from d2llm.models.teachers.pair_teacher import load_teacher

    if isinstance(teacher, GradedTeacherConfig) and teacher.recorded is not None:
        return _SECONDS_TO_LOOK_UP
    model = load_teacher(teacher, device=device, dtype=dtype)
    texts = [passage.full_text for passage in passages[:_TIMED_PAIRS]]
    started = time.perf_counter()
    model.score_pairs([(texts[0][:_QUERY_CHARACTERS], text) for text in texts], task)
    return (time.perf_counter() - started) / len(texts)
