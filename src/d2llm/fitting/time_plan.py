"""Divides the time for a fit among its stages, from the speeds that were measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2llm.core.types import Query, Task
from d2llm.fitting.served_index import ServedIndex
from d2llm.recipe import GradedTeacherConfig, TeacherConfig

if TYPE_CHECKING:
    from d2llm.core.types import Passage


TRAINING_PASSES = 4
"""What training on a text costs, in passes of plain encoding: two forward and one backward pass."""
WRITING_FRACTION = 0.55
"""Fraction of the time for writing and training that goes to writing."""
MIN_TRAINING_SECONDS = 60.0
"""With less time for training than this, nothing is trained: the weights of the score are fitted only."""
MIN_WRITING_SECONDS = 30.0
TEACHER_FRACTION = 0.3
"""Fraction of the time for training that goes to a teacher's scores, if there is a teacher."""
DEV_FRACTION = 0.25
"""Fraction of the time for training that measuring on dev takes, about, at most; the dev sets are made small enough."""
REVIEW_FRACTION = 0.15
"""Fraction of the time for writing and training in which a teacher, if there is one, reads the written queries."""
_HELD_OUT_QUERIES = 300  # planned for, before it is known how many there are
_OVERHEAD_SECONDS = 60.0  # loading models, fitting weights, writing reports
_EVALUATED_PASSAGES, _MIN_PASSAGES = 2_000, 200  # encoded in each evaluation on dev, and for fitting weights
_NUM_EVALUATIONS, _MIN_EVALUATIONS = 8, 4  # the fewest leave no time for the interaction and token embeddings


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Seconds for each stage that is still to come.

    ``reviewing`` is for a teacher, 0 without one. ``training`` includes mining, evaluations on dev and, if there is a
    teacher, its labels; 0 if there is no time for it. ``measuring`` covers the report and the index of the student that
    is kept. ``max_queries`` can be trained on in that time. ``evaluated`` is how many passages are encoded in each
    evaluation on dev.
    """

    writing: float
    training: float
    measuring: float
    max_queries: int
    reviewing: float = 0.0
    evaluated: int = _EVALUATED_PASSAGES

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return self.writing + self.reviewing + self.training + self.measuring


def searches_compared(trained: bool, untuned: bool) -> int:
    """How many searches a comparison takes for each held-out query, with and without these students.

    Two for the start, its inner product and its score; for the untuned one its cosine and the fitted sum; for the
    trained one a search that an interaction makes twice as long.
    """
    return 2 + 2 * trained + 2 * untuned


def plan_time(
    seconds_left: float,
    *,
    num_passages: int,
    passages_per_second: float,
    corpus_passages_per_second: float | None = None,
    seconds_per_search: float = 0.0,
    num_negatives: int,
    is_written: bool = False,
    is_reviewed: bool = False,
    has_vectors: bool = False,
    has_teacher: bool = False,
) -> TimePlan:
    """Plan the stages after the index has been built.

    If to encode the corpus with both the trained and the untuned student would take more than half of the time for
    training, the comparison is planned without the untuned one, and then the training without its last stages; if even
    that leaves too little, nothing is trained.

    Args:
        seconds_left: for all of them.
        num_passages: size of the corpus.
        passages_per_second: how fast the student encodes passages in this process, where it is trained.
        corpus_passages_per_second: how fast the whole corpus is encoded, by workers of a cluster if there are any; by
            default as fast as in this process.
        seconds_per_search: how long a search of the index takes for one query.
        num_negatives: hard negatives of a query in each step of training.
        is_written: the queries have been written already, perhaps by an earlier call.
        is_reviewed: this call has reviewed them.
        has_vectors: the index has the vectors that mining needs, which otherwise encodes the corpus once more.
        has_teacher: whether a teacher reads the written queries, and labels the training queries.
    """
    one_pass = num_passages / (corpus_passages_per_second or passages_per_second)
    searching = searches_compared(trained=True, untuned=True) * _HELD_OUT_QUERIES * seconds_per_search
    review_fraction = REVIEW_FRACTION if has_teacher and not is_reviewed else 0.0
    mining = 0.0 if has_vectors else one_pass
    learning = (seconds_left - _OVERHEAD_SECONDS - searching - one_pass - mining) * (
        1 if is_written else 1 - WRITING_FRACTION
    )
    in_time = int(DEV_FRACTION * learning * passages_per_second / _NUM_EVALUATIONS)
    evaluated = max(_MIN_PASSAGES, min(_EVALUATED_PASSAGES, in_time))
    evaluation = min(num_passages, evaluated) / passages_per_second
    # The untuned student and the trained one are compared, or the trained one alone.
    options = [
        (_OVERHEAD_SECONDS + searching + num_compared * one_pass, mining + num_evaluations * evaluation)
        for num_compared, num_evaluations in ((2, _NUM_EVALUATIONS), (1, _NUM_EVALUATIONS), (1, _MIN_EVALUATIONS))
    ]
    # Writing gets its fraction of what the last option leaves: the later stages adapt if others use the same cores.
    free = seconds_left - sum(options[-1])
    reviewing = max(0.0, free * review_fraction)
    writing = 0.0 if is_written else max(MIN_WRITING_SECONDS, free * (WRITING_FRACTION - review_fraction))
    enough = max(MIN_TRAINING_SECONDS, (free - writing - reviewing) / 2)  # half of what the last option leaves
    for measuring, preparing in options:
        steps = seconds_left - measuring - preparing - writing - reviewing
        if steps >= enough:
            student_seconds = steps * (1 - TEACHER_FRACTION if has_teacher else 1)
            per_query = (2 + num_negatives) * TRAINING_PASSES / passages_per_second
            return TimePlan(
                writing, preparing + steps, measuring, max(1, int(student_seconds / per_query)), reviewing, evaluated
            )
    measuring = _OVERHEAD_SECONDS + searching
    if seconds_left >= measuring + one_pass + MIN_WRITING_SECONDS:
        measuring += one_pass
    free = seconds_left - measuring
    reviewing = max(0.0, free * review_fraction)
    writing = 0.0 if is_written else max(MIN_WRITING_SECONDS, free - reviewing)
    return TimePlan(writing, 0.0, measuring, 0, reviewing, evaluated)


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
    queries = [Query(str(position), text) for position, text in enumerate(texts)]
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
