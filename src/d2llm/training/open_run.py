"""An open run: its recipe with the data sets on this machine, its folder, and what all of its steps share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.errors import InputError, ModelError
from d2llm.core.inputs import path_of, strings_of
from d2llm.core.names import counted
from d2llm.core.progress import remarks
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data
from d2llm.data.pairs import PairDataset
from d2llm.data.run_folder import RunFolder, is_finished, manifest_of, put_aside, require_distinct_data
from d2llm.models.downloads import find_saved
from d2llm.models.teachers.identity import find_kind
from d2llm.recipe import DataConfig, FusedTeacherConfig, GradedTeacherConfig, Recipe, TeacherConfig, untuned_config
from d2llm.recipe.recipe import load_recipe

if TYPE_CHECKING:  # each step imports what it needs, so that errors in a recipe are reported before torch is loaded
    from d2llm.models.student import Student

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was skipped, and why."""

    skipped: str


class OpenRun:
    """A recipe and its folder.

    Attributes:
        recipe: it has the paths of the data sets on this machine.
        parts: the layout of the run folder.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        folder: str | Path | None = None,
        *,
        data: Sequence[str] | str = (),
        recorded: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Open a run; nothing is written yet.

        Args:
            recipe: a recipe, its TOML file, or the name of a recipe that comes with d2llm.
            folder: by default ``runs/<name of the recipe>``.
            data: where the data sets are: "name=folder", where the name is the last part of a path in the recipe; or
                folders that contain data sets by these names.
            recorded: a file of graded lists, or a folder with one for each data set: the recipe's graded teacher
                repeats these grades (``teacher.recorded.lists``).
            device: where to compute; by default the best device available.
            dtype: number format of the models; by default the fastest on that device.
            show_progress: whether its steps show progress (``core.progress.showing_progress``).

        Raises:
            RecipeError: there is no such recipe, or two of its data sets have the same name.
            InputError: ``data`` names a set that the recipe does not have, or a data set is not on this machine;
                grades are recorded, but the teacher is not graded.
        """
        source = "recipe" if isinstance(recipe, Recipe) else str(recipe)
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(source)
        self.recipe = with_recorded(with_data(loaded, strings_of(data, "data")), recorded)
        require_distinct_data(self.recipe, where=source)
        require_data(self.recipe)
        name = Path(source).stem if self.recipe.name == "unnamed" else self.recipe.name
        self.folder = RunFolder(Path("runs") / name if folder is None else path_of(folder, "folder"))
        self.device, self.dtype, self.show_progress = device, dtype, show_progress

    def __repr__(self) -> str:
        data = counted(len(self.recipe.data), "data set")
        return f"Run({self.folder.path}, recipe {self.recipe.name}, {data})"

    @property
    def _computing(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}

    @property
    def teacher(self) -> TeacherConfig:
        """The teacher to use: the ensemble if there is one, else the run's tuned teacher, else the recipe's teacher."""
        named = self.recipe.teacher
        if named.ensemble_with_cosine and is_finished(self.folder.ensemble):
            return named.as_kind("ensemble", model=str(self.folder.ensemble))
        if find_saved(named.model, "teachers") is not None and find_kind(named) == "ensemble":
            return named
        if is_finished(self.folder.teacher):
            return named.tuned(str(self.folder.teacher))
        return named

    def untuned_cosine(self) -> Student:
        """The recipe's backbone with the backbone's own pooling, before training."""
        return self._untuned_cosine_and_load()[0]

    def _untuned_cosine_and_load(self) -> tuple[Student, Callable[[], Student]]:
        """``untuned_cosine``, and how the workers of a cluster make it."""
        from d2llm.retrieval.reading import create_student

        load = partial(create_student, untuned_config(self.recipe.student), **self._computing)
        return load(), load

    def dev_data(self) -> list[tuple[Dataset | PairDataset, Task]]:
        """The data sets of the recipe, with only their dev splits."""
        return [(open_data(data.path, splits=["dev"]), data.task) for data in self.recipe.data]

    def require_plans(self) -> None:
        """Raise an ``InputError`` if a data set of the recipe has no plan."""
        for data in self.recipe.data:
            if not is_finished(self.folder.plan(data)):
                raise InputError(
                    f"{self.folder.plan(data)}: there is no training plan yet; run `d2llm mine` with this recipe first"
                )

    def closed_gates(self) -> list[str]:
        """Data sets whose teacher labels are not to be used, according to ``gate.json`` and the recipe.

        If ``gate.when_closed`` is "stop", a closed gate is an ``InputError``.
        """
        from d2llm.models.teachers.pair_teacher import identify_teacher
        from d2llm.training.gate import read_gate

        gates = read_gate(self.folder.path, identify_teacher(self.teacher).fingerprint)
        if gates is None:
            _log.warning("the teacher was not tested on dev (d2llm gate); its labels are used without a test")
            return []
        closed = sorted(name for name, is_open in gates.items() if not is_open)
        if not closed or self.recipe.gate.when_closed == "teacher":
            return []
        if self.recipe.gate.when_closed == "stop":
            raise InputError(
                f"the teacher is not better than the cosine on {', '.join(closed)} (gate.json), and the recipe says to "
                "stop in that case (gate.when_closed); use a better teacher, or set gate.when_closed to 'labels'"
            )
        remarks.info("the gate is closed for %s: using the data sets' own judgements", ", ".join(closed))
        return closed

    def put_aside(self, step: str, folder: Path) -> None:
        """Rename a step's results and its checkpoints, so that nothing that took hours is lost."""
        if (kept := put_aside(folder)) is not None:
            remarks.info("%s: the earlier result is now in %s", step, kept)

    def put_filtered_aside(self, verb: str) -> None:
        """Rename the filtered plans, before the plans that they were made from are replaced."""
        for data in self.recipe.data:
            self.put_aside(verb, self.folder.filtered_plan(data))

    def skip(self, reason: str) -> Skipped:
        """Log why a step is skipped, and return that as its result."""
        remarks.info("%s", reason)
        return Skipped(reason)

    def _teacher_fingerprint(self) -> str | None:
        """The fingerprint of ``teacher``; None if the teacher cannot be found."""
        from d2llm.models.teachers.pair_teacher import identify_teacher

        try:
            return identify_teacher(self.teacher).fingerprint
        except ModelError:
            return None

    def _name_the_teacher(self, verb: str) -> None:
        named, in_recipe = self.teacher.model, self.recipe.teacher.model
        untuned = f"'{in_recipe}' as it is ({self.folder.teacher} does not exist)"
        remarks.info("%s: the teacher is %s", verb, untuned if named == in_recipe else named)

    def _warn_of_changes(
        self,
        verb: str,
        folder: Path,
        changed: Sequence[str],
        teacher: str | None = None,
        *,
        as_mined: bool = False,
    ) -> None:
        """Warn if the finished result in ``folder`` was made from other settings or inputs than the current ones.

        Its manifest records its inputs. ``changed`` are the settings that differ, ``teacher`` is the fingerprint of
        the teacher that would be used now, if that matters. ``as_mined``: it is made from the plans before a tuned
        teacher filters them; a plan that the run's teacher has filtered is then not compared.
        """
        made_from = manifest_of(folder).get("settings")
        if made_from is None:  # made elsewhere and copied here, such as a shipped student
            return
        changes = [*changed]
        for data in self.recipe.data:
            location = self.folder.plan(data) if as_mined else self.folder.final_plan(self.recipe, data)
            plan = manifest_of(location) if is_finished(location) else {}
            if as_mined and "teacher" in plan and plan["teacher"] == self._teacher_fingerprint():
                continue
            name, content = plan.get("dataset"), plan.get("content_hash")
            if made_from["plans"].get(name) != content:
                changes.append(f"the plan of {name}")
        if teacher is not None and made_from["teacher"] != teacher:
            changes.append("the teacher")
        if changes:
            _log.warning(
                "%s was made from other inputs than the current ones, and is kept: %s; %s with --again rebuilds it and "
                "keeps this one aside",
                folder,
                ", ".join(changes),
                verb,
            )


def with_data(recipe: Recipe, locations: Sequence[str]) -> Recipe:
    """The recipe with other folders for its data sets (see ``Run``); ``InputError`` for a place without any."""
    data = {Path(item.path).name: item for item in recipe.data}
    for location in locations:
        name, equals, folder = location.partition("=")
        if equals and folder and name in data:
            paths = {name: folder}
        else:
            paths = {name: str(Path(location) / name) for name in data if (Path(location) / name).exists()}
        if not paths:
            raise InputError(
                f"--data {location}: write NAME=FOLDER, where NAME is one of the recipe's data sets: "
                f"{', '.join(data)}; or give a folder that contains folders with these names"
            )
        for name, path in paths.items():
            data[name] = data[name].model_copy(update={"path": path})
    return recipe.model_copy(update={"data": tuple(data.values())}) if locations else recipe


def with_recorded(recipe: Recipe, lists: str | Path | None) -> Recipe:
    """The recipe whose teacher repeats ``lists``, if given, of the recipe's data sets."""
    from d2llm.models.teachers.pair_teacher import recorded_teacher

    teacher = recipe.teacher if lists is None else recorded_teacher(recipe.teacher, Path(lists))
    data = tuple(item.path for item in recipe.data)
    return recipe.model_copy(update={"teacher": _with_texts(teacher, data)})


def _with_texts(teacher: TeacherConfig, data: tuple[str, ...]) -> TeacherConfig:
    """The teacher whose recorded lists, if it repeats any, are about these data sets unless it names others."""
    if isinstance(teacher, FusedTeacherConfig):
        teachers = tuple(_with_texts(one, data) for one in teacher.teachers)
        return teacher.model_copy(update={"teachers": teachers})
    if not isinstance(teacher, GradedTeacherConfig) or teacher.recorded is None:
        return teacher
    recorded = teacher.recorded.model_copy(update={"data": teacher.recorded.data or data})
    return teacher.model_copy(update={"recorded": recorded})


def is_absent(data: DataConfig) -> bool:
    """Whether a data set is neither on this machine nor on the Hub."""
    return not data.path.startswith("hf:/") and not Path(data.path).exists()


def require_data(recipe: Recipe) -> None:
    """Raise an ``InputError`` that lists the data sets of a recipe that are neither on this machine nor on the Hub."""
    missing = [*filter(is_absent, recipe.data)]
    if missing:
        lines = [f"{item.path} ({item.about})" if item.about else item.path for item in missing]
        raise InputError(
            f"{len(missing)} of {len(recipe.data)} data sets of the recipe were not found: {'; '.join(lines)}. Give "
            f"each with --data {Path(missing[0].path).name}=FOLDER, or all with --data FOLDER if it contains them by "
            "name. A data set is a folder with corpus.jsonl, queries.jsonl and qrels/, or a file of labelled pairs"
        )
