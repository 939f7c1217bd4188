"""Where a run keeps its parts, and what a recipe needs of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import RecipeError
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.recipe import DataConfig, Recipe
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data
from d2llm.data.pair_training import read_pair_training_set
from d2llm.data.plan import TrainingPlan, read_plan
from d2llm.data.training import TrainingSource


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The layout of one run: what ``mine``, ``tune_teacher``, ``label`` and ``distill`` leave for each other."""

    path: Path

    def plan(self, data: DataConfig) -> Path:
        """The training plan of one data set, as ``mine`` made it; a teacher is tuned on it."""
        return self.path / "plans" / Path(data.path).name

    def filtered_plan(self, data: DataConfig) -> Path:
        """The plan of one data set mined again, with the margin of the tuned teacher."""
        return self.path / "filtered" / Path(data.path).name

    def final_plan(self, recipe: Recipe, data: DataConfig) -> Path:
        """The plan that is labelled and that students learn from: the filtered one where the recipe asks for it."""
        filtered = self.filtered_plan(data)
        return filtered if recipe.filters_with_tuned_teacher and is_finished(filtered) else self.plan(data)

    def mining_work(self, data: DataConfig) -> Path:
        """What an interrupted mining leaves for the next, and the first of two minings for the second."""
        return self.path / "plans" / f".{Path(data.path).name}.mining"

    @property
    def teacher(self) -> Path:
        """The tuned teacher."""
        return self.path / "teacher"

    @property
    def stack(self) -> Path:
        """Several teachers as one."""
        return self.path / "stack"

    @property
    def labels(self) -> Path:
        """The label store."""
        return self.path / "labels"

    @property
    def student(self) -> Path:
        """The distilled student."""
        return self.path / "student"

    def variant(self, name: str) -> Path:
        """A student of a changed recipe (see ``core.variants``), trained on the same plans and labels."""
        return companion(self.student, name)

    def cosine_of_stack(self, recipe: Recipe) -> Path:
        """The tuned cosine that teaches in the stack.

        It is the variant of that name, unless the stack filters the plans: then it was trained on the plans before
        that, and beside the student it would be no fair baseline.
        """
        return self.path / "stack-cosine" if recipe.filters_with_tuned_teacher else self.variant("cosine")

    def sources(self, recipe: Recipe, *, as_mined: bool = False) -> list[TrainingSource]:
        """The data sets of a recipe with their final plans, or with those that ``mine`` made.

        Raises:
            RecipeError: no data sets, or two of the same folder name.
            DataFormatError: a data set or a plan cannot be read.
        """
        require_distinct_data(recipe)
        plans = [self.plan(data) if as_mined else self.final_plan(recipe, data) for data in recipe.data]
        return [training_source(data, read_plan(plan)) for data, plan in zip(recipe.data, plans, strict=True)]


def is_finished(folder: Path) -> bool:
    """Whether a step has written its result there."""
    return (folder / MANIFEST).is_file()


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a finished step says of its result."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def training_source(data: DataConfig, plan: TrainingPlan) -> TrainingSource:
    """A data set of a recipe, of whatever layout, with its plan.

    Raises:
        DataFormatError: it cannot be read.
        MismatchError: the plan is of another data set.
    """
    dataset = open_data(data.path)
    if isinstance(dataset, Dataset):
        return TrainingSource(dataset, plan, data.task, data.max_labelled)
    return TrainingSource(read_pair_training_set(dataset).dataset, plan, data.task, data.max_labelled, pairs=dataset)


def companion(student: Path, variant: str) -> Path:
    """Where a variant of a student lies: beside it, as ``<name>-<variant>``."""
    return student.with_name(f"{student.name}-{variant}")


def require_distinct_data(recipe: Recipe, *, where: str = "recipe") -> None:
    """Make sure that the data sets of a recipe can be told apart; ``where`` names its origin in errors.

    Raises:
        RecipeError: no data sets, or two of the same folder name.
    """
    names = [Path(data.path).name for data in recipe.data]
    if not names:
        raise RecipeError(f"{where}: names no data sets; add a [[data]] section with path and task")
    if len(set(names)) < len(names):
        raise RecipeError(f"{where}: two data sets have the same folder name: {', '.join(sorted(names))}")
