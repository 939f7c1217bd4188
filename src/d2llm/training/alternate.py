"""Students and teachers teach each other in turns, without the data sets' judgements.

Source: Liu et al., "Trans-Encoder: Unsupervised Sentence-Pair Modelling through Self- and Mutual-Distillations", ICLR
2022 (arXiv 2109.13059), algorithm 1. There a round tunes a cross-encoder on the scores of the bi-encoder, then the
bi-encoder on those of the cross-encoder, both on unlabelled pairs. Here the pairs are those of the training plans; both
directions are the usual verbs with ``teacher_tuning.students`` and ``training.start``. Unlike there, the teacher need
not be the student's backbone, and a student goes on from that of the round before. In mutual distillation every model
learns the mean of what all of them say: here of log-odds, there of cosines and of probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count
from d2llm.core.progress import remarks
from d2llm.core.types import TASKS
from d2llm.data.plan import TrainingSource
from d2llm.data.run_folder import RunFolder, changed_student, changed_teacher, is_finished, manifest_of
from d2llm.models.student import Student
from d2llm.models.teachers.ensemble import EnsembleMember, write_ensemble
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.ops.ensemble import Ensemble
from d2llm.recipe import EnsembleTeacherConfig, Recipe, TeacherConfig
from d2llm.recipe.variants import Variant
from d2llm.training.distill import distill
from d2llm.training.label import label
from d2llm.training.tune_teacher import tune_teacher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round of one recipe: its student's folder, and dev measures by data set, as in a ``DistillReport``."""

    number: int
    student: str
    dev: dict[str, dict[str, Any]]


def alternate(
    sources: Sequence[TrainingSource],
    folder: Path,
    *,
    recipes: Sequence[Recipe],
    rounds: int,
    continue_teachers: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Round]:
    """Let the students tune the teachers and the teachers the students, ``rounds`` times; finished parts are kept.

    The first teachers learn the scores of ``training.start``, or else of the untrained students, the cosines of their
    backbones. Judgements are used on dev alone, where the best state of a student is chosen: a student is not worse
    there than that of the round before.

    ``folder`` gets ``start``, and ``round-<number>`` with the teacher, labels and student of each round. Of several
    recipes, each has a folder of its name in these, and ``ensemble`` is the mean of the teachers. Losses of judgements
    get the weight 0. With ``continue_teachers``, a round tunes the teacher of the one before, not the recipe's.

    Raises:
        InputError: ``rounds`` is below 1, two recipes have one name, or one cannot alternate (``recipe_of_round``).
        RecipeError: a recipe does not tune its teacher, or does so by judgements.
    """
    check_count(rounds, "rounds")
    names = [recipe.name for recipe in recipes]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two recipes are called '{repeated}', which would mix their results: set another name")
    computing: dict[str, Any] = {"device": device, "dtype": dtype}
    planned = _plan(recipes, folder, rounds, continue_teachers=continue_teachers)
    for recipe, learner in zip(recipes, planned[0], strict=True):
        start = Path(learner.recipe.training.start or "")
        if recipe.training.start is None and not is_finished(start):
            Student.create(recipe.student, seed=recipe.seed, **computing).save(start)
    results: list[Round] = []
    for round_number, learners in enumerate(planned, start=1):
        shared = RunFolder(folder / f"round-{round_number}")
        for learner in learners:
            _tune(learner, sources, round_number, computing)
        teachers = [learner.recipe.teacher.tuned(str(learner.folder.teacher)) for learner in learners]
        teacher = teachers[0] if len(teachers) == 1 else _mean(teachers, shared.ensemble)
        for learner in learners:
            _distill(learner, sources, teacher, shared.labels, round_number, computing)
            student = learner.folder.student
            results.append(Round(round_number, str(student), manifest_of(student)["dev"]))
    return results


@dataclass(frozen=True, slots=True)
class _Learner:
    """A recipe in one round, and where its teacher and its student of this round are."""

    recipe: Recipe
    folder: RunFolder


def _plan(recipes: Sequence[Recipe], folder: Path, rounds: int, *, continue_teachers: bool) -> list[list[_Learner]]:
    """The learners of every round, before the first step, so that mistakes are found at once."""
    homes = ["" if len(recipes) == 1 else recipe.name for recipe in recipes]
    teachers = [recipe.teacher for recipe in recipes]
    students = [
        recipe.training.start or str(folder / "start" / home) for recipe, home in zip(recipes, homes, strict=True)
    ]
    planned: list[list[_Learner]] = []
    for round_number in range(1, rounds + 1):
        folders = [RunFolder(folder / f"round-{round_number}" / home) for home in homes]
        changed = [
            recipe_of_round(recipe.model_copy(update={"teacher": teacher}), round_number, students, start)
            for recipe, teacher, start in zip(recipes, teachers, students, strict=True)
        ]
        planned.append([_Learner(*learner) for learner in zip(changed, folders, strict=True)])
        students = [str(one.student) for one in folders]
        if continue_teachers:
            teachers = [before.tuned(str(one.teacher)) for before, one in zip(teachers, folders, strict=True)]
    return planned


def recipe_of_round(recipe: Recipe, round_number: int, students: Sequence[str], start: str) -> Recipe:
    """The recipe of one round: learns from the teacher alone, that one from ``students``; ``start`` goes on.

    Raises:
        InputError: no loss of the recipe imitates a teacher, or a head or nested vectors learn judgements.
        RecipeError: the recipe does not tune its teacher, or does so by judgements.
    """
    if not recipe.losses.imitates:
        raise InputError("no loss of the recipe imitates a teacher, so it cannot teach: set losses.list_imitation")
    if recipe.training.dual_head:
        raise InputError("training.dual_head has a head for judgements, but here there are none: set it to false")
    if recipe.training.pretraining:
        raise InputError(
            "training.pretraining prepares the backbone of a new student, but each round continues from one: delete it"
        )
    if recipe.losses.weight("nested_cross_entropy"):
        raise InputError("losses.nested_cross_entropy is trained on judgements, but here there are none: delete it")
    changes = {
        "teacher_tuning": {"students": (*students,)},
        "losses": {
            "in_batch_cross_entropy": 0.0,
            "dot_cross_entropy": 0.0,
            "pair_cross_entropy": {"teacher_weight": 1.0},
        },
        "training": {"start": start, "unlabelled": "leave_out"},
    }
    return Variant(f"round-{round_number}", "own", "student and teacher in turns", changes).apply(recipe)


def _tune(learner: _Learner, sources: Sequence[TrainingSource], round_number: int, computing: dict[str, Any]) -> None:
    recipe, folder = learner.recipe, learner.folder.teacher
    if is_finished(folder):
        _warn_of_changes(folder, changed_teacher(folder, recipe))
        return
    names = " and ".join(recipe.teacher_tuning.students)
    remarks.info("alternate: round %d, the teacher learns from %s", round_number, names)
    tuning = recipe.teacher_tuning
    tune_teacher([*sources], folder, teacher=recipe.teacher, tuning=tuning, seed=recipe.seed, **computing)


def _mean(teachers: Sequence[TeacherConfig], folder: Path) -> TeacherConfig:
    """A teacher whose log-odds are the mean of those of ``teachers``."""
    count = len(teachers)
    mean = Ensemble((0.0,) * count, (1.0,) * count, (1 / count,) * count, bias=0.0)
    members = [EnsembleMember(teacher, identify_teacher(teacher).fingerprint) for teacher in teachers]
    write_ensemble(folder, members, dict.fromkeys(TASKS, mean), {})
    return EnsembleTeacherConfig(model=str(folder))


def _distill(
    learner: _Learner,
    sources: Sequence[TrainingSource],
    teacher: TeacherConfig,
    labels: Path,
    round_number: int,
    computing: dict[str, Any],
) -> None:
    recipe, folder = learner.recipe, learner.folder.student
    if is_finished(folder):
        _warn_of_changes(folder, changed_student(folder, recipe))
        return
    remarks.info("alternate: round %d, the student learns from %s", round_number, teacher.model)
    label(sources, labels, teacher=teacher, **computing)
    distill(sources, folder, recipe=recipe, labels=labels, teacher=teacher, **computing)


def _warn_of_changes(folder: Path, changes: Sequence[str]) -> None:
    if changes:
        _log.warning(
            "%s was made with other settings than the recipe's, and is kept: %s; move it and all later rounds away to "
            "make them again",
            folder,
            ", ".join(changes),
        )
