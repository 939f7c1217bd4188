"""The verb ``distill``: trains a student on the teacher's scores."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of, strings_of
from d2llm.core.progress import remarks, showing_progress
from d2llm.core.types import TASKS, Task
from d2llm.data.collation import LabelledSource, batches_per_epoch
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingSource, check_sources
from d2llm.data.run_folder import require_unfinished, working_folder
from d2llm.models.student import Student
from d2llm.models.student_files import KIND
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.ops.clusters import nearest_centres
from d2llm.recipe import (
    Recipe,
    TeacherConfig,
    TeacherIdentity,
    shaping_student_settings,
)
from d2llm.recipe.recipe import changed_settings
from d2llm.store.bm25 import bm25_lists
from d2llm.training.dev_sets import make_dev_set
from d2llm.training.label import TeacherOnDemand
from d2llm.training.losses import OFFSET, Preparation
from d2llm.training.pretrain import PretrainingReport, pretrain_backbone, unlabelled_texts
from d2llm.training.processes import ALONE, Processes, joined_processes, own_device
from d2llm.training.recipe_inputs import check_asked
from d2llm.training.score_features import fit_beside, score_features_at_start, with_score_features
from d2llm.training.training_loop import DistillRun


def complement_words(labelled: LabelledSource, depth: int) -> LabelledSource:
    """The same queries, whose hard negatives and positives are what BM25 gets wrong among its first ``depth`` passages.

    Hard negatives that BM25 does not have there become easy ones. Positives are drawn from those that it does not have
    there; a query of which it has all, and labelled pairs, keep theirs.

    Source: Wrzalik and Krechel, "CoRT: Complementary Rankings from Transformers", NAACL 2021 (arXiv 2010.10252), whose
    negatives come from BM25's ranking. Here they are also negatives of the plan, which the teacher has scored, and the
    losses are the recipe's (the paper's: ``angular_margin``). That positives which BM25 misses come first is an
    addition.

    Raises:
        InputError: the plan has hard negatives, but BM25 has none of them among its first.
    """
    source, entries = labelled.source, labelled.entries
    if source.pairs is not None or not entries:
        return labelled
    dataset = source.dataset
    queries = [dataset.queries[entry.query_id] for entry in entries]
    lists = bm25_lists(dataset.passages, sorted(dataset.passages), queries, depth, title=f"BM25 of {dataset.name}")
    chosen = [_complementing(entry, set(first)) for entry, first in zip(entries, lists, strict=True)]
    num_hard, num_kept = (sum(len(entry.hard_negatives) for entry in group) for group in (entries, chosen))
    if num_hard and not num_kept:
        raise InputError(
            f"training.complement_words: none of the hard negatives of '{dataset.name}' is among BM25's first {depth}; "
            "mine them with BM25 as a source, or set a larger number"
        )
    remarks.info(
        "%s: BM25 has %d of %d hard negatives among its first %d, and misses positives of %d of %d queries",
        dataset.name,
        num_kept,
        num_hard,
        depth,
        sum(bool(entry.preferred) for entry in chosen),
        len(entries),
    )
    return replace(labelled, entries=tuple(chosen))


def _complementing(entry: PlanEntry, first: set[str]) -> PlanEntry:
    hard = tuple(passage_id for passage_id in entry.hard_negatives if passage_id in first)
    others = tuple(passage_id for passage_id in entry.hard_negatives if passage_id not in first)
    missed = tuple(passage_id for passage_id in entry.positives if passage_id not in first)
    return replace(entry, hard_negatives=hard, easy_negatives=entry.easy_negatives + others, preferred=missed)


_log = logging.getLogger(__name__)
_PASSAGES_FOR_EACH_DIMENSION = 10
_NO_TEACHER = TeacherIdentity("none", dict.fromkeys(TASKS, "none"))


@dataclass(frozen=True, slots=True)
class DistillReport:
    """The result of a distillation.

    ``dev`` has, by data set, the dev measure at the start, at the last evaluation, and of the kept state (also by
    weight r), and the number of queries or pairs. ``fraction_kept`` is the fraction of the change from the start that
    was kept (``training.choose_weights``). ``label_weight``: with two heads, the weight of the one that learnt the data
    sets' judgements. ``is_untrained``: no state was better on dev than the start, so the start was
    written. ``score_features`` has, for each task, the weights of the score features beside the vectors, and its gain
    on dev.
    ``probabilities`` has, for each task with enough dev queries, the function that turns scores into probabilities.
    """

    folder: str
    fingerprint: str
    steps: int
    best_step: int
    stopped_early: bool
    queries: int
    unlabelled_queries: int
    interaction_weights: dict[Task, float]
    fraction_kept: float
    is_untrained: bool
    dev: dict[str, dict[str, Any]]
    seconds: float = 0.0
    score_features: dict[Task, dict[str, Any]] = field(default_factory=dict[Task, dict[str, Any]])
    probabilities: dict[Task, dict[str, Any]] = field(default_factory=dict[Task, dict[str, Any]])
    label_weight: float | None = None


def distill(
    sources: Sequence[TrainingSource],
    folder: str | Path,
    *,
    recipe: Recipe,
    labels: str | Path,
    teacher: TeacherConfig,
    closed_gates: Collection[str] = (),
    device: str | None = None,
    dtype: str | None = None,
) -> DistillReport:
    """Train a student on a teacher's labels and write it to ``folder``; an interrupted run continues where it stopped.

    The student starts as its backbone's own cosine (in the default configuration), after ``training.pretraining`` if
    the recipe has it, or as ``training.start``. It is evaluated on dev before the first step and then regularly. The
    best state is kept, with the weight r of the interaction that has the best dev result for each task, which may be 0.
    The student is therefore never worse on dev than the start. At the end, its scores are calibrated as probabilities,
    on the same number of dev queries (``training.fit_probabilities``).

    If every imitation loss has weight 0, neither teacher nor labels are needed: the student is trained on the data
    sets' own judgements, as a tuned cosine with an interaction.

    With a time limit (``core.time_limit``) the loop over the training queries ends early enough for the rest. If that
    takes longer than planned, the interaction and the token embeddings are trained for less, or not at all.

    Under ``torchrun`` or ``accelerate launch``, the processes share the texts of each batch; the result is that of one
    process, up to rounding. Only the first process evaluates and writes; all of them need access to the folder.

    Args:
        sources: data sets with their plans; each needs judged dev queries.
        folder: where to write the student; ``<folder>.run`` beside it has the checkpoint, the best state and the log.
        recipe: student, losses, training and seed.
        labels: the label store that ``label`` wrote.
        teacher: the teacher whose labels to use.
        closed_gates: data sets on which the teacher did not beat the cosine (``training.gate``); the student is trained
            on their own judgements.
        device: where to compute; by default the best device available.
        dtype: number format; by default the fastest on that device.

    Raises:
        InputError: ``folder`` holds a finished student or foreign files, two data sets cannot be distinguished (see
            ``check_sources``), there are no labels or dev queries, or the checkpoint is from another run.
        LabelMismatchError: the store has only labels of another teacher or prompt.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
        OutOfTimeError: the time limit has passed before the student was written; the same call continues.

    Example:
        ``Run.distill`` calls it with the data, plans and labels of a run.

        >>> from d2llm import Run, distill
        >>> run = Run("d2llm")  # doctest: +SKIP
        >>> distill(sources, "student", recipe=run.recipe, labels="labels", teacher=run.teacher)  # doctest: +SKIP
    """
    folder, labels, started = Path(folder), Path(labels), time.monotonic()
    sources, closed_gates = objects_of(sources, "sources", TrainingSource), strings_of(closed_gates, "closed_gates")
    require_unfinished(folder, KIND)
    check_sources(sources)
    identity = identify_teacher(teacher) if recipe.losses.imitates else _NO_TEACHER
    check_asked(recipe, teacher)
    labelled = _join_all(sources, labels, identity, closed_gates, recipe)
    training = recipe.training
    dev_sets = [
        make_dev_set(source, num_queries=training.dev_queries, num_passages=training.dev_passages, seed=recipe.seed)
        for source in sources
    ]
    run_folder = working_folder(folder)
    student = _starting_student(recipe, device=own_device(device), dtype=dtype)
    started_from = student.fingerprint if training.start is not None else None
    with joined_processes() as processes, showing_progress(None if processes.is_first else False):
        start_tokens, start_score_features = student.token_projection, student.score_features
        preparation = Preparation(recipe, student, labelled, processes, device, dtype)
        objective = recipe.losses.root.values()
        for loss in objective:
            loss.check_student(student, has_lists=bool(preparation.with_lists))
        if training.start is None:
            list(pretrain_in_stages(student, sources, recipe, run_folder, processes))
            _fit_pooling(student, sources, recipe, processes)
        if recipe.score_features.in_training:
            score_features, start_tokens = score_features_at_start(student, sources, recipe, run_folder, processes)
            labelled, dev_sets = with_score_features(labelled, dev_sets, score_features)
        if training.complement_words is not None:
            labelled = [complement_words(source, training.complement_words) for source in labelled]
        preparation.sources[:] = _clustered(labelled, student, recipe, processes)
        inputs: dict[str, Any] = {}
        for loss in objective:
            inputs |= loss.prepare(preparation)
        labelled = preparation.sources
        tuned, checkpointed = recipe.student.backbone.tuning.kind != "frozen", training.gradient_checkpointing
        student.prepare_training(backbone=tuned, gradient_checkpointing=checkpointed, seed=recipe.seed)
        if any(source.token_weight for source in labelled):
            assert start_tokens is not None
            student.token_projection = start_tokens.to(student.backbone.device)
        settings = _run_settings(recipe, labelled, identity, started_from) | inputs
        ask_teacher = TeacherOnDemand(teacher, recipe.labelling, device=device, dtype=dtype)
        run = DistillRun(student, recipe, labelled, dev_sets, settings, run_folder, processes, ask_teacher)
        stopped_early = run.train()
        run.finish_student()
        report = _report(run, folder, labelled, stopped_early)
        if processes.is_first:
            fit_beside(run, sources, tokens=start_tokens, score_features=start_score_features)
            report = _write(run, folder, report, identity.fingerprint, closed_gates)
        return processes.from_first(replace(report, seconds=time.monotonic() - started))  # once the student is written


def _join_all(
    sources: Sequence[TrainingSource],
    labels: Path,
    identity: TeacherIdentity,
    closed_gates: Collection[str],
    recipe: Recipe,
) -> list[LabelledSource]:
    """The data sets with their labels, those with a closed gate without the teacher's."""
    _check_instructions(sources, recipe)
    labelled = [
        _join(source, labels, _NO_TEACHER if source.dataset.name in closed_gates else identity, recipe)
        for source in sources
    ]
    if not any(source.entries for source in labelled):
        raise InputError(f"{labels}: no query of the plans has all its labels; finish `d2llm label` first")
    return labelled


def _clustered(
    labelled: Sequence[LabelledSource], student: Student, recipe: Recipe, processes: Processes
) -> list[LabelledSource]:
    """The data sets with a cluster for each query, by its vector and that of its first positive, if the recipe says so.

    Morris and Rush, "Contextual Document Embeddings", ICLR 2025 (arXiv 2410.02525), section 4.1.
    """
    if not recipe.training.clustered:
        return [*labelled]
    clusters: list[dict[str, int]] = []
    for source in labelled if processes.is_first else ():
        ids = [entry.query_id for entry in source.entries]
        texts = source.source.instructed_queries(ids, student.config.backbone.query_prefix)
        queries = student.encode_queries(texts, instruction="").vectors
        positives = [source.source.passage_text((*entry.positives, *entry.passage_ids)[0]) for entry in source.entries]
        vectors = np.hstack([queries, student.encode_passages(positives).vectors])
        num_clusters = batches_per_epoch([source], recipe.training.batch_queries)
        found = nearest_centres(vectors, num_clusters, seed=recipe.seed).tolist() if ids else []
        clusters.append(dict(zip(ids, found, strict=True)))
    shared = processes.from_first(clusters)
    return [replace(source, clusters=found) for source, found in zip(labelled, shared, strict=True)]


def _starting_student(recipe: Recipe, *, device: Any, dtype: str | None) -> Student:
    """The student before the first step: the pretrained backbone with an untrained head, or ``training.start``."""
    start = recipe.training.start
    if start is None:
        return Student.create(recipe.student, device=device, dtype=dtype, seed=recipe.seed)
    student = Student.load(start, device=device, dtype=dtype)
    wanted = recipe.student
    if wanted.backbone.tuning.kind == "frozen":  # whatever tuned it: the backbone stays as it is
        backbone = wanted.backbone.model_copy(update={"tuning": student.config.backbone.tuning})
        wanted = wanted.model_copy(update={"backbone": backbone})
    student.add_missing_parts(wanted, seed=recipe.seed)
    has, needs = (shaping_student_settings(config.model_dump(mode="json")) for config in (student.config, wanted))
    if differences := changed_settings(has, needs):
        raise InputError(
            f"training.start: '{start}' has other settings than [student]: {', '.join(differences)}; copy its settings "
            "(config in its manifest.json) or start from the backbone"
        )
    return student


def _check_instructions(sources: Sequence[TrainingSource], recipe: Recipe) -> None:
    """Refuse queries with an instruction of their own where tokens count, as ``Recipe`` does one of a data set."""
    for source in sources if recipe.score_features.in_training else ():
        if any(query.instruction is not None for query in source.dataset.queries.values()):
            raise InputError(
                f"queries of {source.dataset.name} have an instruction, with tokens that a search compares with none, "
                "but score_features.in_training compares all: delete the instructions, or set in_training to false"
            )


def pretrain_in_stages(
    student: Student,
    sources: Sequence[TrainingSource],
    recipe: Recipe,
    run_folder: Path,
    processes: Processes = ALONE,
) -> Iterator[PretrainingReport]:
    """Train the backbone of a new student on texts without labels, stage by stage, in place.

    What each stage has trained is kept in ``run_folder``, from where a later call takes it up.
    """
    for stage_number, config in enumerate(recipe.training.pretraining, start=1):
        passages, queries = unlabelled_texts(sources, config, seed=recipe.seed)
        folder = run_folder / ("pretraining" if stage_number == 1 else f"pretraining-{stage_number}")
        minutes = recipe.training.checkpoint_minutes
        for is_turn in (processes.is_first, not processes.is_first):  # the others take up what the first has trained
            if is_turn:
                report = pretrain_backbone(
                    student, passages, folder, config, queries=queries, seed=recipe.seed, checkpoint_minutes=minutes
                )
                remarks.info(
                    "distill: pretrained by %s on %d texts, loss %.3f at the start and %.3f at the end",
                    config.kind,
                    report.texts,
                    report.first_loss,
                    report.last_loss,
                )
                yield report
            processes.from_first(None)


def _fit_pooling(student: Student, sources: Sequence[TrainingSource], recipe: Recipe, processes: Processes) -> None:
    """Fit what the pooling takes from passages to a random sample of the data sets' passages, all sets alike."""
    if not any(stage.is_fitted_to_passages for stage in student.pooling.stages):
        return
    if processes.is_first:
        per_source = -(-_PASSAGES_FOR_EACH_DIMENSION * student.backbone.dim // len(sources))
        passages: list[str] = []
        for source in sources:
            ids = sorted(source.dataset.passages)
            random.Random(f"{recipe.seed}:{source.dataset.name}").shuffle(ids)
            passages += [source.passage_text(passage_id) for passage_id in ids[:per_source]]
        student.fit_pooling(passages)
    student.pooling.load_state_dict(processes.from_first(student.pooling.state_dict()))


def _write(
    run: DistillRun, folder: Path, report: DistillReport, teacher: str, closed_gates: Collection[str]
) -> DistillReport:
    """Write the student, and complete the report by what was fitted beside it."""
    student, recipe = run.student, run.recipe
    took_no_part = set[str]() if recipe.losses.imitates else {"teacher", "teacher_tuning"}
    recorded: dict[str, Any] = {}
    for loss in recipe.losses.root.values():
        recorded |= loss.record(is_trained=not run.keeps_start)
    content = {
        "recipe": recipe.model_dump(mode="json", exclude=took_no_part),
        "settings": {name: value for name, value in run.settings.items() if name != "recipe"},
        "teacher": teacher,
        "tasks": sorted({source.source.task for source in run.sources}),
        "steps": report.steps,
        "best_step": report.best_step,
        "dev": report.dev,
        "interaction_weights": report.interaction_weights,
        "fraction_kept": report.fraction_kept,
        **({} if report.label_weight is None else {"label_weight": report.label_weight}),
        "closed_gates": sorted(closed_gates),
        **recorded,
        "offsets": {name.removeprefix(OFFSET): float(p.detach()) for name, p in run.offsets.items()},
    }
    student.save(folder, content=content)
    run.trainer.finish()
    return replace(
        report,
        score_features={task: fitted.model_dump() for task, fitted in student.score_features.tasks.items()},
        probabilities={task: fitted.model_dump() for task, fitted in student.calibration.tasks.items()},
    )


def _report(run: DistillRun, folder: Path, labelled: Sequence[LabelledSource], stopped_early: bool) -> DistillReport:
    progress = run.progress
    has_interaction = run.has_stages and any(progress.interaction_weights.values())
    task_of: dict[str, Task] = {dev.name: dev.task for dev in run.dev_sets}
    return DistillReport(
        folder=str(folder),
        fingerprint=run.student.fingerprint,
        steps=run.trainer.step,
        best_step=run.trainer.best.step or 0,
        stopped_early=stopped_early,
        queries=sum(len(source.entries) for source in labelled),
        unlabelled_queries=sum(source.num_unlabelled for source in labelled),
        interaction_weights=progress.interaction_weights,
        fraction_kept=progress.fraction_kept,
        label_weight=progress.label_weight,
        is_untrained=run.keeps_start and not has_interaction,
        dev={
            name: {
                "start": progress.start_dev[name],
                "last": progress.last_dev[name],
                "kept": by_weight[str(float(progress.interaction_weights[task_of[name]]))],
                "by_weight": by_weight,
                "num_items": len(progress.start_items[name]),
            }
            for name, by_weight in progress.best_by_set.items()
        },
    )


def _join(source: TrainingSource, labels: Path, identity: TeacherIdentity, recipe: Recipe) -> LabelledSource:
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    if identity is _NO_TEACHER:
        return LabelledSource.join(source, LabelStore(labels, **key), keep_unlabelled=True)
    keep = recipe.training.unlabelled == "own_labels"
    store = LabelStore.open_for_reading(labels, **key, other_sets_suffice=keep)
    joined = LabelledSource.join(source, store, keep_unlabelled=keep)
    if joined.num_unlabelled:
        _log.warning(
            "%s: %d of %d queries of the plan lack the teacher's labels and are %s",
            source.dataset.name,
            joined.num_unlabelled,
            len(source.plan.entries),
            "trained on the data set's own judgements" if keep else "left out",
        )
    without_cosines = sum(
        bool(store.log_odds(e.query_id)) and bool(store.missing_cosines(e.query_id, e.positives + e.hard_negatives))
        for e in joined.entries
    )
    if without_cosines and "features" in recipe.losses.needs:
        _log.warning(
            "%s: %d queries lack cosines of the teacher's features for some of their passages, which are left out of "
            "imitating features; run `d2llm label` again to compute them",
            source.dataset.name,
            without_cosines,
        )
    return joined


def _run_settings(
    recipe: Recipe,
    sources: Sequence[LabelledSource],
    identity: TeacherIdentity,
    started_from: str | None,
) -> dict[str, Any]:
    """Everything that affects a run, as JSON; a checkpoint or student with other settings is from another run.

    ``started_from`` is the fingerprint of the student that training continues from, if any.
    """
    start = {} if started_from is None else {"started_from": started_from}
    return start | {
        "recipe": recipe.model_dump(mode="json"),
        "teacher": identity.fingerprint,
        "prompts": dict(identity.prompts),
        "plans": {s.source.dataset.name: s.source.plan.manifest["content_hash"] for s in sources},
        "labels": {
            s.source.dataset.name: {
                "queries": len(s.entries),
                "unlabelled": s.num_unlabelled,
                "teacher": s.labels.teacher,
            }
            for s in sources
        },
    }
