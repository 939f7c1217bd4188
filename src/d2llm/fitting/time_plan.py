"""Divides the time for a fit among its stages, from the speeds measured on this machine, and makes recipes for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2llm.core.types import Query, Task
from d2llm.fitting.served_index import ServedIndex
from d2llm.recipe import (
    DataConfig,
    GateConfig,
    GradedTeacherConfig,
    LabellingConfig,
    MiningConfig,
    Recipe,
    ResidualConfig,
    ScoreFeaturesConfig,
    StudentConfig,
    TeacherConfig,
    TeacherTuningConfig,
    TrainingConfig,
)
from d2llm.recipe.losses import Objective
from d2llm.training.checkpoints import usual_epochs

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


# Recipes of trainings that take the time of a plan --------------------------------------------------------------------

NUM_NEGATIVES = 2
"""Hard negatives of a query in each step."""

_OBJECTIVE = Objective.model_validate(
    {"in_batch_cross_entropy": 1.0, "dot_cross_entropy": 1.0, "pair_cross_entropy": 1.0}
)
"""Judgements alone."""
_BATCH_QUERIES = 32
_DEV_QUERIES, _PASSAGES_PER_DEV_QUERY = (50, 200), 10  # fewest and most; BM25's first ten are ranked for each
_DEV_PASSAGES = 1_000
_GATE_DEPTH, _MIN_GATED, _MAX_GATED = 12, 20, 100  # candidates of each list, queries


def recipe_for_queries(
    start: str,
    student: StudentConfig,
    data: Sequence[DataConfig],
    plan: TimePlan,
    *,
    seed: int = 0,
) -> Recipe:
    """The recipe that trains a student on queries alone, as many of them as the plan has time for.

    Args:
        start: the student to start from: a folder or a name.
        student: its settings.
        data: the data sets, with the number of their training queries as ``max_queries``.
        plan: time for training, and how many queries that is enough for.
        seed: of everything that is drawn.
    """
    num_train = _num_queries(data)
    fraction = min(1.0, plan.max_queries / num_train)
    affordable = max(1, plan.max_queries // num_train)
    return Recipe(
        name="fit",
        seed=seed,
        student=student,
        data=tuple(
            one.model_copy(update={"max_queries": max(1, round(fraction * (one.max_queries or 0)))}) for one in data
        ),
        mining=MiningConfig(student=start),
        losses=_OBJECTIVE,
        training=TrainingConfig(
            start=start,
            learning_rate=2e-4,
            epochs=min(affordable, usual_epochs(num_train / _BATCH_QUERIES, fewest=1)),
            batch_queries=_BATCH_QUERIES,
            num_hard=NUM_NEGATIVES,
            patience=5,
            dev_queries=dev_queries(plan),
            dev_passages=min(_DEV_PASSAGES, plan.evaluated),
            residual=ResidualConfig(weight_decay=0.01, off_task_penalty=0.0),
        ),
        score_features=ScoreFeaturesConfig(bm25=True, window_bm25=True, maxsim=True),
    )


def dev_queries(plan: TimePlan) -> int:
    """How many queries of each data set are measured on dev, and weights fitted to, in the time of a plan."""
    fewest, most = _DEV_QUERIES
    return max(fewest, min(most, plan.evaluated // _PASSAGES_PER_DEV_QUERY))


def recipe_with_teacher(
    recipe: Recipe, student: str, teacher: TeacherConfig, plan: TimePlan, *, seconds_per_pair: float
) -> Recipe:
    """The recipe that trains on with scores of the queries whose passages start and student rank differently.

    A quarter of the teacher's time is for the gate, the rest for labels.

    Args:
        recipe: what ``student`` was trained with (``recipe_for_queries``).
        student: the folder of the student to train on.
        teacher: the model that scores.
        plan: time for training, of which the first half has passed.
        seconds_per_pair: how long the teacher takes for one pair.
    """
    seconds = plan.training * TEACHER_FRACTION
    num_pairs = seconds / seconds_per_pair
    num_gated = max(_MIN_GATED, min(_MAX_GATED, int(num_pairs / 4 / (2 * _GATE_DEPTH))))
    num_queries = int(num_pairs * 3 / 4 / (1 + recipe.mining.num_hard + recipe.mining.num_easy))
    total = _num_queries(recipe.data)
    labelled = (
        one.model_copy(update={"max_labelled": max(1, num_queries * (one.max_queries or 0) // total)})
        for one in recipe.data
    )
    return recipe.model_copy(
        update={
            "teacher": teacher,
            "teacher_tuning": TeacherTuningConfig(epochs=0),
            "data": tuple(labelled),
            "gate": GateConfig(queries=num_gated, depth=_GATE_DEPTH),
            "labelling": LabellingConfig(compared_students=(recipe.training.start or "", student)),
            "losses": _OBJECTIVE.with_losses({"list_imitation": 0.5, "in_batch_cross_entropy": 0.5}),
            "training": recipe.training.model_copy(update={"start": student}),
        }
    )


def _num_queries(data: Sequence[DataConfig]) -> int:
    return sum(one.max_queries or 0 for one in data)
