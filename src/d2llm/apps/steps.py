"""The steps from a plan to a student, as the command line takes them: what is finished is skipped, and said so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2llm.core.errors import InputError
from d2llm.core.recipe import TeacherConfig
from d2llm.core.recipe_file import shaping_settings, tuning_settings
from d2llm.core.variants import find_variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from d2llm.core.types import Task
    from d2llm.data.beir import Dataset
    from d2llm.data.pairs import PairDataset
    from d2llm.pipeline.stack_teachers import StackReport

from d2llm.apps.job import Job, manifest_of, notice_changes, put_aside, require_plans, skip
from d2llm.pipeline.run_folder import is_finished


def look_at_the_teacher(job: Job, *, again: bool = False) -> Any:
    """Before tuning: how the untuned teacher does on a few dev queries; a hopeless one is warned of."""
    from d2llm.apps.teach_tables import look_sentence
    from d2llm.models.teacher_identity import find_tuned_teacher
    from d2llm.pipeline.gate import LOOK_QUERIES, first_look

    recipe, folder = job.recipe, job.run.teacher
    if recipe.teacher_tuning.epochs == 0:
        return skip(job, "first-look: the teacher is not tuned, so the gate tries it as it is")
    if recipe.teacher.new_head and find_tuned_teacher(recipe.teacher.model) is None:
        return skip(job, "first-look: the teacher has a new head, which says nothing before it is tuned")
    if not again and (is_finished(folder) or folder.with_name(folder.name + ".run").exists()):
        return skip(job, "first-look: the teacher's tuning has begun or is finished; the gate tries what it gives")
    job.session.say(
        f"first-look: the untuned teacher beside the cosine, on {LOOK_QUERIES} dev queries of each of "
        f"{len(recipe.data)} data sets"
    )
    found = first_look(
        dev_data(job),
        job.run.path,
        teacher=recipe.teacher,
        student=job.untuned_cosine(),
        settings=recipe.gate,
        seed=recipe.seed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    if found.difference < 0:
        job.session.complain("warning", look_sentence(found))
    else:
        job.session.say(look_sentence(found))
    return found


def tune_the_teacher(job: Job, *, again: bool = False) -> Any:
    """Tune the recipe's teacher on the plans."""
    from d2llm.pipeline.tune_teacher import tune_teacher

    recipe, folder = job.recipe, job.run.teacher
    if recipe.teacher_tuning.epochs == 0:
        return skip(job, "tune-teacher: the recipe takes the teacher as it is (teacher_tuning.epochs is 0)")
    if again:
        put_aside(job, "tune-teacher", folder)
    elif is_finished(folder):
        settings = tuning_settings(recipe.teacher, recipe.teacher_tuning, recipe.seed)
        notice_changes(job, "tune-teacher", folder, settings, as_mined=True)
        return skip(job, f"tune-teacher: {folder} is finished; --again tunes anew, keeping this one aside")
    require_plans(job)
    job.session.say(f"tune-teacher: '{recipe.teacher.model}' learns to answer yes or no on the plans")
    report = tune_teacher(
        job.run.sources(job.recipe, as_mined=True),
        job.run.teacher,
        teacher=job.recipe.teacher,
        tuning=job.recipe.teacher_tuning,
        seed=job.recipe.seed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    job.session.say(f"tune-teacher: {report.pairs:,} pairs, final loss {report.loss:.3f}, in {job.run.teacher}")
    for data in recipe.data:
        filtered = job.run.filtered_plan(data)
        if is_finished(filtered) and manifest_of(filtered).get("teacher") != report.fingerprint:
            job.session.complain(
                "warning",
                f"{filtered} was filtered with another teacher and stays as it is; run with --again filter, or mine "
                "with --again, filters with this one",
            )
    return report


def stack_with_cosine(job: Job, *, again: bool = False, cosine_again: bool = False) -> Any:
    """Where the recipe says so, make one teacher of the run's and the tuned cosine, which is trained first."""
    if not job.recipe.teacher.stack_with_cosine:
        return skip(job, "stack: the recipe's teacher teaches alone")
    if again:
        put_aside(job, "stack", job.run.stack)
    elif is_finished(job.run.stack):
        return skip(job, f"stack: {job.run.stack} is finished; delete it to fit it anew")
    distill_student(job, variant="cosine", again=cosine_again, for_stack=True)
    cosine = TeacherConfig(model=str(job.run.cosine_of_stack(job.recipe)), kind="cosine")
    gate = job.recipe.gate
    return stack(job, [job.teacher, cosine], num_queries=gate.queries, depth=gate.depth)


def stack(job: Job, members: Sequence[TeacherConfig], *, num_queries: int, depth: int) -> StackReport:
    """Make one calibrated teacher of several, on the dev queries of the recipe's retrieval sets."""
    from d2llm.data.beir import Dataset
    from d2llm.pipeline.stack_teachers import stack_teachers

    report = stack_teachers(
        [(dataset, task) for dataset, task in dev_data(job) if isinstance(dataset, Dataset)],
        job.run.stack,
        members=members,
        student=job.untuned_cosine(),
        num_queries=num_queries,
        depth=depth,
        seed=job.recipe.seed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    job.session.say(f"stack: the teacher is in {report.folder}")
    return report


def try_the_teacher(
    job: Job, *, again: bool = True, teacher: TeacherConfig | None = None, student: str | None = None
) -> Any:
    """Teacher against cosine on the dev queries and pairs of the recipe's data sets; verdicts go to ``gate.json``.

    Args:
        job: recipe and run folder.
        again: try it also where there is a verdict for each data set already.
        teacher: by default the run's.
        student: whose score is to be beaten; by default the recipe's backbone before training.
    """
    from d2llm.apps.teach_tables import verdict_words
    from d2llm.data.open_data import open_source
    from d2llm.models.judge import identify_judge
    from d2llm.models.student import Student
    from d2llm.pipeline.gate import gate, read_gate

    tried = teacher or job.teacher
    if not again:
        known = read_gate(job.run.path, identify_judge(tried).fingerprint) or {}
        if all(open_source(data.path, splits=["dev"]).name in known for data in job.recipe.data):
            return skip(job, f"gate: the verdict on this teacher is in {job.run.path}: {verdict_words(known)}")
    job.session.say(
        f"gate: the teacher against the cosine, on up to {job.recipe.gate.queries} dev queries of each of "
        f"{len(job.recipe.data)} data sets"
    )
    named = Student.load(student, device=job.device, dtype=job.dtype) if student is not None else None
    return gate(
        dev_data(job),
        job.run.path,
        teacher=tried,
        student=named or job.untuned_cosine(),
        settings=job.recipe.gate,
        seed=job.recipe.seed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )


def dev_data(job: Job) -> list[tuple[Dataset | PairDataset, Task]]:
    """The data sets of a recipe with their dev split alone."""
    from d2llm.data.open_data import open_data

    return [(open_data(data.path, splits=["dev"]), data.task) for data in job.recipe.data]


def label_pairs(job: Job) -> Any:
    """Let the teacher judge every pair of the plans."""
    from d2llm.apps.teach_tables import label_words
    from d2llm.pipeline.label import label

    require_plans(job)
    _say_teacher(job, "label")
    report = label(
        job.run.sources(job.recipe),
        job.run.labels,
        teacher=job.teacher,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    job.session.say(f"label: {label_words(report)}, in {job.run.labels}")
    return report


def distill_student(job: Job, *, variant: str | None = None, again: bool = False, for_stack: bool = False) -> Any:
    """Train the student, or a variant of it, on the labels; ``for_stack``: the cosine that a stack needs."""
    from d2llm.apps.teach_tables import student_words
    from d2llm.pipeline.distill import distill

    recipe, folder = job.recipe, job.run.student
    if variant is not None:
        recipe, folder = find_variant(variant).apply(recipe), job.run.variant(variant)
    if for_stack:
        folder = job.run.cosine_of_stack(job.recipe)
    if again:
        put_aside(job, "distill", folder)
    elif is_finished(folder):
        teacher = job.teacher_fingerprint() if recipe.losses.imitates else None
        notice_changes(job, "distill", folder, shaping_settings(recipe), teacher, as_mined=for_stack)
        return skip(job, f"distill: {folder} is finished; --again makes it anew, keeping this one aside")
    require_plans(job)
    closed = closed_gates(job) if recipe.losses.imitates else []
    if recipe.losses.imitates and len(closed) < len(recipe.data):
        if not is_finished(job.run.labels):
            raise InputError(f"{job.run.labels}: there are no labels yet; run the verb label with this recipe first")
        _say_teacher(job, "distill")
    report = distill(
        job.run.sources(job.recipe, as_mined=for_stack),
        folder,
        recipe=recipe,
        labels=job.run.labels,
        teacher=job.teacher,
        closed_gates=closed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    job.session.say(f"distill: {student_words(report)}")
    if report.is_untrained:
        from d2llm.apps.teach_tables import untrained_advice

        job.session.complain("warning", untrained_advice(report, recipe.training))
    return report


def closed_gates(job: Job) -> list[str]:
    """Data sets whose labels the student shall not learn, as ``gate.json`` and the recipe say.

    Raises:
        InputError: a gate is closed and the recipe says to stop then.
    """
    from d2llm.models.judge import identify_judge
    from d2llm.pipeline.gate import read_gate

    gates = read_gate(job.run.path, identify_judge(job.teacher).fingerprint)
    if gates is None:
        job.session.complain("warning", "the teacher was not tried on dev (d2llm gate); its labels are used untried")
        return []
    closed = sorted(name for name, is_open in gates.items() if not is_open)
    if not closed or job.recipe.gate.when_closed == "teacher":
        return []
    if job.recipe.gate.when_closed == "stop":
        raise InputError(
            f"the teacher is not better than the cosine on {', '.join(closed)} (gate.json), and the recipe says to "
            "stop then (gate.when_closed); use a better teacher, or 'labels'"
        )
    job.session.say(f"distill: the gate is closed for {', '.join(closed)}: trained on their own judgements")
    return closed


def _say_teacher(job: Job, verb: str) -> None:
    named, asked = job.teacher.model, job.recipe.teacher.model
    untuned = f"'{asked}' as it is ({job.run.teacher} is not there)"
    job.session.say(f"{verb}: the teacher is {untuned if named == asked else named}")
