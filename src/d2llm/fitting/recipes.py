"""The recipes that a fit trains with."""

from __future__ import annotations

from collections.abc import Sequence

from d2llm.fitting.time_plan import TEACHER_FRACTION, TimePlan
from d2llm.recipe import (
    DataConfig,
    GateConfig,
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
