"""The step from data sets to training plans, as the command line takes it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.recipe import DataConfig, MiningConfig
from d2llm.data.plan import read_plan, write_plan

if TYPE_CHECKING:
    from d2llm.data.beir import Dataset
    from d2llm.data.pairs import PairDataset
    from d2llm.models.judge import Judge
    from d2llm.models.student import Student
    from d2llm.pipeline.mining.teacher import TeacherCheck

from d2llm.apps.job import Job, is_finished, skip

_SPLIT = "train"


def mine_plans(job: Job, *, again: bool = False, student: str | None = None) -> dict[str, Any]:
    """Make the plan of each data set; its counts by the data set's name. ``student`` ranks in place of the recipe's."""
    if student is not None:
        mining = job.recipe.mining.model_copy(update={"student": student})
        job = replace(job, recipe=job.recipe.model_copy(update={"mining": mining}))
    reports: dict[str, Any] = {}
    miners: _Miners | None = None
    for data in job.recipe.data:
        folder = job.run.plan(data)
        if is_finished(folder) and not again:
            reports[folder.name] = skip(job, f"mine: {folder} is finished; --again makes it anew")
            _compare_settings(job, data, folder)
            continue
        miners = miners or _Miners.load(job)
        reports[folder.name] = _mine_one(job, data, folder, miners)
    return reports


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
