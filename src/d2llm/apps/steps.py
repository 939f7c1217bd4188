"""The steps from a recipe to a student, as the command line runs them: what is finished is skipped, and said so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.errors import InputError
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.recipe import DataConfig, MiningConfig, Recipe, TeacherConfig
from d2llm.core.recipe_file import load_recipe
from d2llm.core.variants import find_variant
from d2llm.data.plan import read_plan, write_plan
from d2llm.pipeline.run_folder import RunFolder, check_data

if TYPE_CHECKING:
    from d2llm.apps.session import Session
    from d2llm.core.types import Task
    from d2llm.data.beir import Dataset
    from d2llm.data.pairs import PairDataset
    from d2llm.models.judge import Judge
    from d2llm.models.student import Student
    from d2llm.pipeline.mining.teacher import TeacherCheck

_SPLIT = "train"


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
        if find_tuned_teacher(asked.model) is not None and find_kind(asked) == "stack":
            return asked
        if _is_finished(self.run.teacher):
            return self.recipe.teacher.model_copy(update={"model": str(self.run.teacher)})
        return self.recipe.teacher

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
) -> Job:
    """The job that the arguments of a verb describe; ``out`` is ``runs/<name of the recipe>`` unless given.

    Raises:
        RecipeError: no such recipe, or its data sets cannot be told apart.
        InputError: ``data`` names a set that the recipe does not have.
    """
    recipe = with_data(load_recipe(recipe_name), data or [])
    check_data(recipe)
    name = Path(recipe_name).stem if recipe.name == "unnamed" else recipe.name
    return Job(recipe, RunFolder(out or Path("runs") / name), device=device, dtype=dtype, session=session)


def with_data(recipe: Recipe, places: Sequence[str]) -> Recipe:
    """The recipe with other folders for its data sets; ``places`` are "name=folder", a name being the last part of a
    path in the recipe.

    Raises:
        InputError: no "=", or no data set of that name.
    """
    data = {Path(item.path).name: item for item in recipe.data}
    for place in places:
        name, equals, folder = place.partition("=")
        if not equals or not folder or name not in data:
            raise InputError(
                f"--data {place}: write NAME=FOLDER, where NAME is one of the recipe's data sets: {', '.join(data)}"
            )
        data[name] = data[name].model_copy(update={"path": folder})
    return recipe.model_copy(update={"data": tuple(data.values())}) if places else recipe


def mine_plans(job: Job, *, again: bool = False, student: str | None = None) -> dict[str, Any]:
    """Make the plan of each data set; its counts by the data set's name. ``student`` ranks in place of the recipe's."""
    if student is not None:
        mining = job.recipe.mining.model_copy(update={"student": student})
        job = replace(job, recipe=job.recipe.model_copy(update={"mining": mining}))
    reports: dict[str, Any] = {}
    miners: _Miners | None = None
    for data in job.recipe.data:
        folder = job.run.plan(data)
        if _is_finished(folder) and not again:
            reports[folder.name] = _skip(job, f"mine: {folder} is finished; --again makes it anew")
            _compare_settings(job, data, folder)
            continue
        miners = miners or _Miners.load(job)
        reports[folder.name] = _mine_one(job, data, folder, miners)
    return reports


def tune_the_teacher(job: Job) -> Any:
    """Tune the recipe's teacher on the plans."""
    from d2llm.pipeline.tune_teacher import tune_teacher

    if _is_finished(job.run.teacher):
        return _skip(job, f"tune-teacher: {job.run.teacher} is finished; delete it to tune anew")
    require_plans(job)
    report = tune_teacher(
        job.run.sources(job.recipe),
        job.run.teacher,
        teacher=job.recipe.teacher,
        tuning=job.recipe.teacher_tuning,
        seed=job.recipe.seed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    job.session.say(f"tune-teacher: {report.pairs:,} pairs, final loss {report.loss:.3f}, in {job.run.teacher}")
    return report


def try_the_teacher(
    job: Job, *, again: bool = True, teacher: TeacherConfig | None = None, student: str | None = None
) -> Any:
    """Teacher against cosine on the dev queries of the recipe's retrieval sets; the verdicts go to ``gate.json``.

    Args:
        job: recipe and run folder.
        again: try it also where there is a verdict already.
        teacher: by default the run's.
        student: whose score is to be beaten; by default the recipe's backbone before training.
    """
    from d2llm.models.judge import identify_judge
    from d2llm.models.student import Student
    from d2llm.pipeline.cosine import untuned_config
    from d2llm.pipeline.gate import gate, read_gate

    tried = teacher or job.teacher
    if not again and read_gate(job.run.path, identify_judge(tried).fingerprint) is not None:
        return _skip(job, f"gate: the verdict on this teacher is in {job.run.path}")
    judged = dev_data(job)
    if not judged:
        return _skip(
            job, "gate: no retrieval set in the recipe; labelled pairs weigh the teacher by losses.teacher_share"
        )
    if student is not None:
        rival = Student.load(student, device=job.device, dtype=job.dtype)
    else:
        rival = Student.create(untuned_config(job.recipe.student), device=job.device, dtype=job.dtype)
    return gate(
        judged,
        job.run.path,
        teacher=tried,
        student=rival,
        settings=job.recipe.gate,
        seed=job.recipe.seed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )


def dev_data(job: Job) -> list[tuple[Dataset, Task]]:
    """The retrieval sets of a recipe with their dev judgements alone."""
    from d2llm.data.beir import Dataset
    from d2llm.data.open_data import open_data

    sets: list[tuple[Dataset, Task]] = []
    for data in job.recipe.data:
        found = open_data(data.path, splits=["dev"])
        if isinstance(found, Dataset):
            sets.append((found, data.task))
    return sets


def label_pairs(job: Job) -> Any:
    """Let the teacher judge every pair of the plans."""
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
    job.session.say(f"label: {report.pairs:,} pairs of {report.queries:,} queries labelled, in {job.run.labels}")
    return report


def distill_student(job: Job, *, variant: str | None = None, again: bool = False) -> Any:
    """Train the student, or a variant of it, on the labels."""
    from d2llm.pipeline.distill import distill

    recipe, folder = job.recipe, job.run.student
    if variant is not None:
        recipe, folder = find_variant(variant).apply(recipe), job.run.variant(variant)
    if _is_finished(folder):
        if not again:
            return _skip(job, f"distill: {folder} is finished; --again makes it anew, keeping this one aside")
        _put_aside(job, folder)
    require_plans(job)
    closed = closed_gates(job) if recipe.losses.imitates else []
    if recipe.losses.imitates and len(closed) < len(recipe.data):
        if not _is_finished(job.run.labels):
            raise InputError(f"{job.run.labels}: there are no labels yet; run the verb label with this recipe first")
        _say_teacher(job, "distill")
    report = distill(
        job.run.sources(job.recipe),
        folder,
        recipe=recipe,
        labels=job.run.labels,
        teacher=job.teacher,
        closed_gates=closed,
        device=job.device,
        dtype=job.dtype,
        show_progress=job.session.show_progress,
    )
    job.session.say(f"distill: {report.steps:,} steps, best at {report.best_step:,}, in {folder}")
    return report


@dataclass(frozen=True)
class _Miners:
    """The models that choose negatives: at most one of encoder and student, and the teacher of the margin."""

    encoder: Student | None
    student: Student | None
    judge: Judge | None

    @classmethod
    def load(cls, job: Job) -> _Miners:
        from d2llm.models.judge import load_judge
        from d2llm.models.student import Student

        mining, place = job.recipe.mining, {"device": job.device, "dtype": job.dtype}
        asks = mining.teacher_margin is not None and mining.teacher_labels == "judge"
        student = None if mining.student is None else Student.load(mining.student, **place)
        ranks = "encoder" in mining.sources
        return cls(
            encoder=job.new_student() if ranks and student is None else None,
            student=student if ranks else None,
            judge=load_judge(job.teacher, **place) if asks else None,
        )


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


def _mine_one(job: Job, data: DataConfig, folder: Path, miners: _Miners) -> dict[str, Any]:
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset
    from d2llm.pipeline.mine import mine
    from d2llm.pipeline.mining.audit_page import audit_page

    dataset = open_data(data.path)
    if isinstance(dataset, PairDataset):
        return _plan_pairs(job, data, folder, dataset)
    held_out = [split for split in ("dev", "test") if split in dataset.qrels]
    work = folder.parent / f".{folder.name}.mining"  # what an interrupted run leaves for the next
    result = mine(
        dataset,
        _SPLIT,
        job.recipe.mining,
        encoder=miners.encoder,
        student=miners.student,
        teacher=_teacher_check(job, data, dataset, miners.judge),
        task=data.task,
        seed=job.recipe.seed,
        max_queries=data.max_queries,
        exclude_passages_of=held_out if data.exclude_shared_passages else (),
        work=work,
        show_progress=job.session.show_progress,
    )
    report = result.report
    content = {"dataset": dataset.name, "split": _SPLIT, "settings": _settings(job, data), "report": report}
    audit = {
        "audit.json": (json.dumps(result.audit, indent=1, ensure_ascii=False) + "\n").encode(),
        "audit.md": audit_page(report, result.audit).encode(),
    }
    write_plan(folder, result.entries, content, documents=audit)
    shutil.rmtree(work, ignore_errors=True)
    dropped = sum(report["num_dropped"].values())
    job.session.say(
        f"mine: {report['num_entries']:,} queries of {dataset.name} with {report['num_hard_negatives']:,} hard and "
        f"{report['num_easy_negatives']:,} easy negatives, {dropped:,} dropped as likely positives, in {folder}; "
        "read its audit.md"
    )
    return report


def _plan_pairs(job: Job, data: DataConfig, folder: Path, pairs: PairDataset) -> dict[str, Any]:
    """Labelled pairs need no search: what was judged is the plan."""
    from d2llm.data.pair_training import plan_of_pairs, read_pair_training_set

    found = read_pair_training_set(pairs)
    entries = plan_of_pairs(
        found, _SPLIT, num_easy=job.recipe.mining.num_easy, seed=job.recipe.seed, max_queries=data.max_queries
    )
    report = {
        "dataset": pairs.name,
        "split": _SPLIT,
        "num_entries": len(entries),
        "num_pairs": sum(len(entry.targets) for entry in entries),
        "num_repeated_pairs": found.num_repeated,
        "issues": list(found.dataset.issues),
    }
    content = {"dataset": pairs.name, "split": _SPLIT, "settings": _settings(job, data), "report": report}
    write_plan(folder, entries, content)
    job.session.say(f"mine: {report['num_pairs']:,} labelled pairs of {pairs.name}, nothing to search, in {folder}")
    return report


def _teacher_check(job: Job, data: DataConfig, dataset: Dataset, judge: Judge | None) -> TeacherCheck | None:
    margin = job.recipe.mining.teacher_margin
    if margin is None:
        return None
    from d2llm.data.labels import LabelStore
    from d2llm.models.judge import identify_judge
    from d2llm.pipeline.mining.teacher import TeacherCheck

    identity = identify_judge(job.teacher)
    prompt = identity.prompts[data.task]
    labels = LabelStore(job.run.labels, teacher=identity.fingerprint, prompt=prompt, dataset=dataset.name)
    return TeacherCheck(labels, judge, data.task, margin, dataset.passages)


def _settings(job: Job, data: DataConfig) -> dict[str, Any]:
    """All of a recipe that shapes a plan."""
    return {
        "seed": job.recipe.seed,
        "mining": job.recipe.mining.model_dump(mode="json"),
        "backbone": job.recipe.student.backbone.model,
        "max_queries": data.max_queries,
        "exclude_shared_passages": data.exclude_shared_passages,
    }


def _compare_settings(job: Job, data: DataConfig, folder: Path) -> None:
    made_with = read_plan(folder).manifest.get("settings")
    if made_with is None:
        return
    # A plan of an earlier version names its settings as they were called then, and knows fewer.
    made_with = made_with | {"mining": MiningConfig.model_validate(made_with["mining"]).model_dump(mode="json")}
    changed = [name for name, value in _settings(job, data).items() if made_with.get(name) != value]
    if changed:
        job.session.complain(
            "warning",
            f"{folder} was made with other settings than the recipe's now ({', '.join(changed)}) and stays as it is; "
            "mine with --again makes it anew",
        )


def require_plans(job: Job) -> None:
    """Make sure that every data set of the recipe has its plan.

    Raises:
        InputError: one has none.
    """
    for data in job.recipe.data:
        if not _is_finished(job.run.plan(data)):
            raise InputError(
                f"{job.run.plan(data)}: there is no training plan yet; run the verb mine with this recipe first"
            )


def _say_teacher(job: Job, verb: str) -> None:
    tuned = _is_finished(job.run.teacher)
    named = f"{job.run.teacher}" if tuned else f"'{job.recipe.teacher.model}' as it is ({job.run.teacher} is not there)"
    job.session.say(f"{verb}: the teacher is {named}")


def _put_aside(job: Job, student: Path) -> None:
    """Rename a finished student and its checkpoints, so that nothing that took hours is lost."""
    number = 1
    while (aside := student.with_name(f"{student.name}.old-{number}")).exists():
        number += 1
    student.rename(aside)
    checkpoints = student.with_name(student.name + ".run")
    if checkpoints.is_dir():
        checkpoints.rename(aside.with_name(aside.name + ".run"))
    job.session.say(f"distill: the earlier student is now in {aside}")


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _skip(job: Job, reason: str) -> dict[str, str]:
    job.session.say(reason)
    return {"skipped": reason}
