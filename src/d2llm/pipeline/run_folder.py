"""Where a run keeps its parts, and what a recipe needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d2llm.core.errors import RecipeError
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
        """The training plan of one data set."""
        return self.path / "plans" / Path(data.path).name

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

    def sources(self, recipe: Recipe) -> list[TrainingSource]:
        """The data sets of a recipe with the plans that ``mine`` made for them.

        Raises:
            RecipeError: no data sets, or two of the same folder name.
            DataFormatError: a data set or a plan cannot be read.
        """
        check_data(recipe)
        return [training_source(data, read_plan(self.plan(data))) for data in recipe.data]


def training_source(data: DataConfig, plan: TrainingPlan) -> TrainingSource:
    """A data set of a recipe, of whatever layout, with its plan.

    Raises:
        DataFormatError: it cannot be read.
        MismatchError: the plan is of another data set.
    """
    found = open_data(data.path)
    if isinstance(found, Dataset):
        return TrainingSource(found, plan, data.task, data.max_labelled)
    return TrainingSource(read_pair_training_set(found).dataset, plan, data.task, data.max_labelled, pairs=found)


def companion(student: Path, variant: str) -> Path:
    """Where a variant of a student lies: beside it, as ``<name>-<variant>``."""
    return student.with_name(f"{student.name}-{variant}")


def check_data(recipe: Recipe, *, where: str = "recipe") -> None:
    """Make sure that the data sets of a recipe can be told apart; ``where`` names its origin in errors.

    Raises:
        RecipeError: no data sets, or two of the same folder name.
    """
    names = [Path(data.path).name for data in recipe.data]
    if not names:
        raise RecipeError(f"{where}: names no data sets; add a [[data]] section with path and task")
    if len(set(names)) < len(names):
        raise RecipeError(f"{where}: two data sets have the same folder name: {', '.join(sorted(names))}")
