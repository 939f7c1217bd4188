"""A run: a recipe and its folder, from data sets to a trained and evaluated student.

    run = Run("d2llm-small", "runs/first", data=["../data"])
    run.finish()

runs every step that is not finished, so the same call continues after an interruption. Each step can also be run alone,
and ``evaluate`` and ``ablate``, which ``finish`` does not run. ``again`` repeats a step and keeps the earlier result
aside. Results made with other settings than the recipe's are kept, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, get_args

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of, strings_of
from d2llm.core.progress import remarks, showing_progress
from d2llm.core.settings import shows
from d2llm.core.types import RunStep
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data, open_source
from d2llm.data.run_folder import (
    changed_student,
    changed_teacher,
    is_finished,
    manifest_of,
    working_folder,
)
from d2llm.models.downloads import find_saved
from d2llm.recipe import CosineTeacherConfig, Recipe, TeacherConfig
from d2llm.recipe.recipe import load_recipe
from d2llm.recipe.variants import find_variant
from d2llm.training.open_run import OpenRun, Skipped
from d2llm.training.settings import AblationSettings

if TYPE_CHECKING:  # each step imports what it needs, so that errors in a recipe are reported before torch is loaded
    from d2llm.evaluation.report import EvaluationReport
    from d2llm.evaluation.settings import EvaluationSettings
    from d2llm.runners.runner import Runner
    from d2llm.training.ablation_report import AblationReport
    from d2llm.training.alternate import Round
    from d2llm.training.distill import DistillReport
    from d2llm.training.ensemble_teachers import EnsembleReport
    from d2llm.training.gate import GateReport, Precheck
    from d2llm.training.label import LabelReport
    from d2llm.training.tune_teacher import TeacherTuningReport

_log = logging.getLogger(__name__)


_P = ParamSpec("_P")
_Result = TypeVar("_Result")


def _shows_progress(step: Callable[Concatenate[Run, _P], _Result]) -> Callable[Concatenate[Run, _P], _Result]:
    """Show the progress of a step if the run says so."""

    @wraps(step)
    def shown(run: Run, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
        with showing_progress(run.show_progress):
            return step(run, *args, **kwargs)

    return shown


class Run(OpenRun):
    """Trains a student from a recipe, step by step, in a run folder. ``finish`` runs all steps.

    Progress messages go to the logger ``d2llm.remarks``. ``recipe`` has the paths of the data sets on this machine,
    ``folder`` is the layout of its folder.

    Example:
        >>> from d2llm import Recipe, Run
        >>> run = Run(Recipe(name="mine", data=[{"path": "DATA"}]), "runs/mine")
        >>> run
        Run(runs/mine, recipe mine, 1 data set)
        >>> run.finish()  # takes minutes to hours  # doctest: +SKIP
    """

    def finish(
        self,
        *,
        again: RunStep | None = None,
        after: Callable[[str, object], None] | None = None,
        runner: str | Runner = "local",
    ) -> dict[str, Any]:
        """Run every step that is not finished, in order; returns the result of each step by its name.

        Args:
            again: repeat this step and those after it, except labels, which are stored by teacher and pair.
            after: called with the name and the result of each step.
            runner: where mine, ensemble, gate, filter and label encode texts and score pairs: in this process
                (``local``), or on a Ray cluster (``ray``, ``ray:ADDRESS``, or a ``RayRunner``). All training is in this
                process, and a remote teacher is asked from it.
        """
        from d2llm.models.teachers.pair_teacher import asks_endpoint
        from d2llm.runners.placement import find_runner
        from d2llm.training.checkpoints import require_trackers
        from d2llm.training.recipe_inputs import check_asked, check_models

        runner = find_runner(runner)
        check_models(self.recipe)
        check_asked(self.recipe, self.teacher)
        require_trackers(self.recipe)
        order: tuple[str, ...] = get_args(RunStep)
        repeated: tuple[str, ...] = order[order.index(again) :] if again else ()
        results: dict[str, Any] = {}

        def keep(step: str, result: object) -> None:
            results[step] = result
            if after is not None:
                after(step, result)

        if "filter" in repeated:
            self.put_filtered_aside("filter")  # first, so that an interruption leaves no plan of the earlier teacher
        keep("mine", self.mine(again="mine" in repeated, before_tuning=True, runner=runner))
        if self.recipe.losses.imitates:
            keep("precheck", self.precheck(again="tune-teacher" in repeated))
            keep("tune-teacher", self.tune_teacher(again="tune-teacher" in repeated))
            ensemble = self.ensemble_with_cosine(
                again="ensemble" in repeated, cosine_again="mine" in repeated, runner=runner
            )
            keep("ensemble", ensemble)
            keep("gate", self.gate(again="gate" in repeated, runner=runner))
            closed = self.closed_gates()
            keep("filter", self.filter(closed, runner=runner))
            if len(closed) < len(self.recipe.data):
                labelled = self.label(runner="local" if asks_endpoint(self.teacher) else runner)
                keep("label", labelled)
                if labelled.ended_by is not None:
                    raise InputError(
                        f"{labelled.unfinished_pairs:,} pairs have no label yet, because {labelled.ended_by} was "
                        "reached: run again to go on, raise the limit, or lower data.max_labelled"
                    )
            else:
                keep("label", self.skip("label: the gate is closed for every data set, so there is nothing to label"))
        else:
            remarks.info("run: no loss of the recipe imitates a teacher, so no teacher is tuned, tested or used")
        keep("distill", self.distill(again="distill" in repeated))
        return results

    @_shows_progress
    def mine(
        self,
        *,
        again: bool = False,
        student: str | None = None,
        before_tuning: bool = False,
        runner: str | Runner = "local",
    ) -> dict[str, dict[str, Any] | Skipped]:
        """Make the training plan of each data set; returns its counts by the data set's name.

        Args:
            again: repeat finished plans too; their filtered versions are put aside.
            student: folder or name of a student to rank with, instead of the recipe's.
            before_tuning: if the recipe tunes the teacher first, leave the teacher's margin to ``filter``.
            runner: where texts are encoded and the teacher scores (``finish``). The plans are the same.
        """
        from d2llm.training.mining.plans import mine_plans

        return mine_plans(self, again=again, student=student, before_tuning=before_tuning, runner=runner)

    @_shows_progress
    def precheck(self, *, again: bool = False) -> Precheck | Skipped:
        """Compare the untuned teacher with the cosine on a few dev queries; warns if the teacher is worse."""
        from d2llm.training.gate import PRECHECK_QUERIES, precheck
        from d2llm.training.sentences import describe_precheck

        recipe, folder = self.recipe, self.folder.teacher
        if not recipe.tunes_teacher:
            return self.skip("precheck: the teacher is not tuned, so the gate tests it as it is")
        if recipe.teacher.needs_tuning and find_saved(recipe.teacher.model, "teachers") is None:
            return self.skip("precheck: the teacher has a new head, which must be tuned before it can be tested")
        if not again and (is_finished(folder) or working_folder(folder).exists()):
            return self.skip("precheck: the teacher's tuning has begun or is finished; the gate tests its result")
        remarks.info(
            "precheck: comparing the untuned teacher with the cosine on %d dev queries of each data set",
            PRECHECK_QUERIES,
        )
        look = precheck(
            self.dev_data(),
            self.folder.path,
            teacher=recipe.teacher,
            student=self.untuned_cosine(),
            settings=recipe.gate,
            seed=recipe.seed,
            **self._computing,
        )
        (_log.warning if look.difference < 0 else remarks.info)("%s", describe_precheck(look))
        return look

    @_shows_progress
    def tune_teacher(self, *, again: bool = False) -> TeacherTuningReport | Skipped:
        """Tune the recipe's teacher on the plans."""
        from d2llm.training.tune_teacher import tune_teacher

        recipe, folder = self.recipe, self.folder.teacher
        if not recipe.teacher.can_be_tuned:
            return self.skip(
                f"tune-teacher: '{recipe.teacher.model}' has no local weights to tune and teaches as it is"
            )
        if not recipe.tunes_teacher:
            return self.skip("tune-teacher: the recipe takes the teacher as it is (teacher_tuning.epochs is 0)")
        if again:
            self.put_aside("tune-teacher", folder)
        elif is_finished(folder):
            self._warn_of_changes("tune-teacher", folder, changed_teacher(folder, recipe), as_mined=True)
            return self.skip(f"tune-teacher: {folder} is finished; --again tunes a new one, keeping this one aside")
        self.require_plans()
        remarks.info("tune-teacher: training '%s' to answer yes or no, on the plans", recipe.teacher.model)
        report = tune_teacher(
            self.folder.sources(recipe, as_mined=True),
            folder,
            teacher=recipe.teacher,
            tuning=recipe.teacher_tuning,
            seed=recipe.seed,
            **self._computing,
        )
        remarks.info("tune-teacher: %s pairs, final loss %.3f, in %s", f"{report.pairs:,}", report.loss, folder)
        for data in recipe.data:
            filtered = self.folder.filtered_plan(data)
            if is_finished(filtered) and manifest_of(filtered).get("teacher") != report.fingerprint:
                _log.warning(
                    "%s was filtered with another teacher and is kept; to filter with this one, use run with --again "
                    "filter, or mine with --again",
                    filtered,
                )
        return report

    def ensemble_with_cosine(
        self, *, again: bool = False, cosine_again: bool = False, runner: str | Runner = "local"
    ) -> EnsembleReport | Skipped:
        """If the recipe says so, train the cosine student and combine the run's teacher with it.

        ``again`` repeats it if it is finished; ``cosine_again`` also trains the cosine student again; ``runner`` is
        that of ``ensemble``.
        """
        if not self.recipe.teacher.ensemble_with_cosine:
            return self.skip("ensemble: the recipe's teacher is not combined with a cosine student")
        if again:
            self.put_aside("ensemble", self.folder.ensemble)
        elif is_finished(self.folder.ensemble):
            return self.skip(
                f"ensemble: {self.folder.ensemble} is finished; --again ensemble moves it aside and fits a new one"
            )
        self.distill(variant="cosine", again=cosine_again, for_ensemble=True)
        cosine = CosineTeacherConfig(model=str(self.folder.cosine_of_ensemble(self.recipe)))
        return self.ensemble([self.teacher, cosine], runner=runner)

    @_shows_progress
    def ensemble(
        self,
        members: Sequence[TeacherConfig] | TeacherConfig,
        *,
        num_queries: int | None = None,
        depth: int | None = None,
        runner: str | Runner = "local",
    ) -> EnsembleReport:
        """Combine several teachers into one calibrated teacher, on the dev queries of the recipe's retrieval sets.

        Args:
            members: the teachers; a single one is only calibrated.
            num_queries: number of queries per data set; by default the gate's.
            depth: number of candidates per query from BM25, and as many from the untuned cosine student; by
                default the gate's.
            runner: where the corpus is encoded and the members score (``finish``).
        """
        from d2llm.runners.placement import find_runner
        from d2llm.training.ensemble_teachers import ensemble_teachers

        settings = self.recipe.gate
        cosine_student, load = self._untuned_cosine_and_load()
        report = ensemble_teachers(
            [(dataset, task) for dataset, task in self.dev_data() if isinstance(dataset, Dataset)],
            self.folder.ensemble,
            members=objects_of(members, "members", TeacherConfig),
            student=cosine_student,
            num_queries=num_queries or settings.queries,
            depth=depth or settings.depth,
            seed=self.recipe.seed,
            runner=find_runner(runner),
            load_student=load,
            **self._computing,
        )
        remarks.info("ensemble: the teacher is in %s", report.folder)
        return report

    @_shows_progress
    def gate(
        self,
        *,
        again: bool = True,
        teacher: TeacherConfig | None = None,
        student: str | None = None,
        runner: str | Runner = "local",
    ) -> GateReport | Skipped:
        """Test teacher against cosine on the dev sets of the recipe, and write the verdicts to ``gate.json``.

        Args:
            again: repeat the test if there is already a verdict for each data set.
            teacher: by default the run's.
            student: the student to beat; by default the recipe's backbone before training.
            runner: where the corpus is encoded and the teacher scores (``finish``).
        """
        from d2llm.models.teachers.pair_teacher import identify_teacher
        from d2llm.retrieval.reading import load_student
        from d2llm.runners.placement import find_runner
        from d2llm.training.gate import gate, read_gate
        from d2llm.training.sentences import describe_gates

        chosen = teacher or self.teacher
        if not again:
            known = read_gate(self.folder.path, identify_teacher(chosen).fingerprint) or {}
            if all(open_source(data.path, splits=["dev"]).name in known for data in self.recipe.data):
                return self.skip(f"gate: the verdict on this teacher is in {self.folder.path}: {describe_gates(known)}")
        remarks.info(
            "gate: testing the teacher against the cosine, on up to %d dev queries of each data set",
            self.recipe.gate.queries,
        )
        if student is None:
            to_beat, load = self._untuned_cosine_and_load()
        else:
            load = partial(load_student, student, **self._computing)
            to_beat = load()
        return gate(
            self.dev_data(),
            self.folder.path,
            teacher=chosen,
            student=to_beat,
            settings=self.recipe.gate,
            seed=self.recipe.seed,
            runner=find_runner(runner),
            load_student=load,
            **self._computing,
        )

    @_shows_progress
    def filter(
        self, closed: Sequence[str] | str | None = None, *, runner: str | Runner = "local"
    ) -> dict[str, dict[str, Any] | Skipped] | Skipped:
        """If the recipe says so, mine again with the tuned teacher's margin; returns counts by the data set's name.

        ``closed`` are data sets whose labels from the teacher are not used, and whose negatives are not filtered
        either; by default those whose gate is closed. ``runner`` is that of ``mine``.
        """
        from d2llm.training.mining.plans import filter_plans

        names = self.closed_gates() if closed is None else strings_of(closed, "closed")
        return filter_plans(self, names, runner=runner)

    @_shows_progress
    def label(self, *, runner: str | Runner = "local") -> LabelReport:
        """Let the teacher score every pair of the plans that has no label yet; ``runner`` says where (``label``).

        Warns if no loss of the recipe imitates a teacher: ``finish`` does not label then, but variants may
        (``ablate``), and another teacher may learn from the labels.
        """
        from d2llm.training.label import label
        from d2llm.training.sentences import describe_labels

        if not self.recipe.losses.imitates:
            _log.warning(
                "label: no loss of the recipe imitates a teacher, so the student learns nothing from labels; to use "
                "them, set one's weight, such as losses.list_imitation = 0.5"
            )
        self.require_plans()
        self._name_the_teacher("label")
        report = label(
            self.folder.sources(self.recipe),
            self.folder.labels,
            teacher=self.teacher,
            settings=self.recipe.labelling,
            runner=runner,
            **self._computing,
        )
        remarks.info("label: %s, in %s", describe_labels(report), self.folder.labels)
        return report

    @_shows_progress
    def distill(
        self, *, variant: str | None = None, again: bool = False, for_ensemble: bool = False
    ) -> DistillReport | Skipped:
        """Train the student on the labels.

        Args:
            variant: train this variant (``recipe.variants``), whose folder is beside the student's.
            again: repeat it if it is finished; the earlier student is kept aside.
            for_ensemble: train the cosine student for an ensemble, on the plans before they are filtered.
        """
        from d2llm.training.distill import distill
        from d2llm.training.sentences import describe_distillation, untrained_advice

        recipe, folder = self.recipe, self.folder.student
        if variant is not None:
            recipe, folder = find_variant(variant).apply(recipe), self.folder.variant(variant)
        if for_ensemble:
            folder = self.folder.cosine_of_ensemble(self.recipe)
        if again:
            self.put_aside("distill", folder)
        elif is_finished(folder):
            teacher = self._teacher_fingerprint() if recipe.losses.imitates else None
            self._warn_of_changes("distill", folder, changed_student(folder, recipe), teacher, as_mined=for_ensemble)
            return self.skip(f"distill: {folder} is finished; --again trains a new one, keeping this one aside")
        self.require_plans()
        closed = self.closed_gates() if recipe.losses.imitates else []
        if recipe.losses.imitates and len(closed) < len(recipe.data):
            if not is_finished(self.folder.labels):
                raise InputError(
                    f"{self.folder.labels}: there are no labels yet; run `d2llm label` with this recipe first"
                )
            self._name_the_teacher("distill")
        report = distill(
            self.folder.sources(self.recipe, as_mined=for_ensemble),
            folder,
            recipe=recipe,
            labels=self.folder.labels,
            teacher=self.teacher,
            closed_gates=closed,
            **self._computing,
        )
        remarks.info("distill: %s", describe_distillation(report))
        if report.is_untrained:
            _log.warning("%s", untrained_advice(report, recipe.training))
        return report

    @_shows_progress
    def alternate(
        self, rounds: int = 3, *, beside: Sequence[Recipe | str] | Recipe | str = (), continue_teachers: bool = False
    ) -> list[Round]:
        """Let student and teacher teach each other on the plans' pairs, without judgements (``training.alternate``).

        The students are in ``round-<number>/student`` of the run's folder, and with recipes ``beside``, whose students
        and teachers take part, in ``round-<number>/<name>/student``. Finished rounds are kept. ``continue_teachers``:
        tune the teachers of the round before, instead of the recipes'.
        """
        recipes = objects_of(beside, "beside", (Recipe, str))
        others = [recipe if isinstance(recipe, Recipe) else load_recipe(recipe) for recipe in recipes]
        from d2llm.training.alternate import alternate

        self.mine(before_tuning=True)
        sources = self.folder.sources(self.recipe, as_mined=True)
        return alternate(
            sources,
            self.folder.path,
            recipes=[self.recipe, *others],
            rounds=rounds,
            continue_teachers=continue_teachers,
            **self._computing,
        )

    @_shows_progress
    def evaluate(
        self,
        settings: EvaluationSettings | None = None,
        *,
        with_teacher: bool = True,
        runner: str | Runner = "local",
    ) -> dict[str, EvaluationReport]:
        """Compare the run's student with BM25, cosines and the teacher, on each of its data sets.

        Indexes and measured rows are kept in the run folder, so an interrupted evaluation can continue.

        Args:
            settings: split, depths and so on; the task is that of each data set.
            with_teacher: also measure the teacher, which takes longest.
            runner: where corpora are encoded and the teacher scores (``evaluation.evaluate``).

        Raises:
            InputError: there is no student yet.
        """
        from d2llm.evaluation.contenders import load_contenders
        from d2llm.evaluation.evaluate import evaluate
        from d2llm.evaluation.settings import EvaluationSettings

        if not is_finished(self.folder.student):
            raise InputError(f"{self.folder.student}: there is no student yet; run `d2llm distill` first")
        contenders = load_contenders(
            self.folder.student,
            teacher=self.teacher if with_teacher else None,
            with_teacher=with_teacher,
            device=self.device,
            dtype=self.dtype,
        )
        chosen = EvaluationSettings.of(settings)
        labels = self.folder.labels if with_teacher and is_finished(self.folder.labels) else None
        reports: dict[str, EvaluationReport] = {}
        for data in self.recipe.data:
            dataset = open_data(data.path)
            reports[dataset.name] = evaluate(
                dataset,
                contenders,
                chosen.replace(task=data.task),
                work_folder=self.folder.path / "evaluation",
                labels=labels,
                runner=runner,
                device=self.device,
            )
        return reports

    @shows(AblationSettings)
    @_shows_progress
    def ablate(self, settings: AblationSettings | None = None, **changes: Any) -> AblationReport:
        """Train the recipe and its variants on the plans and labels, and compare them (``training.ablate``).

        Args:
            settings: what to train, and for how long; with ``halving``, the report is that of the last round.
            changes: single fields of the settings, as in ``run.ablate(variants=["cosine"], num_seeds=1)``.
        """
        chosen = AblationSettings.of(settings, **changes)
        for name in chosen.variants or ():
            find_variant(name)  # fails before data and labels are read
        from d2llm.training.ablate import ablate, halve

        self.require_plans()
        measure = partial(
            ablate,
            self.folder.sources(self.recipe),
            self.folder.path / "ablation",
            chosen,
            recipe=self.recipe,
            labels=self.folder.labels,
            teacher=self.teacher,
            closed_gates=self.closed_gates() if self.recipe.losses.imitates else [],
            **self._computing,
        )
        if chosen.halving:
            return halve(measure, chosen.variants, chosen.epochs or 1, chosen.budget_minutes)
        return measure()
