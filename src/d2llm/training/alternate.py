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
from d2llm.core.inputs import check_count
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
    check_count(rounds, "rounds")
    computing: dict[str, Any] = {"device": device, "dtype": dtype}
    before = recipe.training.start or str(folder / "start")
    recipes: list[Recipe] = []
    for round_number in range(1, rounds + 1):  # all before the first step, so that mistakes are found at once
        recipes.append(recipe_of_round(recipe, round_number, before))
        before = str(RunFolder(folder / f"round-{round_number}").student)
    if recipe.training.start is None and not is_finished(folder / "start"):
        Student.create(recipe.student, seed=recipe.seed, **computing).save(folder / "start")
    results: list[Round] = []
    for round_number, round_recipe in enumerate(recipes, start=1):
        run_folder = RunFolder(folder / f"round-{round_number}")
        if is_finished(run_folder.teacher):
            _warn_of_changes(run_folder.teacher, changed_teacher(run_folder.teacher, round_recipe))
        else:
            remarks.info(
                "alternate: round %d, the teacher learns from %s", round_number, round_recipe.teacher_tuning.student
            )
            tune_teacher(
                list(sources),
                run_folder.teacher,
                teacher=round_recipe.teacher,
                tuning=round_recipe.teacher_tuning,
                seed=round_recipe.seed,
                **computing,
            )
        if is_finished(run_folder.student):
            _warn_of_changes(run_folder.student, changed_student(run_folder.student, round_recipe))
        else:
            remarks.info("alternate: round %d, the student learns from %s", round_number, run_folder.teacher)
            tuned = round_recipe.teacher.tuned(str(run_folder.teacher))
            label(sources, run_folder.labels, teacher=tuned, **computing)
            distill(
                sources, run_folder.student, recipe=round_recipe, labels=run_folder.labels, teacher=tuned, **computing
            )
        results.append(Round(round_number, str(run_folder.student), manifest_of(run_folder.student)["dev"]))
    return results


def recipe_of_round(recipe: Recipe, round_number: int, before: str) -> Recipe:
    """The recipe of one round: learns from the teacher alone, whose own teacher is the student ``before``.

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
        "teacher_tuning": {"student": before},
        "losses": {
            "in_batch_cross_entropy": 0.0,
            "dot_cross_entropy": 0.0,
            "pair_cross_entropy": {"teacher_weight": 1.0},
        },
        "training": {"start": before, "unlabelled": "leave_out"},
    }
    return Variant(f"round-{round_number}", "own", "student and teacher in turns", changes).apply(recipe)


def _warn_of_changes(folder: Path, changes: Sequence[str]) -> None:
    if changes:
        _log.warning(
            "%s was made with other settings than the recipe's, and is kept: %s; move it and all later rounds away to "
            "make them again",
            folder,
            ", ".join(changes),
        )
