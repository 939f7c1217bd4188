"""The folder layout of a run, and the parts of it that a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError, RecipeError
from d2llm.core.files import check_replaceable
from d2llm.core.json_values import parse_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data
from d2llm.data.pair_training import read_pair_training_set
from d2llm.data.plan import TrainingPlan, TrainingSource, read_plan
from d2llm.recipe import DataConfig, Recipe
from d2llm.recipe.recipe import changed_recipe, shaping_settings, tuning_settings


class RunFolder:
    """The layout of one run: where ``mine``, ``tune_teacher``, ``label`` and ``distill`` find each other's results.

    ``teacher`` is the tuned teacher, ``ensemble`` several teachers combined into one, ``labels`` the label store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.teacher, self.ensemble = path / "teacher", path / "ensemble"
        self.labels, self.student = path / "labels", path / "student"

    def plan(self, data: DataConfig) -> Path:
        """The training plan of one data set as written by ``mine``; a teacher is tuned on it."""
        return self.path / "plans" / Path(data.path).name

    def filtered_plan(self, data: DataConfig) -> Path:
        """The plan of one data set after mining again with the margin of the tuned teacher."""
        return self.path / "filtered" / Path(data.path).name

    def final_plan(self, recipe: Recipe, data: DataConfig) -> Path:
        """The plan that is labelled and that students are trained on: the filtered one if the recipe filters."""
        filtered = self.filtered_plan(data)
        return filtered if recipe.filters_with_tuned_teacher and is_finished(filtered) else self.plan(data)

    def mining_work(self, data: DataConfig) -> Path:
        """Intermediate results: of an interrupted mining for its restart, and of the first mining for the second."""
        return self.path / "plans" / f".{Path(data.path).name}.mining"

    def variant(self, name: str) -> Path:
        """A student of a changed recipe (see ``recipe.variants``), trained on the same plans and labels."""
        return companion(self.student, name)

    def cosine_of_ensemble(self, recipe: Recipe) -> Path:
        """The tuned cosine model that is one of the teachers in the ensemble.

        It is the variant of that name, unless the ensemble filters the plans: then it was trained on the unfiltered
        plans and would not be a fair baseline for the student.
        """
        return self.path / "ensemble-cosine" if recipe.filters_with_tuned_teacher else self.variant("cosine")

    def sources(self, recipe: Recipe, *, as_mined: bool = False) -> list[TrainingSource]:
        """The data sets of a recipe with their final plans, or, if ``as_mined``, with those written by ``mine``.

        Errors are those of ``require_distinct_data``, ``read_plan`` and ``training_source``.
        """
        require_distinct_data(recipe)
        plans = [self.plan(data) if as_mined else self.final_plan(recipe, data) for data in recipe.data]
        return [training_source(data, read_plan(plan)) for data, plan in zip(recipe.data, plans, strict=True)]


def is_finished(folder: Path) -> bool:
    """Whether a step has written its result to ``folder``."""
    return (folder / MANIFEST).is_file()


def require_unfinished(folder: Path, kind: str) -> None:
    """Check that a result of this kind can be written to ``folder``, before hours of work that end with it.

    Raises:
        InputError: it is there already, or the folder holds something else (``check_replaceable``).
    """
    if is_finished(folder):
        raise InputError(f"{folder}: already holds a finished {kind}; give another folder, or delete it to start over")
    check_replaceable(folder, kind)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest that a finished step wrote with its result."""
    return parse_json((folder / MANIFEST).read_text(encoding="utf-8"))


def changed_student(folder: Path, recipe: Recipe) -> list[str]:
    """The settings in which a recipe differs from the one that made a student; none if it was made elsewhere."""
    manifest, current = manifest_of(folder), recipe.model_dump(mode="json")
    return changed_recipe(manifest["recipe"], current, _student_settings) if "settings" in manifest else []


def changed_teacher(folder: Path, recipe: Recipe) -> list[str]:
    """The same of a tuned teacher."""
    made_from, current = manifest_of(folder).get("settings"), recipe.model_dump(mode="json")
    return [] if made_from is None else changed_recipe(made_from["recipe"], current, tuning_settings)


def _student_settings(recipe: Recipe) -> dict[str, Any]:
    """Also those of score features, which are fitted after the training."""
    return {**shaping_settings(recipe), "score_features": recipe.score_features.model_dump(mode="json")}


def training_source(data: DataConfig, plan: TrainingPlan) -> TrainingSource:
    """A data set of a recipe, in any layout, with its plan; ``MismatchError`` if the plan is that of another one."""
    dataset = open_data(data.path)
    if isinstance(dataset, Dataset):
        return TrainingSource(dataset, plan, data.task, data.max_labelled, instruction=data.instruction)
    listed = read_pair_training_set(dataset).dataset
    return TrainingSource(listed, plan, data.task, data.max_labelled, pairs=dataset, instruction=data.instruction)


def working_folder(result: Path) -> Path:
    """The folder beside a result that has its checkpoint, log and stored labels: ``<result>.run``."""
    return result.with_name(result.name + ".run")


def put_aside(result: Path) -> Path | None:
    """Rename a result and its working folder, so that nothing that took hours is lost; None if there is neither.

    Returns:
        The new place of the result, or of its working folder if only that exists.
    """
    paths = [result, working_folder(result)]
    suffix = 1
    while any(_aside(path, result, suffix).exists() for path in paths):
        suffix += 1
    moved = [path.rename(_aside(path, result, suffix)) for path in paths if path.exists()]
    return moved[0] if moved else None


def _aside(path: Path, result: Path, suffix: int) -> Path:
    return path.with_name(f"{result.name}.old-{suffix}{path.name.removeprefix(result.name)}")


def companion(student: Path, variant: str) -> Path:
    """The folder of a variant of a student: beside the student, as ``<name>-<variant>``."""
    return student.with_name(f"{student.name}-{variant}")


def require_distinct_data(recipe: Recipe, *, where: str = "recipe") -> None:
    """Raise a ``RecipeError`` if a recipe has no data sets, or two with the same folder name; ``where`` names it."""
    names = [Path(data.path).name for data in recipe.data]
    if not names:
        raise RecipeError(f"{where}: names no data sets; add a [[data]] section with path and task")
    if len(set(names)) < len(names):
        names = ", ".join(sorted(names))
        raise RecipeError(f"{where}: two data sets have the same folder name; copy or link one to another: {names}")
