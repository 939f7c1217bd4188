"""A recipe in its run folder, as the verbs that train share it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.apps.options import in_a_folder_or_the_run
from d2llm.core.errors import InputError, ModelError
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.recipe import Recipe, TeacherConfig
from d2llm.core.recipe_file import changed_settings, load_recipe
from d2llm.pipeline.run_folder import RunFolder, check_data, is_finished

if TYPE_CHECKING:
    from d2llm.apps.session import Session
    from d2llm.models.student import Student


@dataclass(frozen=True)
class Job:
    """A recipe, the folder it runs in, and where to compute."""

    recipe: Recipe
    run: RunFolder
    device: str | None
    dtype: str | None
    session: Session

    @property
    def teacher(self) -> TeacherConfig:
        """The recipe's where it is a stack, else the tuned teacher of the run, or the recipe's untuned."""
        from d2llm.models.teacher_identity import find_kind, find_tuned_teacher

        asked = self.recipe.teacher
        if asked.stack_with_cosine and is_finished(self.run.stack):
            return asked.model_copy(update={"model": str(self.run.stack), "kind": "stack", "new_head": False})
        if find_tuned_teacher(asked.model) is not None and find_kind(asked) == "stack":
            return asked
        if is_finished(self.run.teacher):
            return asked.model_copy(update={"model": str(self.run.teacher), "new_head": False})
        return asked

    def teacher_fingerprint(self) -> str | None:
        """Of ``teacher``; None where it is not there to be looked at."""
        from d2llm.models.judge import identify_judge

        try:
            return identify_judge(self.teacher).fingerprint
        except ModelError:
            return None

    def untuned_cosine(self) -> Student:
        """The recipe's backbone with its own pooling."""
        from d2llm.models.student import Student
        from d2llm.pipeline.cosine import untuned_config

        return Student.create(untuned_config(self.recipe.student), device=self.device, dtype=self.dtype)

    def new_student(self) -> Student:
        """The recipe's student before any training."""
        from d2llm.models.student import Student

        return Student.create(self.recipe.student, device=self.device, dtype=self.dtype, seed=self.recipe.seed)


def job_of(
    session: Session,
    recipe_name: str,
    out: Path | None,
    data: Sequence[str] | None,
    device: str | None,
    dtype: str | None,
    *,
    files: Sequence[Path | None],
) -> Job:
    """The job that the arguments of a verb describe; ``out`` is ``runs/<name of the recipe>`` unless given.

    ``files`` are what the verb will write besides, so that a wrong path is told before the work.

    Raises:
        RecipeError: no such recipe, or its data sets cannot be told apart.
        InputError: ``data`` names a set that the recipe does not have, a data set is not on this machine, or the
            folder of a file is not there.
    """
    recipe = with_data(load_recipe(recipe_name), data or [])
    check_data(recipe, where=recipe_name)
    require_data(recipe)
    name = Path(recipe_name).stem if recipe.name == "unnamed" else recipe.name
    folder = out or Path("runs") / name
    in_a_folder_or_the_run(folder, files)
    return Job(recipe, RunFolder(folder), device=device, dtype=dtype, session=session)


def with_data(recipe: Recipe, places: Sequence[str]) -> Recipe:
    """The recipe with other folders for its data sets.

    ``places`` are "name=folder", a name being the last part of a path in the recipe, or folders that hold data sets by
    their names.

    Raises:
        InputError: no data set of that name, or a folder that holds none of them.
    """
    data = {Path(item.path).name: item for item in recipe.data}
    for place in places:
        name, equals, folder = place.partition("=")
        if equals and folder and name in data:
            paths = {name: folder}
        else:
            paths = {name: str(Path(place) / name) for name in data if (Path(place) / name).exists()}
        if not paths:
            raise InputError(
                f"--data {place}: write NAME=FOLDER, where NAME is one of the recipe's data sets: {', '.join(data)}; "
                "or give a folder that holds folders of these names"
            )
        for name, path in paths.items():
            data[name] = data[name].model_copy(update={"path": path})
    return recipe.model_copy(update={"data": tuple(data.values())}) if places else recipe


def require_data(recipe: Recipe) -> None:
    """Make sure that every data set of a recipe is on this machine, or named as one of the Hub.

    Raises:
        InputError: some are not; it lists them all, with what the recipe says of them.
    """
    missing = [item for item in recipe.data if not item.path.startswith("hf:/") and not Path(item.path).exists()]
    if missing:
        lines = [f"{item.path} ({item.about})" if item.about else item.path for item in missing]
        raise InputError(
            f"{len(missing)} of {len(recipe.data)} data sets of the recipe are not here: {'; '.join(lines)}. Give each "
            f"with --data {Path(missing[0].path).name}=FOLDER, or all with --data FOLDER if it holds them by name; "
            "docs/data-formats.md says what a data set looks like"
        )


def require_plans(job: Job) -> None:
    """Make sure that every data set of the recipe has its plan.

    Raises:
        InputError: one has none.
    """
    for data in job.recipe.data:
        if not is_finished(job.run.plan(data)):
            raise InputError(
                f"{job.run.plan(data)}: there is no training plan yet; run the verb mine with this recipe first"
            )


def put_aside(job: Job, verb: str, folder: Path) -> None:
    """Rename what a step has made, and its checkpoints, so that nothing that took hours is lost."""
    made = [path for path in (folder, folder.with_name(folder.name + ".run")) if path.exists()]
    number = 1
    while any(_aside(path, folder, number).exists() for path in (folder, folder.with_name(folder.name + ".run"))):
        number += 1
    for path in made:
        path.rename(_aside(path, folder, number))
    if made:
        job.session.say(f"{verb}: what was there is now in {_aside(made[0], folder, number)}")


def _aside(path: Path, folder: Path, number: int) -> Path:
    return path.with_name(f"{folder.name}.old-{number}{path.name.removeprefix(folder.name)}")


def notice_changes(
    job: Job, verb: str, folder: Path, recipe: dict[str, Any], teacher: str | None = None, *, as_mined: bool = False
) -> None:
    """Warn if what is finished in ``folder`` was made from something else than would be now, and say from what.

    Args:
        job: recipe and run folder.
        verb: that makes it.
        folder: what is finished; its manifest says what it was made from, unless an earlier version wrote it.
        recipe: what of the recipe shapes it.
        teacher: fingerprint of the teacher that it would be made from; None where that does not matter.
        as_mined: it is made from the plans before a tuned teacher filters them. A plan that the run's teacher has
            filtered says nothing of those.
    """
    made = manifest_of(folder).get("settings", {})
    changes = changed_settings(made.get("recipe", {}), recipe)
    for data in job.recipe.data:
        place = job.run.plan(data) if as_mined else job.run.final_plan(job.recipe, data)
        plan = manifest_of(place) if is_finished(place) else {}
        if as_mined and "teacher" in plan and plan["teacher"] == job.teacher_fingerprint():
            continue
        name, content = plan.get("dataset"), plan.get("content_hash")
        if made.get("plans", {}).get(name, content) != content:
            changes.append(f"the plan of {name}")
    if teacher is not None and made.get("teacher", teacher) != teacher:
        changes.append("the teacher")
    if changes:
        job.session.complain(
            "warning",
            f"{folder} was made from something else than it would be now, and stays as it is: {', '.join(changes)}; "
            f"{verb} with --again makes it anew and keeps this one aside",
        )


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a finished step says of its result."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def skip(job: Job, reason: str) -> dict[str, str]:
    """Say why a step is not taken; that is its result."""
    job.session.say(reason)
    return {"skipped": reason}
