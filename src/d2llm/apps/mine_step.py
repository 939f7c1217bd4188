"""The steps from data sets to training plans, as the command line takes them: mine, and filter with the teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.recipe import DataConfig, MiningConfig, TeacherConfig
from d2llm.data.plan import read_plan, write_plan

if TYPE_CHECKING:
    from collections.abc import Collection

    from d2llm.data.beir import Dataset
    from d2llm.data.pairs import PairDataset
    from d2llm.models.judge import Judge
    from d2llm.models.student import Student
    from d2llm.pipeline.mining.teacher import TeacherCheck

from d2llm.apps.job import Job, manifest_of, put_aside, skip
from d2llm.pipeline.run_folder import is_finished

_SPLIT = "train"


def mine_plans(
    job: Job, *, again: bool = False, student: str | None = None, before_tuning: bool = False
) -> dict[str, Any]:
    """Make the plan of each data set; its counts by the data set's name.

    Args:
        job: recipe and run folder.
        again: make also those that are there; what was filtered of them before is put aside.
        student: ranks in place of the recipe's.
        before_tuning: leave the teacher's margin to ``filter_plans`` where the recipe has the teacher tuned first.
    """
    if student is not None:
        mining = job.recipe.mining.model_copy(update={"student": student})
        job = replace(job, recipe=job.recipe.model_copy(update={"mining": mining}))
    if again:
        put_filtered_aside(job, "mine")
    filters_later = before_tuning and job.recipe.filters_with_tuned_teacher
    if not before_tuning and job.recipe.filters_with_tuned_teacher and _has_untuned_head(job.teacher):
        filters_later = True
        if again or not all(is_finished(job.run.plan(data)) for data in job.recipe.data):
            job.session.say(
                "mine: without the teacher's margin, as its head is new: tune-teacher, and then mine with --again, "
                "filters"
            )
    asked = _without_margin(job) if filters_later else job
    reports: dict[str, Any] = {}
    miners: _Miners | None = None
    for data in job.recipe.data:
        folder = job.run.plan(data)
        if is_finished(folder) and not again:
            reports[folder.name] = skip(job, f"mine: {folder} is finished; --again makes it anew")
            _compare_settings(job, data, folder, remedy="mine with --again")
            continue
        miners = miners or _Miners.load(asked)
        reports[folder.name] = _mine_one(asked, data, folder, miners, keeps_vectors=filters_later)
    return reports


def filter_plans(job: Job, closed: Collection[str]) -> dict[str, Any]:
    """Mine again with the margin of the tuned teacher, which a run can only now; counts by the data set's name.

    The plans that the teacher was tuned on stay. What it says goes to the run's labels.

    Args:
        job: recipe and run folder.
        closed: data sets that the teacher may not teach; what it says of their negatives does not count either.
    """
    from d2llm.data.open_data import open_source
    from d2llm.data.pairs import PairSource
    from d2llm.models.judge import identify_judge

    if job.recipe.mining.teacher_margin is None:
        return skip(job, "filter: the recipe has no teacher's margin (mining.teacher_margin)")
    if not job.recipe.filters_with_tuned_teacher:
        return skip(job, "filter: mine has filtered already, as no teacher is tuned or stored labels alone count")
    reports: dict[str, Any] = {}
    miners: _Miners | None = None
    teacher = identify_judge(job.teacher).fingerprint
    for data in job.recipe.data:
        mined, folder = job.run.plan(data), job.run.filtered_plan(data)
        name = folder.name
        source = open_source(data.path, splits=["dev"])
        if isinstance(source, PairSource):
            reports[name] = skip(job, f"filter: {name}: labelled pairs, of which none is mined")
        elif source.name in closed:
            put_aside(job, "filter", folder)
            reports[name] = skip(job, f"filter: {name}: stays as it was mined, as its gate is closed")
        elif manifest_of(mined).get("teacher") == teacher:
            reports[name] = skip(job, f"filter: {name}: {mined} was mined with this teacher's margin")
        elif is_finished(folder):
            reports[name] = skip(job, f"filter: {name}: {folder} is finished; run with --again filter makes it anew")
            _compare_settings(job, data, folder, remedy="run with --again filter", teacher=teacher)
        else:
            miners = miners or _Miners.load(job)
            reports[name] = _mine_one(job, data, folder, miners, verb="filter")
        shutil.rmtree(job.run.mining_work(data), ignore_errors=True)
    return reports


def put_filtered_aside(job: Job, verb: str) -> None:
    """Rename what ``filter_plans`` has made, before what it was made from is made anew."""
    for data in job.recipe.data:
        put_aside(job, verb, job.run.filtered_plan(data))


def _has_untuned_head(teacher: TeacherConfig) -> bool:
    from d2llm.models.teacher_identity import find_tuned_teacher

    return teacher.new_head and find_tuned_teacher(teacher.model) is None


def _without_margin(job: Job) -> Job:
    mining = job.recipe.mining.model_copy(update={"teacher_margin": None})
    return replace(job, recipe=job.recipe.model_copy(update={"mining": mining}))


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
        student = None if mining.student is None else Student.load(mining.student, device=job.device, dtype=job.dtype)
        ranks = "encoder" in mining.sources
        return cls(
            encoder=job.new_student() if ranks and student is None else None,
            student=student if ranks else None,
            judge=load_judge(job.teacher, **place) if asks else None,
        )


def _mine_one(
    job: Job, data: DataConfig, folder: Path, miners: _Miners, *, verb: str = "mine", keeps_vectors: bool = False
) -> dict[str, Any]:
    from d2llm.data.open_data import open_data
    from d2llm.data.pairs import PairDataset
    from d2llm.pipeline.mine import mine
    from d2llm.pipeline.mining.audit_page import audit_page

    dataset = open_data(data.path)
    if isinstance(dataset, PairDataset):
        return _plan_pairs(job, data, folder, dataset)
    held_out = [split for split in ("dev", "test") if split in dataset.qrels]
    teacher = _teacher_check(job, data, dataset, miners.judge)
    work = job.run.mining_work(data)
    result = mine(
        dataset,
        _SPLIT,
        job.recipe.mining,
        encoder=miners.encoder,
        student=miners.student,
        teacher=teacher,
        task=data.task,
        seed=job.recipe.seed,
        max_queries=data.max_queries,
        exclude_passages_of=held_out if data.exclude_shared_passages else (),
        work=work,
        show_progress=job.session.show_progress,
    )
    report = result.report
    content = {"dataset": dataset.name, "split": _SPLIT, "settings": _settings(job, data), "report": report}
    if teacher is not None:
        content["teacher"] = teacher.labels.teacher
    audit = {
        "audit.json": (json.dumps(result.audit, indent=1, ensure_ascii=False) + "\n").encode(),
        "audit.md": audit_page(report, result.audit).encode(),
    }
    write_plan(folder, result.entries, content, documents=audit)
    if not keeps_vectors:
        shutil.rmtree(work, ignore_errors=True)
    dropped = sum(report["num_dropped"].values())
    job.session.say(
        f"{verb}: {report['num_entries']:,} queries of {dataset.name} with {report['num_hard_negatives']:,} hard and "
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


def _compare_settings(job: Job, data: DataConfig, folder: Path, *, remedy: str, teacher: str | None = None) -> None:
    """Warn of a plan that the recipe, or ``teacher``, would make otherwise now."""
    manifest = read_plan(folder).manifest
    made_with = manifest.get("settings")
    if made_with is None:
        return
    # A plan of an earlier version names its settings as they were called then, and knows fewer.
    mining = MiningConfig.model_validate(made_with["mining"])
    made_with = made_with | {"mining": mining.model_dump(mode="json")}
    without_margin = teacher is None and mining.teacher_margin is None and job.recipe.filters_with_tuned_teacher
    wanted = _settings(_without_margin(job) if without_margin else job, data)
    changed = [name for name, value in wanted.items() if made_with.get(name) != value]
    if teacher is not None and manifest.get("teacher") != teacher:
        changed.append("teacher")
    if changed:
        job.session.complain(
            "warning",
            f"{folder} was made with other settings than the recipe's now ({', '.join(changed)}) and stays as it is; "
            f"{remedy} makes it anew",
        )
