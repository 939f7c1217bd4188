"""A run: a recipe in its folder, from data sets to a student that has been measured.

    run = Run("d2llm-small", "runs/first", data=["../data"])
    run.finish()

takes every step that is not finished. Each can be taken alone: ``mine``, ``look_at_the_teacher``, ``tune_teacher``,
``stack_with_cosine``, ``gate``, ``filter``, ``label``, ``distill``; and ``evaluate``, which ``finish`` leaves to the
user. What is finished is skipped, so the same call goes on after an interruption; ``again`` takes a step anew and keeps
what was there aside. What was made with other settings than the recipe has now is named in a warning, and stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from d2llm.core.errors import InputError, ModelError
from d2llm.core.recipe import Recipe, TeacherConfig
from d2llm.core.recipe_file import changed_settings, load_recipe, shaping_settings, tuning_settings
from d2llm.core.types import RunStep, Task
from d2llm.core.variants import find_variant
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data, open_source
from d2llm.data.pairs import PairDataset
from d2llm.data.run_folder import RunFolder, is_finished, manifest_of, require_distinct_data
from d2llm.models.teachers.identity import find_kind, find_tuned_teacher

if TYPE_CHECKING:  # a step imports what it needs: whoever misspelt a recipe is told before torch is loaded
    from d2llm.evaluation.report import EvaluationReport
    from d2llm.evaluation.setting import EvaluationSettings
    from d2llm.models.student import Student
    from d2llm.training.distill import DistillReport
    from d2llm.training.gate import FirstLook, GateReport
    from d2llm.training.label import LabelReport
    from d2llm.training.stack_teachers import StackReport
    from d2llm.training.tune_teacher import TeacherTuningReport

_remarks = logging.getLogger("d2llm.remarks")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was not taken, and why."""

    skipped: str


class Run:
    """A recipe, the folder it runs in, and where to compute. Remarks go to the logger ``d2llm.remarks``.

    Attributes:
        recipe: with the data sets where they are on this machine.
        parts: what lies where in the folder.
        device: None means the best here.
        dtype: None means what is fast here.
        show_progress: None means: if standard error is a terminal.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        folder: str | Path | None = None,
        *,
        data: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Open a run; nothing is written yet.

        Args:
            recipe: or its TOML file, or the name of one that comes with d2llm.
            folder: by default ``runs/<name of the recipe>``.
            data: where its data sets are: "name=folder", a name being the last part of a path in the recipe, or folders
                that hold data sets by their names.
            device: where to compute.
            dtype: number format of the models.
            show_progress: whether bars are shown.

        Raises:
            RecipeError: no such recipe, or its data sets cannot be told apart.
            InputError: ``data`` names a set that the recipe does not have, or a data set is not on this machine.
        """
        where = "recipe" if isinstance(recipe, Recipe) else str(recipe)
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(where)
        self.recipe = with_data(loaded, data)
        require_distinct_data(self.recipe, where=where)
        require_data(self.recipe)
        name = Path(where).stem if self.recipe.name == "unnamed" else self.recipe.name
        self.parts = RunFolder(Path("runs") / name if folder is None else Path(folder))
        self.device, self.dtype, self.show_progress = device, dtype, show_progress

    # The steps -------------------------------------------------------------------------------------------------------

    def finish(
        self, *, again: RunStep | None = None, after: Callable[[str, object], None] | None = None
    ) -> dict[str, Any]:
        """Take every step that is not finished, in order; what came of each, by its name.

        Args:
            again: take this step and those after it anew. Labels are kept by teacher and pair, never made again.
            after: is called with each step's name and what came of it.
        """
        order: tuple[str, ...] = get_args(RunStep)
        anew: tuple[str, ...] = order[order.index(again) :] if again else ()
        results: dict[str, Any] = {}

        def keep(step: str, result: object) -> None:
            results[step] = result
            if after is not None:
                after(step, result)

        if "filter" in anew:
            self.put_filtered_aside("filter")  # first, so that no plan of the teacher before is left by an interruption
        keep("mine", self.mine(again="mine" in anew, before_tuning=True))
        if self.recipe.losses.imitates:
            keep("first-look", self.look_at_the_teacher(again="tune-teacher" in anew))
            keep("tune-teacher", self.tune_teacher(again="tune-teacher" in anew))
            keep("stack", self.stack_with_cosine(again="stack" in anew, cosine_again="mine" in anew))
            keep("gate", self.gate(again="gate" in anew))
            closed = self.closed_gates()
            keep("filter", self.filter(closed))
            if len(closed) < len(self.recipe.data):
                keep("label", self.label())
            else:
                keep("label", self.skip("label: the gate is closed for every data set, so no pair is labelled"))
        else:
            _remarks.info("run: no loss of the recipe imitates a teacher, so no teacher is tuned, tested or used")
        keep("distill", self.distill(again="distill" in anew))
        return results

    def mine(
        self, *, again: bool = False, student: str | None = None, before_tuning: bool = False
    ) -> dict[str, dict[str, Any] | Skipped]:
        """Make the training plan of each data set; its counts by the data set's name.

        Args:
            again: make also those that are there; what was filtered of them before is put aside.
            student: ranks in place of the recipe's: a folder or a name.
            before_tuning: leave the teacher's margin to ``filter`` where the recipe has the teacher tuned first.
        """
        from d2llm.training.mining.plans import mine_plans

        return mine_plans(self, again=again, student=student, before_tuning=before_tuning)

    def look_at_the_teacher(self, *, again: bool = False) -> FirstLook | Skipped:
        """Before tuning: how the untuned teacher does on a few dev queries; a hopeless one is warned of."""
        from d2llm.training.gate import LOOK_QUERIES, first_look
        from d2llm.training.sentences import look_sentence

        recipe, folder = self.recipe, self.parts.teacher
        if recipe.teacher_tuning.epochs == 0:
            return self.skip("first-look: the teacher is not tuned, so the gate tries it as it is")
        if recipe.teacher.new_head and find_tuned_teacher(recipe.teacher.model) is None:
            return self.skip("first-look: the teacher has a new head, which says nothing before it is tuned")
        if not again and (is_finished(folder) or folder.with_name(folder.name + ".run").exists()):
            return self.skip("first-look: the teacher's tuning has begun or is finished; the gate tries what it gives")
        _remarks.info(
            "first-look: the untuned teacher beside the cosine, on %d dev queries of each of %d data sets",
            LOOK_QUERIES,
            len(recipe.data),
        )
        look = first_look(
            self.dev_data(),
            self.parts.path,
            teacher=recipe.teacher,
            student=self.untuned_cosine(),
            settings=recipe.gate,
            seed=recipe.seed,
            **self._computing,
        )
        (_log.warning if look.difference < 0 else _remarks.info)("%s", look_sentence(look))
        return look

    def tune_teacher(self, *, again: bool = False) -> TeacherTuningReport | Skipped:
        """Tune the recipe's teacher on the plans."""
        from d2llm.training.tune_teacher import tune_teacher

        recipe, folder = self.recipe, self.parts.teacher
        if recipe.teacher_tuning.epochs == 0:
            return self.skip("tune-teacher: the recipe takes the teacher as it is (teacher_tuning.epochs is 0)")
        if again:
            self.put_aside("tune-teacher", folder)
        elif is_finished(folder):
            settings = tuning_settings(recipe.teacher, recipe.teacher_tuning, recipe.seed)
            self._notice_changes("tune-teacher", folder, settings, as_mined=True)
            return self.skip(f"tune-teacher: {folder} is finished; --again tunes anew, keeping this one aside")
        self.require_plans()
        _remarks.info("tune-teacher: '%s' learns to answer yes or no on the plans", recipe.teacher.model)
        report = tune_teacher(
            self.parts.sources(recipe, as_mined=True),
            folder,
            teacher=recipe.teacher,
            tuning=recipe.teacher_tuning,
            seed=recipe.seed,
            **self._computing,
        )
        _remarks.info("tune-teacher: %s pairs, final loss %.3f, in %s", f"{report.pairs:,}", report.loss, folder)
        for data in recipe.data:
            filtered = self.parts.filtered_plan(data)
            if is_finished(filtered) and manifest_of(filtered).get("teacher") != report.fingerprint:
                _log.warning(
                    "%s was filtered with another teacher and stays as it is; run with --again filter, or mine with "
                    "--again, filters with this one",
                    filtered,
                )
        return report

    def stack_with_cosine(self, *, again: bool = False, cosine_again: bool = False) -> StackReport | Skipped:
        """Where the recipe says so, make one teacher of the run's and the tuned cosine, which is trained first.

        Args:
            again: also where it is there.
            cosine_again: train the cosine anew for it.
        """
        if not self.recipe.teacher.stack_with_cosine:
            return self.skip("stack: the recipe's teacher teaches alone")
        if again:
            self.put_aside("stack", self.parts.stack)
        elif is_finished(self.parts.stack):
            return self.skip(f"stack: {self.parts.stack} is finished; delete it to fit it anew")
        self.distill(variant="cosine", again=cosine_again, for_stack=True)
        cosine = TeacherConfig(model=str(self.parts.cosine_of_stack(self.recipe)), kind="cosine")
        return self.stack([self.teacher, cosine])

    def stack(
        self, members: Sequence[TeacherConfig], *, num_queries: int | None = None, depth: int | None = None
    ) -> StackReport:
        """Make one calibrated teacher of several, on the dev queries of the recipe's retrieval sets.

        Args:
            members: the teachers; one alone is calibrated.
            num_queries: of each data set; by default the gate's.
            depth: candidates of each query, so many of BM25 and of the cosine; by default the gate's.
        """
        from d2llm.training.stack_teachers import stack_teachers

        settings = self.recipe.gate
        report = stack_teachers(
            [(dataset, task) for dataset, task in self.dev_data() if isinstance(dataset, Dataset)],
            self.parts.stack,
            members=members,
            student=self.untuned_cosine(),
            num_queries=num_queries or settings.queries,
            depth=depth or settings.depth,
            seed=self.recipe.seed,
            **self._computing,
        )
        _remarks.info("stack: the teacher is in %s", report.folder)
        return report

    def gate(
        self, *, again: bool = True, teacher: TeacherConfig | None = None, student: str | None = None
    ) -> GateReport | Skipped:
        """Teacher against cosine on the dev queries and pairs of the recipe's data sets; verdicts go to ``gate.json``.

        Args:
            again: try it also where there is a verdict for each data set already.
            teacher: by default the run's.
            student: whose score is to be beaten; by default the recipe's backbone before training.
        """
        from d2llm.models.student import Student
        from d2llm.models.teachers.judge import identify_judge
        from d2llm.training.gate import gate, read_gate
        from d2llm.training.sentences import verdict_words

        chosen = teacher or self.teacher
        if not again:
            known = read_gate(self.parts.path, identify_judge(chosen).fingerprint) or {}
            if all(open_source(data.path, splits=["dev"]).name in known for data in self.recipe.data):
                return self.skip(f"gate: the verdict on this teacher is in {self.parts.path}: {verdict_words(known)}")
        _remarks.info(
            "gate: the teacher against the cosine, on up to %d dev queries of each of %d data sets",
            self.recipe.gate.queries,
            len(self.recipe.data),
        )
        named = Student.load(student, device=self.device, dtype=self.dtype) if student is not None else None
        return gate(
            self.dev_data(),
            self.parts.path,
            teacher=chosen,
            student=named or self.untuned_cosine(),
            settings=self.recipe.gate,
            seed=self.recipe.seed,
            **self._computing,
        )

    def filter(self, closed: Sequence[str] | None = None) -> dict[str, dict[str, Any] | Skipped] | Skipped:
        """Mine again with the margin of the tuned teacher, where the recipe says so; counts by the data set's name.

        ``closed`` are data sets that the teacher may not teach; by default those whose gate is closed.
        """
        from d2llm.training.mining.plans import filter_plans

        return filter_plans(self, self.closed_gates() if closed is None else closed)

    def label(self) -> LabelReport:
        """Let the teacher judge every pair of the plans that is not labelled yet."""
        from d2llm.training.label import label
        from d2llm.training.sentences import label_words

        self.require_plans()
        self._name_the_teacher("label")
        report = label(self.parts.sources(self.recipe), self.parts.labels, teacher=self.teacher, **self._computing)
        _remarks.info("label: %s, in %s", label_words(report), self.parts.labels)
        return report

    def distill(
        self, *, variant: str | None = None, again: bool = False, for_stack: bool = False
    ) -> DistillReport | Skipped:
        """Train the student on the labels.

        Args:
            variant: train a changed student (``core.variants``) beside it.
            again: also where it is finished; that one is kept aside.
            for_stack: the cosine that a stack needs, from the plans before they are filtered.
        """
        from d2llm.training.distill import distill
        from d2llm.training.sentences import student_words, untrained_advice

        recipe, folder = self.recipe, self.parts.student
        if variant is not None:
            recipe, folder = find_variant(variant).apply(recipe), self.parts.variant(variant)
        if for_stack:
            folder = self.parts.cosine_of_stack(self.recipe)
        if again:
            self.put_aside("distill", folder)
        elif is_finished(folder):
            teacher = self._teacher_fingerprint() if recipe.losses.imitates else None
            self._notice_changes("distill", folder, shaping_settings(recipe), teacher, as_mined=for_stack)
            return self.skip(f"distill: {folder} is finished; --again makes it anew, keeping this one aside")
        self.require_plans()
        closed = self.closed_gates() if recipe.losses.imitates else []
        if recipe.losses.imitates and len(closed) < len(recipe.data):
            if not is_finished(self.parts.labels):
                raise InputError(
                    f"{self.parts.labels}: there are no labels yet; run the verb label with this recipe first"
                )
            self._name_the_teacher("distill")
        report = distill(
            self.parts.sources(self.recipe, as_mined=for_stack),
            folder,
            recipe=recipe,
            labels=self.parts.labels,
            teacher=self.teacher,
            closed_gates=closed,
            **self._computing,
        )
        _remarks.info("distill: %s", student_words(report))
        if report.is_untrained:
            _log.warning("%s", untrained_advice(report, recipe.training))
        return report

    def evaluate(
        self, settings: EvaluationSettings | None = None, *, with_teacher: bool = True
    ) -> dict[str, EvaluationReport]:
        """Measure the run's student on each of its data sets, beside BM25, cosines and the teacher.

        Indexes and measured rows are kept in the run folder, so an interrupted evaluation goes on.

        Args:
            settings: split and depths; the task is each data set's own.
            with_teacher: also measure the teacher, which takes longest.

        Raises:
            InputError: there is no student yet.
        """
        from d2llm.evaluation.evaluate import evaluate
        from d2llm.evaluation.loading import load_contenders
        from d2llm.evaluation.setting import EvaluationSettings

        if not is_finished(self.parts.student):
            raise InputError(f"{self.parts.student}: there is no student yet; distill makes it")
        contenders = load_contenders(
            self.parts.student,
            teacher=self.teacher if with_teacher else None,
            with_teacher=with_teacher,
            device=self.device,
            dtype=self.dtype,
        )
        chosen = settings or EvaluationSettings()
        labels = self.parts.labels if with_teacher and is_finished(self.parts.labels) else None
        reports: dict[str, EvaluationReport] = {}
        for data in self.recipe.data:
            dataset = open_data(data.path)
            reports[dataset.name] = evaluate(
                dataset,
                contenders,
                replace(chosen, task=data.task),
                work_folder=self.parts.path / "evaluation",
                labels=labels,
                show_progress=self.show_progress,
            )
        return reports

    # What the steps share --------------------------------------------------------------------------------------------

    @property
    def _computing(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype, "show_progress": self.show_progress}

    @property
    def teacher(self) -> TeacherConfig:
        """The recipe's where it is a stack, else the tuned teacher of the run, or the recipe's untuned."""
        named = self.recipe.teacher
        if named.stack_with_cosine and is_finished(self.parts.stack):
            return named.model_copy(update={"model": str(self.parts.stack), "kind": "stack", "new_head": False})
        if find_tuned_teacher(named.model) is not None and find_kind(named) == "stack":
            return named
        if is_finished(self.parts.teacher):
            return named.model_copy(update={"model": str(self.parts.teacher), "new_head": False})
        return named

    def untuned_cosine(self) -> Student:
        """The recipe's backbone with its own pooling."""
        from d2llm.models.student import Student
        from d2llm.retrieval.cosine import untuned_config

        return Student.create(untuned_config(self.recipe.student), device=self.device, dtype=self.dtype)

    def new_student(self) -> Student:
        """The recipe's student before any training."""
        from d2llm.models.student import Student

        return Student.create(self.recipe.student, device=self.device, dtype=self.dtype, seed=self.recipe.seed)

    def dev_data(self) -> list[tuple[Dataset | PairDataset, Task]]:
        """The data sets of the recipe with their dev split alone."""
        return [(open_data(data.path, splits=["dev"]), data.task) for data in self.recipe.data]

    def require_plans(self) -> None:
        """Make sure that every data set of the recipe has its plan.

        Raises:
            InputError: one has none.
        """
        for data in self.recipe.data:
            if not is_finished(self.parts.plan(data)):
                raise InputError(
                    f"{self.parts.plan(data)}: there is no training plan yet; run the verb mine with this recipe first"
                )

    def closed_gates(self) -> list[str]:
        """Data sets whose labels the student shall not learn, as ``gate.json`` and the recipe say.

        Raises:
            InputError: a gate is closed and the recipe says to stop then.
        """
        from d2llm.models.teachers.judge import identify_judge
        from d2llm.training.gate import read_gate

        gates = read_gate(self.parts.path, identify_judge(self.teacher).fingerprint)
        if gates is None:
            _log.warning("the teacher was not tried on dev (d2llm gate); its labels are used untried")
            return []
        closed = sorted(name for name, is_open in gates.items() if not is_open)
        if not closed or self.recipe.gate.when_closed == "teacher":
            return []
        if self.recipe.gate.when_closed == "stop":
            raise InputError(
                f"the teacher is not better than the cosine on {', '.join(closed)} (gate.json), and the recipe says to "
                "stop then (gate.when_closed); use a better teacher, or 'labels'"
            )
        _remarks.info("distill: the gate is closed for %s: trained on their own judgements", ", ".join(closed))
        return closed

    def put_aside(self, verb: str, folder: Path) -> None:
        """Rename what a step has made, and its checkpoints, so that nothing that took hours is lost."""
        places = (folder, folder.with_name(folder.name + ".run"))
        existing = [path for path in places if path.exists()]
        number = 1
        while any(_aside(path, folder, number).exists() for path in places):
            number += 1
        for path in existing:
            path.rename(_aside(path, folder, number))
        if existing:
            _remarks.info("%s: what was there is now in %s", verb, _aside(existing[0], folder, number))

    def put_filtered_aside(self, verb: str) -> None:
        """Rename what ``filter`` has made, before what it was made from is made anew."""
        for data in self.recipe.data:
            self.put_aside(verb, self.parts.filtered_plan(data))

    def skip(self, reason: str) -> Skipped:
        """Say why a step is not taken; that is its result."""
        _remarks.info("%s", reason)
        return Skipped(reason)

    def _teacher_fingerprint(self) -> str | None:
        """Of ``teacher``; None where it is not there to be looked at."""
        from d2llm.models.teachers.judge import identify_judge

        try:
            return identify_judge(self.teacher).fingerprint
        except ModelError:
            return None

    def _name_the_teacher(self, verb: str) -> None:
        named, in_recipe = self.teacher.model, self.recipe.teacher.model
        untuned = f"'{in_recipe}' as it is ({self.parts.teacher} is not there)"
        _remarks.info("%s: the teacher is %s", verb, untuned if named == in_recipe else named)

    def _notice_changes(
        self, verb: str, folder: Path, recipe: dict[str, Any], teacher: str | None = None, *, as_mined: bool = False
    ) -> None:
        """Warn if what is finished in ``folder`` was made from something else than would be now, and say from what.

        Args:
            verb: that makes it.
            folder: what is finished; its manifest says what it was made from, unless an earlier version wrote it.
            recipe: what of the recipe shapes it.
            teacher: fingerprint of the teacher that it would be made from; None where that does not matter.
            as_mined: it is made from the plans before a tuned teacher filters them. A plan that the run's teacher has
                filtered says nothing of those.
        """
        made_from = manifest_of(folder).get("settings", {})
        changes = changed_settings(made_from.get("recipe", {}), recipe)
        for data in self.recipe.data:
            place = self.parts.plan(data) if as_mined else self.parts.final_plan(self.recipe, data)
            plan = manifest_of(place) if is_finished(place) else {}
            if as_mined and "teacher" in plan and plan["teacher"] == self._teacher_fingerprint():
                continue
            name, content = plan.get("dataset"), plan.get("content_hash")
            if made_from.get("plans", {}).get(name, content) != content:
                changes.append(f"the plan of {name}")
        if teacher is not None and made_from.get("teacher", teacher) != teacher:
            changes.append("the teacher")
        if changes:
            _log.warning(
                "%s was made from something else than it would be now, and stays as it is: %s; %s with --again makes "
                "it anew and keeps this one aside",
                folder,
                ", ".join(changes),
                verb,
            )


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


def _aside(path: Path, folder: Path, number: int) -> Path:
    return path.with_name(f"{folder.name}.old-{number}{path.name.removeprefix(folder.name)}")
