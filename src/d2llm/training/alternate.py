"""Student and teacher teach each other in turns, without the data sets' judgements.

Source: Liu et al., "Trans-Encoder: Unsupervised Sentence-Pair Modelling through Self- and Mutual-Distillations", ICLR
2022 (arXiv 2109.13059), algorithm 1. There a round tunes a cross-encoder on the scores of the bi-encoder, then the
bi-encoder on those of the cross-encoder, both on unlabelled pairs. Here the pairs are those of the training plans; both
directions are the usual verbs with ``teacher_tuning.student`` and ``training.start``. Unlike there, the teacher need
not be the student's backbone, and begins each round as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.data.run_folder import RunFolder, changed_student, changed_teacher, is_finished, manifest_of
from d2llm.data.training import TrainingSource
from d2llm.models.student import Student
from d2llm.recipe import Recipe
from d2llm.recipe.variants import Variant
from d2llm.training.checkpoints import remarks
from d2llm.training.distill import distill
from d2llm.training.label import label
from d2llm.training.tune_teacher import tune_teacher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round: its student's folder, and the dev measures by data set, as in a ``DistillReport``."""

    number: int
    student: str
    dev: dict[str, dict[str, Any]]


def alternate(
    sources: Sequence[TrainingSource],
    folder: Path,
    *,
    recipe: Recipe,
    rounds: int,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Round]:
    """Let the student tune the teacher and the teacher the student, ``rounds`` times; finished parts are kept.

    The first teacher learns the scores of ``training.start``, or else of the untrained student, the cosine of its
    backbone. Judgements are used on dev alone, where the best state of a student is chosen: a student is not worse
    there than that of the round before.

    Args:
        sources: data sets with their plans, whose pairs are scored by both.
        folder: where to write ``start``, and ``round-<number>`` with the teacher, labels and student of each round.
        recipe: student, teacher, its tuning, losses, training and seed. Losses of judgements get the weight 0.
        rounds: the number of rounds.
        device: where to compute; by default the best device available.
        dtype: number format; by default the fastest on that device.

    Raises:
        InputError: ``rounds`` is below 1, or the recipe cannot alternate (``recipe_of_round``).
        RecipeError: the recipe does not tune its teacher, or does so by judgements.
    """
    if rounds < 1:
        raise InputError(f"there must be at least one round, not {rounds}")
    computing: dict[str, Any] = {"device": device, "dtype": dtype}
    before = recipe.training.start or str(folder / "start")
    recipes: list[Recipe] = []
    for number in range(1, rounds + 1):  # all before the first step, so that mistakes are found at once
        recipes.append(recipe_of_round(recipe, number, before))
        before = str(RunFolder(folder / f"round-{number}").student)
    if recipe.training.start is None and not is_finished(folder / "start"):
        Student.create(recipe.student, seed=recipe.seed, **computing).save(folder / "start")
    results: list[Round] = []
    for number, own in enumerate(recipes, start=1):
        parts = RunFolder(folder / f"round-{number}")
        if is_finished(parts.teacher):
            _warn_of_changes(parts.teacher, changed_teacher(parts.teacher, own))
        else:
            remarks.info("alternate: round %d, the teacher learns from %s", number, own.teacher_tuning.student)
            tune_teacher(
                list(sources),
                parts.teacher,
                teacher=own.teacher,
                tuning=own.teacher_tuning,
                seed=own.seed,
                **computing,
            )
        if is_finished(parts.student):
            _warn_of_changes(parts.student, changed_student(parts.student, own))
        else:
            remarks.info("alternate: round %d, the student learns from %s", number, parts.teacher)
            tuned = own.teacher.tuned(str(parts.teacher))
            label(sources, parts.labels, teacher=tuned, **computing)
            distill(sources, parts.student, recipe=own, labels=parts.labels, teacher=tuned, **computing)
        results.append(Round(number, str(parts.student), manifest_of(parts.student)["dev"]))
    return results


def recipe_of_round(recipe: Recipe, number: int, before: str) -> Recipe:
    """The recipe of one round: learns from the teacher alone, whose own teacher is the student ``before``.

    Raises:
        InputError: no loss of the recipe imitates a teacher, or a head or nested vectors learn judgements.
        RecipeError: the recipe does not tune its teacher, or does so by judgements.
    """
    if not recipe.losses.imitates:
        raise InputError("no loss of the recipe imitates a teacher, so it cannot teach: set losses.list_imitation")
    if recipe.training.dual_head:
        raise InputError("training.dual_head has a head for judgements, but here there are none: set it to false")
    if recipe.training.pretraining is not None:
        raise InputError(
            "training.pretraining prepares the backbone of a new student, but each round continues from one: delete it"
        )
    if recipe.losses.weight("nested_cross_entropy"):
        raise InputError("losses.nested_cross_entropy is trained on judgements, but here there are none: delete it")
    changes = {
        "teacher_tuning": {"student": before},
        "losses": {
            "in_batch_cross_entropy": 0.0,
            "dot_cross_entropy": 0.0,
            "pair_cross_entropy": {"teacher_weight": 1.0},
        },
        "training": {"start": before, "unlabelled": "leave_out"},
    }
    return Variant(f"round-{number}", "own", "student and teacher in turns", changes).apply(recipe)


def _warn_of_changes(folder: Path, changes: Sequence[str]) -> None:
    if changes:
        _log.warning(
            "%s was made with other settings than the recipe's, and is kept: %s; move it and all later rounds away to "
            "make them again",
            folder,
            ", ".join(changes),
        )
