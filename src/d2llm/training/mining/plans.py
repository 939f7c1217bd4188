"""The steps of a run that make training plans: mine, and filter with the tuned teacher."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from d2llm.core.progress import remarks
from d2llm.data.labels import LabelStore
from d2llm.data.open_data import open_data, open_source
from d2llm.data.pair_training import plan_of_pairs, read_pair_training_set, shared_pairs
from d2llm.data.pairs import PairDataset, PairSource
from d2llm.data.plan import read_plan, write_plan
from d2llm.data.run_folder import is_finished, manifest_of
from d2llm.evaluation.pool_scores import place_teacher
from d2llm.models.downloads import find_saved
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import identify_teacher, load_teacher, ranks_lists
from d2llm.recipe import DataConfig, MiningConfig
from d2llm.retrieval.reading import create_student, encoder_loads, load_student
from d2llm.runners.placement import Load, Placement, find_runner
from d2llm.runners.runner import Runner
from d2llm.training.mining.audit import audit_page
from d2llm.training.mining.mine import mine
from d2llm.training.mining.teacher import TeacherCheck, TeacherWorkers, score_texts
from d2llm.training.open_run import OpenRun, Skipped

_log = logging.getLogger(__name__)
_SPLIT = "train"
_CALLS_TOGETHER = 16  # calls to the teacher on a cluster, about 32 queries each: lost if the work is interrupted


def mine_plans(
    run: OpenRun,
    *,
    again: bool = False,
    student: str | None = None,
    before_tuning: bool = False,
    runner: str | Runner = "local",
) -> dict[str, dict[str, Any] | Skipped]:
    """See ``Run.mine``."""
    runner = find_runner(runner)
    mining = run.recipe.mining
    if student is not None:
        mining = mining.model_copy(update={"student": student})
    if again:
        run.put_filtered_aside("mine")
    has_untuned_head = run.teacher.needs_tuning and find_saved(run.teacher.model, "teachers") is None
    filters_later = run.recipe.filters_with_tuned_teacher and (before_tuning or has_untuned_head)
    all_finished = all(is_finished(run.folder.plan(data)) for data in run.recipe.data)
    if filters_later and not before_tuning and (again or not all_finished):
        remarks.info(
            "mine: the teacher's margin is not used, because the teacher's new head is not tuned yet; to use it, "
            "run tune-teacher, and then mine with --again"
        )
    used = _without_margin(mining) if filters_later else mining
    reports: dict[str, dict[str, Any] | Skipped] = {}
    miners: _Miners | None = None
    with ExitStack() as connection:
        for data in run.recipe.data:
            folder = run.folder.plan(data)
            if is_finished(folder) and not again:
                reports[folder.name] = run.skip(f"mine: {folder} is finished; --again rebuilds it")
                _compare_settings(run, data, folder, mining, remedy="mine with --again")
                continue
            miners = miners or _Miners.load(run, used, connection.enter_context(runner.connected()))
            reports[folder.name] = _mine_one(run, data, folder, used, miners, keeps_vectors=filters_later)
    return reports


def filter_plans(
    run: OpenRun, closed: Collection[str], *, runner: str | Runner = "local"
) -> dict[str, dict[str, Any] | Skipped] | Skipped:
    """See ``Run.filter``. The plans that the teacher was tuned on are kept; its scores are added to the labels."""
    runner = find_runner(runner)
    mining = run.recipe.mining
    if mining.teacher_margin is None:
        return run.skip("filter: the recipe has no teacher's margin (mining.teacher_margin)")
    if not run.recipe.filters_with_tuned_teacher:
        return run.skip("filter: mine has filtered already, because no teacher is tuned")
    reports: dict[str, dict[str, Any] | Skipped] = {}
    miners: _Miners | None = None
    teacher = identify_teacher(run.teacher).fingerprint
    with ExitStack() as connection:
        for data in run.recipe.data:
            mined, folder = run.folder.plan(data), run.folder.filtered_plan(data)
            name = folder.name
            source = open_source(data.path, splits=["dev"])
            if isinstance(source, PairSource):
                reports[name] = run.skip(f"filter: {name}: labelled pairs are not mined")
            elif source.name in closed:
                run.put_aside("filter", folder)
                reports[name] = run.skip(f"filter: {name}: the mined plan is used, because the gate is closed")
            elif manifest_of(mined).get("teacher") == teacher:
                reports[name] = run.skip(f"filter: {name}: {mined} was mined with this teacher's margin")
            elif is_finished(folder):
                reports[name] = run.skip(f"filter: {name}: {folder} is finished; run with --again filter rebuilds it")
                _compare_settings(run, data, folder, mining, remedy="run with --again filter", teacher=teacher)
            else:
                miners = miners or _Miners.load(run, mining, connection.enter_context(runner.connected()))
                reports[name] = _mine_one(run, data, folder, mining, miners, verb="filter")
            shutil.rmtree(run.folder.mining_work(data), ignore_errors=True)
    return reports


def _without_margin(mining: MiningConfig) -> MiningConfig:
    return mining.model_copy(update={"teacher_margin": None})


@dataclass(frozen=True)
class _Miners:
    """What mines: at most one of encoder and student, where they encode, and where the teacher scores for the margin.

    Encoder and student also score passages here. The teacher is loaded only where it scores.
    """

    encoder: Student | None
    student: Student | None
    placement: Placement
    teacher: TeacherWorkers | None

    @classmethod
    def load(cls, run: OpenRun, mining: MiningConfig, runner: Runner) -> _Miners:
        options = {"device": run.device, "dtype": run.dtype}
        encoder = student = None
        loads: Mapping[str, Load | None] = {}
        if "encoder" in mining.sources and mining.student is not None:
            load = partial(load_student, mining.student, **options)
            student = load()
            loads = encoder_loads(student, load)
        elif "encoder" in mining.sources:
            load = partial(create_student, run.recipe.student, **options, seed=run.recipe.seed)
            encoder = load()
            loads = encoder_loads(encoder, load)
        teacher = None if mining.teacher_margin is None else _teacher_workers(run, runner)
        return cls(encoder, student, Placement(runner, run.device, loads), teacher)


def _teacher_workers(run: OpenRun, runner: Runner) -> TeacherWorkers:
    """Where the run's teacher scores; a remote one is asked from here, as its endpoint sets the pace."""
    load = partial(load_teacher, run.teacher, device=run.device, dtype=run.dtype)
    teacher, placement = place_teacher(run.teacher, load, runner, device=run.device)
    num_together = 1 if placement.is_here(teacher) else _CALLS_TOGETHER
    return TeacherWorkers(partial(placement.workers, teacher, score_texts), num_together, ranks_lists(run.teacher))


def _mine_one(
    run: OpenRun,
    data: DataConfig,
    folder: Path,
    mining: MiningConfig,
    miners: _Miners,
    *,
    verb: str = "mine",
    keeps_vectors: bool = False,
) -> dict[str, Any]:
    dataset = open_data(data.path)
    if isinstance(dataset, PairDataset):
        return _plan_pairs(run, data, folder, mining, dataset)
    held_out = [split for split in ("dev", "test") if split in dataset.qrels]
    teacher = None
    if mining.teacher_margin is not None:
        identity = identify_teacher(run.teacher)
        prompt = identity.prompts[data.task]
        labels = LabelStore(run.folder.labels, teacher=identity.fingerprint, prompt=prompt, dataset=dataset.name)
        teacher = TeacherCheck(labels, miners.teacher, data.task, mining.teacher_margin, dataset.passages)
    work = run.folder.mining_work(data)
    with nullcontext() if teacher is None else teacher.answers.used():
        result = mine(
            dataset,
            _SPLIT,
            mining,
            encoder=miners.encoder,
            student=miners.student,
            teacher=teacher,
            task=data.task,
            seed=run.recipe.seed,
            max_queries=data.max_queries,
            exclude_passages_of=held_out if data.exclude_shared_passages else (),
            work=work,
            placement=miners.placement,
        )
        report = result.report
        content = {"dataset": dataset.name, "split": _SPLIT, "settings": _settings(run, data, mining), "report": report}
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
    own_passages = str(dataset.own_passages.counts(entry.query_id for entry in result.entries))
    remarks.info(
        f"{verb}: {report['num_entries']:,} queries of {dataset.name} with {report['num_hard_negatives']:,} hard and "
        f"{report['num_easy_negatives']:,} easy negatives, {dropped:,} dropped as likely positives, in {folder}; "
        f"read its audit.md{f' ({own_passages})' if own_passages else ''}"
    )
    return report


def _plan_pairs(
    run: OpenRun, data: DataConfig, folder: Path, mining: MiningConfig, pairs: PairDataset
) -> dict[str, Any]:
    """Make the plan of a set of labelled pairs: the judged pairs, without a search."""
    training_set = read_pair_training_set(pairs)
    shared = shared_pairs(training_set, _SPLIT) if data.exclude_shared_passages else set[tuple[str, str]]()
    entries = plan_of_pairs(
        training_set,
        _SPLIT,
        leave_out=shared,
        seed=run.recipe.seed,
        max_queries=data.max_queries,
    )
    report = {
        "dataset": pairs.name,
        "split": _SPLIT,
        "num_entries": len(entries),
        "num_pairs": sum(len(entry.targets) for entry in entries),
        "num_repeated_pairs": training_set.num_repeated,
        "num_shared_pairs": len(shared),
        "issues": list(training_set.dataset.issues),
    }
    content = {"dataset": pairs.name, "split": _SPLIT, "settings": _settings(run, data, mining), "report": report}
    write_plan(folder, entries, content)
    remarks.info(f"mine: {report['num_pairs']:,} labelled pairs of {pairs.name}, without a search, in {folder}")
    return report


def _settings(run: OpenRun, data: DataConfig, mining: MiningConfig) -> dict[str, Any]:
    """The settings of a recipe that affect a plan."""
    return {
        "seed": run.recipe.seed,
        "mining": mining.model_dump(mode="json"),
        "backbone": run.recipe.student.backbone.model,
        "max_queries": data.max_queries,
        "exclude_shared_passages": data.exclude_shared_passages,
    }


def _compare_settings(
    run: OpenRun, data: DataConfig, folder: Path, mining: MiningConfig, *, remedy: str, teacher: str | None = None
) -> None:
    """Warn if a plan was made with other settings, or with another teacher than ``teacher``."""
    manifest = read_plan(folder).manifest
    made_with = manifest.get("settings")
    if made_with is None:
        return
    if teacher is None and made_with["mining"]["teacher_margin"] is None and run.recipe.filters_with_tuned_teacher:
        mining = _without_margin(mining)
    changed = [name for name, value in _settings(run, data, mining).items() if made_with.get(name) != value]
    if teacher is not None and manifest.get("teacher") != teacher:
        changed.append("teacher")
    if changed:
        _log.warning(
            "%s was made with settings that differ from the recipe (%s), and is kept; %s rebuilds it",
            folder,
            ", ".join(changed),
            remedy,
        )
