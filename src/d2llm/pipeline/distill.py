"""The verb ``distill``: the teacher's judgement goes into backbone, PMA and IEM."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.files import check_replaceable, write_bytes
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.recipe import Recipe, TeacherConfig, TrainingConfig
from d2llm.core.types import Task
from d2llm.data.collation import Draw, LabelledSource, batches_per_epoch, collate, epoch_batches, queries_by_set
from d2llm.data.labels import LabelStore
from d2llm.data.training import TrainingSource, check_sources
from d2llm.models.interaction import CosineHead
from d2llm.models.judge import identify_judge
from d2llm.models.student import KIND, Student
from d2llm.models.teacher_identity import TeacherIdentity
from d2llm.ops.gating import never_worse
from d2llm.pipeline.dev import (
    DevResult,
    DevSet,
    PairDevSet,
    choose_residual_weights,
    evaluate_dev,
    make_dev_set,
    value_by_set,
)
from d2llm.pipeline.gradient_cache import backpropagate
from d2llm.pipeline.interpolation import items_at_best_weight, put_between, smallest_sufficient_share
from d2llm.pipeline.objective import batch_losses, batch_tokens, score_vectors, weighted_sum
from d2llm.pipeline.processes import Processes, joined_processes, own_device
from d2llm.pipeline.progress import Advance, progress_bar
from d2llm.pipeline.trackers import open_trackers
from d2llm.pipeline.training_run import (
    RunLog,
    learning_rate_factor,
    load_checkpoint,
    optimizer_step,
    require_finite,
    restore,
    save_checkpoint,
    trainable,
)

_log = logging.getLogger(__name__)
_BEST = "best.safetensors"
_OFFSET = "offset."
_OFFSET_RATE = 0.03  # in units of the logit, whose scale starts at 20
_OFFSET_QUERIES = 100
_NO_TEACHER = TeacherIdentity("none", {"symmetric": "none", "asymmetric": "none"})


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a distillation did.

    ``dev`` holds the dev measure by data set: at the start, and of what was written by weight r. ``share_kept`` is how
    much of the change from the start was kept (``training.interpolation``).
    """

    folder: str
    fingerprint: str
    steps: int
    best_step: int
    stopped_early: bool
    queries: int
    unlabelled_queries: int
    residual_weights: dict[Task, float]
    share_kept: float
    dev: dict[str, dict[str, Any]]
    seconds: float


@dataclass
class _Progress:
    """Where a run stands; plain JSON in a checkpoint."""

    step: int = 0
    start_dev: dict[str, float] = field(default_factory=dict[str, float])
    start_items: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    best_step: int = -1
    best_dev: float = -1.0
    best_by_set: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    best_weights: dict[Task, float] = field(default_factory=dict[Task, float])
    share_kept: float = 1.0
    evaluations_without_gain: int = 0


def distill(
    sources: Sequence[TrainingSource],
    folder: Path,
    *,
    recipe: Recipe,
    labels: Path,
    teacher: TeacherConfig,
    closed_gates: Collection[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    show_progress: bool | None = None,
) -> DistillReport:
    """Train a student on a teacher's labels and write it to ``folder``; an interrupted run goes on where it stopped.

    The student starts as its backbone's own cosine (default configuration), is measured on dev before the first step
    and then regularly; the best state is kept, and for each task the weight of the interaction with the best dev
    result, 0 included. So what is written is on dev never worse than what it started from.

    With a weight of 0 for every imitation loss neither teacher nor labels are needed: the student is trained on the
    data sets' own judgements, as a tuned cosine with an interaction beside it.

    Started by ``torchrun`` or ``accelerate launch``, the processes share the texts of each batch and get the result of
    one process, but for rounding; the first alone evaluates and writes, into a folder that all must see.

    Args:
        sources: data sets with their plans; each needs judged dev queries.
        folder: where the student goes; ``<folder>.run`` beside it keeps checkpoint, best state and log.
        recipe: student, losses, training and seed.
        labels: the label store that ``label`` wrote.
        teacher: whose labels to use.
        closed_gates: data sets on which the teacher was tried and found wanting (``pipeline.gate``): they are trained
            on their own judgements.
        device: by default what this machine has.
        dtype: by default what is fast there.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: ``folder`` holds a finished student or foreign files, the data sets cannot be told apart (see
            ``check_sources``), there are no labels or dev queries, or the checkpoint is another run's.
        LabelMismatchError: the store holds labels of another teacher or prompt only.
        TrainingDivergedError: the loss is no number; the last good checkpoint is kept.
    """
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: holds a finished student already; give another folder, or delete it to start anew")
    check_replaceable(folder, KIND)
    check_sources(sources)
    started = time.monotonic()
    identity = identify_judge(teacher) if recipe.losses.imitates else _NO_TEACHER
    labelled = [
        _join(source, labels, _NO_TEACHER if source.dataset.name in closed_gates else identity, recipe)
        for source in sources
    ]
    if not any(source.entries for source in labelled):
        raise InputError(f"{labels}: no query of the plans has all its labels; run `label` to the end first")
    training = recipe.training
    dev_sets = [
        make_dev_set(s, num_queries=training.dev_queries, num_passages=training.dev_passages, seed=recipe.seed)
        for s in sources
    ]
    student = Student.create(recipe.student, device=own_device(device), dtype=dtype, seed=recipe.seed)
    student.prepare_training(seed=recipe.seed)
    with joined_processes() as processes:
        run = _Run(student, recipe, labelled, dev_sets, identity, folder.with_name(folder.name + ".run"), processes)
        stopped_early = run.train(show_progress)
        run.take_best()
        run.step_back()
        report = _report(run, folder, labelled, stopped_early, time.monotonic() - started)
        if processes.is_first:
            content = {
                "recipe": recipe.model_dump(),
                "teacher": identity.fingerprint,
                "tasks": sorted({source.task for source in sources}),
                "dev": report.dev,
                "residual_weights": report.residual_weights,
                "share_kept": report.share_kept,
                "closed_gates": sorted(closed_gates),
                "offsets": {name.removeprefix(_OFFSET): float(p.detach()) for name, p in run.offsets.items()},
            }
            student.save(folder, content=content)
            run.finish()
        return processes.from_first(report)  # when the student is written


def _report(
    run: _Run, folder: Path, labelled: Sequence[LabelledSource], stopped_early: bool, seconds: float
) -> DistillReport:
    return DistillReport(
        folder=str(folder),
        fingerprint=run.student.fingerprint,
        steps=run.progress.step,
        best_step=run.progress.best_step,
        stopped_early=stopped_early,
        queries=sum(len(source.entries) for source in labelled),
        unlabelled_queries=sum(source.num_unlabelled for source in labelled),
        residual_weights=run.progress.best_weights,
        share_kept=run.progress.share_kept,
        dev={
            name: {"start": run.progress.start_dev[name], "by_weight": by_weight}
            for name, by_weight in run.progress.best_by_set.items()
        },
        seconds=seconds,
    )


class _Run:
    """The training loop of one distillation, with all that a checkpoint must bring back."""

    def __init__(
        self,
        student: Student,
        recipe: Recipe,
        sources: list[LabelledSource],
        dev_sets: list[DevSet | PairDevSet],
        identity: TeacherIdentity,
        folder: Path,
        processes: Processes,
    ) -> None:
        self.student, self.recipe, self.sources, self.dev_sets = student, recipe, sources, dev_sets
        self.folder, self.processes = folder, processes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.offsets = _offsets(student, sources)
        self.parameters = trainable(student) | self.offsets
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = _optimizer(self.parameters, recipe.training)
        plans = [source.source.plan.manifest["content_hash"] for source in sources]
        counts = [(len(s.entries), s.num_unlabelled, s.labels.teacher) for s in sources]
        shaping = recipe.model_dump(mode="json", exclude={"training": {"trackers"}})
        self.run_key = fingerprint_json([shaping, identity.fingerprint, dict(identity.prompts), plans, counts])
        self.progress = _Progress()
        checkpoint = load_checkpoint(folder, run_key=self.run_key)
        if checkpoint is not None:
            restore(checkpoint, self.parameters, self.optimizer)
            self.progress = _Progress(**checkpoint.state)
        self.log: RunLog | None = None
        if processes.is_first:
            trackers = open_trackers(recipe, folder, run_key=self.run_key, resume_step=self.progress.step)
            self.log = RunLog(folder, resume_step=self.progress.step, trackers=trackers)

    def train(self, show_progress: bool | None) -> bool:
        """Train to the end; returns whether dev stopped it early."""
        training, progress = self.recipe.training, self.progress
        per_epoch = batches_per_epoch(self.sources, training.batch_queries)
        total = per_epoch * training.epochs
        if progress.best_step < 0:
            self._evaluate()
        with progress_bar("distilling", total, show=show_progress if self.processes.is_first else False) as advance:
            advance(progress.step)
            batches: list[tuple[LabelledSource, list[Draw]]] = []
            while progress.step < total:
                if progress.evaluations_without_gain >= training.patience:
                    return True
                if not batches or progress.step % per_epoch == 0:
                    batches = self._batches(progress.step // per_epoch)
                    if progress.step % per_epoch == 0:
                        self._write(progress.step + 1, queries=queries_by_set(batches))
                source, draws = batches[progress.step % per_epoch]
                self._step(source, draws, total, advance)
                at_end = progress.step == total
                if progress.step % training.eval_every == 0 or at_end:
                    self._evaluate()
                # A new best state is kept with a checkpoint that knows it, so that a resumed run cannot mix the two.
                is_best = progress.best_step == progress.step
                if is_best or progress.step % training.checkpoint_every == 0 or at_end:
                    self._keep()
        return False

    def take_best(self) -> None:
        """Put the best state and its interaction weights into the student."""
        best = load_file(self.folder / _BEST)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(best[name])
        self._set_residual_weights()

    def step_back(self) -> None:
        """Take back as much of the change as dev does not miss (``training.interpolation``)."""
        shares, progress = self.recipe.training.interpolation, self.progress
        if not shares or progress.best_step == 0:
            return
        end = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

        def measure(share: float) -> dict[str, DevResult]:
            put_between(self.parameters, self.start, end, share)
            return self.processes.from_first(
                evaluate_dev(self.student, self.dev_sets) if self.processes.is_first else {}
            )

        self.student.eval()
        share, results = smallest_sufficient_share(shares, measure, seed=self.recipe.seed)
        put_between(self.parameters, self.start, end, share)
        self._adopt(results[share])
        self._set_residual_weights()
        progress.share_kept = share
        for tried, found in results.items():
            self._write(progress.step, share=tried, dev=_rounded(found))

    def finish(self) -> None:
        """Tell the log that the run came to its end."""
        if self.log is not None:
            self.log.finish()

    def _batches(self, epoch: int) -> list[tuple[LabelledSource, list[Draw]]]:
        training = self.recipe.training
        return epoch_batches(
            self.sources,
            epoch=epoch,
            batch_queries=training.batch_queries,
            num_hard=training.num_hard,
            num_easy=training.num_easy,
            seed=self.recipe.seed,
            group_by_length=training.group_by_length,
            temperature=training.sampling_temperature,
        )

    def _step(self, source: LabelledSource, draws: list[Draw], total: int, advance: Advance) -> None:
        progress, training = self.progress, self.recipe.training
        self.student.train()
        batch = collate(source, draws)
        found: dict[str, Tensor] = {}

        def loss_of(vectors: Tensor) -> Tensor:
            scores = score_vectors(self.student, vectors, batch)
            offset = self.offsets.get(_offset_name(source.source))
            found.update(batch_losses(scores, batch, self.recipe.losses, offset=offset))
            loss = weighted_sum(found, self.recipe.losses)
            require_finite(loss, progress.step, self.folder)
            return loss

        loss = backpropagate(
            self.student,
            batch_tokens(self.student, batch),
            loss_of,
            training=training,
            seed=self.recipe.seed * 1_000_003 + progress.step,  # dropout by step alone: resume is exact
            processes=self.processes,
        )
        factor = learning_rate_factor(progress.step, warmup_steps=training.warmup_steps, total_steps=total)
        norm = optimizer_step(
            self.optimizer, self.parameters, factor=factor, max_gradient_norm=training.max_gradient_norm
        )
        progress.step += 1
        values = {name: round(float(value.detach()), 6) for name, value in found.items()}
        self._write(progress.step, loss=float(loss), gradient_norm=norm, task=source.source.task, **values)
        advance(1, f"loss {float(loss):.3f}  dev {progress.best_dev:.4f}")

    def _write(self, step: int, **values: Any) -> None:
        if self.log is not None:
            self.log.write(step, **values)

    def _evaluate(self) -> None:
        """Measure on dev in the first process; all then know how the run stands."""
        if self.processes.is_first:
            self._measure()
        vars(self.progress).update(self.processes.from_first(vars(self.progress)))

    def _measure(self) -> None:
        self.student.eval()
        results = evaluate_dev(self.student, self.dev_sets)
        progress = self.progress
        weights = choose_residual_weights(results)
        by_set = value_by_set(results, weights)
        if progress.best_step < 0:
            progress.start_dev = by_set
        value = sum(by_set.values()) / len(by_set)
        items = items_at_best_weight(results)
        if progress.best_step < 0:
            progress.start_items = items
        # A state that lost on one data set is not shipped, whatever it gained on another.
        is_sound = all(
            never_worse(start, items[name], seed=self.recipe.seed).passed
            for name, start in progress.start_items.items()
        )
        if is_sound and value > progress.best_dev:
            progress.best_dev, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
            self._adopt(results)
            best = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
            write_bytes(self.folder / _BEST, save(best))
        else:
            progress.evaluations_without_gain += 1
        dev = _rounded(results)
        self._write(progress.step, dev=dev)
        _log.info("step %d: dev %s", progress.step, dev)

    def _adopt(self, results: dict[str, DevResult]) -> None:
        """These dev results are those of what will be written, with the interaction weights that they ask for."""
        progress = self.progress
        progress.best_by_set = {
            name: {str(weight): value for weight, value in result.values.items()} for name, result in results.items()
        }
        progress.best_weights = choose_residual_weights(results)

    def _set_residual_weights(self) -> None:
        head = self.student.interaction
        if isinstance(head, CosineHead) or not head.has_anchor:
            return
        with torch.no_grad():
            for task, weight in self.progress.best_weights.items():
                head.residual_weight(task).fill_(weight)

    def _keep(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise TrainingDivergedError(
                f"weights became infinite or no numbers before step {self.progress.step}; training stopped. The last "
                f"good checkpoint is kept in {self.folder}. Lower the learning rate"
            )
        if self.processes.is_first:
            step, state = self.progress.step, dict(vars(self.progress))
            save_checkpoint(self.folder, step, self.parameters, self.optimizer, state, run_key=self.run_key)


def _join(source: TrainingSource, labels: Path, identity: TeacherIdentity, recipe: Recipe) -> LabelledSource:
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    if identity is _NO_TEACHER:
        return LabelledSource.join(source, LabelStore(labels, **key), keep_unlabelled=True)
    store = LabelStore.open_for_reading(labels, **key)
    keep = recipe.training.unlabelled == "own_labels"
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
    if without_cosines and recipe.losses.feature_imitation:
        _log.warning(
            "%s: %d queries lack cosines of the teacher's features for some of their passages, which take no part in "
            "feature imitation; run `label` again to make them",
            source.dataset.name,
            without_cosines,
        )
    return joined


def _rounded(results: dict[str, DevResult]) -> dict[str, dict[str, float]]:
    return {name: {str(w): round(v, 5) for w, v in result.values.items()} for name, result in results.items()}


def _offset_name(source: TrainingSource) -> str:
    return f"{_OFFSET}{source.dataset.name}"


def _offsets(student: Student, sources: Sequence[LabelledSource]) -> dict[str, nn.Parameter]:
    """For each set of labelled pairs the logit at which yes and no are equally likely: at first the student's mean."""
    offsets: dict[str, nn.Parameter] = {}
    for labelled in sources:
        source, entries = labelled.source, labelled.entries[:_OFFSET_QUERIES]
        if not any(entry.targets for entry in entries):
            continue
        queries = student.encode_queries([source.query_text(entry.query_id) for entry in entries]).vectors
        scores: list[float] = []
        for query, entry in zip(queries, entries, strict=True):
            texts = [source.passage_text(passage_id) for passage_id in entry.positives + entry.hard_negatives]
            scores += student.score(query, student.encode_passages(texts).vectors, source.task).tolist()
        offsets[_offset_name(source)] = nn.Parameter(torch.tensor(fmean(scores), device=student.backbone.device))
    return offsets


def _optimizer(parameters: dict[str, nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with a rate for the backbone and one for the heads; vectors and scalars are not decayed."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    head_rate = training.head_learning_rate or training.learning_rate
    for name, parameter in parameters.items():
        rate = training.learning_rate if name.startswith("backbone.") else head_rate
        rate = _OFFSET_RATE if name.startswith(_OFFSET) else rate
        decay = training.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    options = [
        {"params": group, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), group in groups.items()
    ]
    return torch.optim.AdamW(options)
