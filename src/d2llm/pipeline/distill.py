"""The verb ``distill``: the teacher's judgement goes into backbone, PMA and IEM."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from d2llm.data.collation import Draw, LabelledSource, batches_per_epoch, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.data.training import TrainingSource, check_sources
from d2llm.models.interaction import CosineHead
from d2llm.models.judge import identify_judge
from d2llm.models.student import KIND, Student
from d2llm.models.teacher_identity import TeacherIdentity
from d2llm.pipeline.dev import DevSet, choose_residual_weights, evaluate_dev, make_dev_set, ndcg_by_set
from d2llm.pipeline.objective import batch_losses, score_batch, weighted_sum
from d2llm.pipeline.progress import Advance, progress_bar
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
_NO_TEACHER = TeacherIdentity("none", {"symmetric": "none", "asymmetric": "none"})


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a distillation did; ``dev`` holds nDCG@10 by data set: at the start, and at the best step by weight r."""

    folder: str
    fingerprint: str
    steps: int
    best_step: int
    stopped_early: bool
    queries: int
    unlabelled_queries: int
    residual_weights: dict[Task, float]
    dev: dict[str, dict[str, Any]]
    seconds: float


@dataclass
class _Progress:
    """Where a run stands; plain JSON in a checkpoint."""

    step: int = 0
    start_dev: dict[str, float] = field(default_factory=dict[str, float])
    best_step: int = -1
    best_dev: float = -1.0
    best_by_set: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    best_weights: dict[Task, float] = field(default_factory=dict[Task, float])
    evaluations_without_gain: int = 0


def distill(
    sources: Sequence[TrainingSource],
    folder: Path,
    *,
    recipe: Recipe,
    labels: Path,
    teacher: TeacherConfig,
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

    Args:
        sources: data sets with their plans; each needs judged dev queries.
        folder: where the student goes; ``<folder>.run`` beside it keeps checkpoint, best state and log.
        recipe: student, losses, training and seed.
        labels: the label store that ``label`` wrote.
        teacher: whose labels to use.
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
    labelled = [_join(source, labels, identity, recipe) for source in sources]
    if not any(source.entries for source in labelled):
        raise InputError(f"{labels}: no query of the plans has all its labels; run `label` to the end first")
    training = recipe.training
    dev_sets = [
        make_dev_set(s, num_queries=training.dev_queries, num_passages=training.dev_passages, seed=recipe.seed)
        for s in sources
    ]
    student = Student.create(recipe.student, device=device, dtype=dtype, seed=recipe.seed)
    student.prepare_training(seed=recipe.seed)
    run = _Run(student, recipe, labelled, dev_sets, identity, folder.with_name(folder.name + ".run"))
    stopped_early = run.train(show_progress)
    run.take_best()
    report = DistillReport(
        folder=str(folder),
        fingerprint=student.fingerprint,
        steps=run.progress.step,
        best_step=run.progress.best_step,
        stopped_early=stopped_early,
        queries=sum(len(source.entries) for source in labelled),
        unlabelled_queries=sum(source.num_unlabelled for source in labelled),
        residual_weights=run.progress.best_weights,
        dev={
            name: {"start": run.progress.start_dev[name], "by_weight": by_weight}
            for name, by_weight in run.progress.best_by_set.items()
        },
        seconds=time.monotonic() - started,
    )
    content = {
        "recipe": recipe.model_dump(),
        "teacher": identity.fingerprint,
        "tasks": sorted({source.task for source in sources}),
        "dev": report.dev,
        "residual_weights": report.residual_weights,
    }
    student.save(folder, content=content)
    return report


class _Run:
    """The training loop of one distillation, with all that a checkpoint must bring back."""

    def __init__(
        self,
        student: Student,
        recipe: Recipe,
        sources: list[LabelledSource],
        dev_sets: list[DevSet],
        identity: TeacherIdentity,
        folder: Path,
    ) -> None:
        self.student, self.recipe, self.sources, self.dev_sets = student, recipe, sources, dev_sets
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = trainable(student)
        self.optimizer = _optimizer(self.parameters, recipe.training)
        plans = [source.source.plan.manifest["content_hash"] for source in sources]
        counts = [(len(source.entries), source.num_unlabelled) for source in sources]
        self.run_key = fingerprint_json(
            [recipe.model_dump(mode="json"), identity.fingerprint, dict(identity.prompts), plans, counts]
        )
        self.progress = _Progress()
        checkpoint = load_checkpoint(folder, run_key=self.run_key)
        if checkpoint is not None:
            restore(checkpoint, self.parameters, self.optimizer)
            self.progress = _Progress(**checkpoint.state)
        self.log = RunLog(folder, resume_step=self.progress.step)

    def train(self, show_progress: bool | None) -> bool:
        """Train to the end; returns whether dev stopped it early."""
        training, progress = self.recipe.training, self.progress
        per_epoch = batches_per_epoch(self.sources, training.batch_queries)
        total = per_epoch * training.epochs
        if progress.best_step < 0:
            self._evaluate()
        with progress_bar("distilling", total, show=show_progress) as advance:
            advance(progress.step)
            batches: list[tuple[LabelledSource, list[Draw]]] = []
            while progress.step < total:
                if progress.evaluations_without_gain >= training.patience:
                    return True
                if not batches or progress.step % per_epoch == 0:
                    batches = self._batches(progress.step // per_epoch)
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
            head = self.student.interaction
            if isinstance(head, CosineHead) or not head.has_anchor:
                return
            for task, weight in self.progress.best_weights.items():
                head.residual_weight(task).fill_(weight)

    def _batches(self, epoch: int) -> list[tuple[LabelledSource, list[Draw]]]:
        training = self.recipe.training
        return epoch_batches(
            self.sources,
            epoch=epoch,
            batch_queries=training.batch_queries,
            num_hard=training.num_hard,
            num_easy=training.num_easy,
            seed=self.recipe.seed,
        )

    def _step(self, source: LabelledSource, draws: list[Draw], total: int, advance: Advance) -> None:
        progress, training = self.progress, self.recipe.training
        torch.manual_seed(self.recipe.seed * 1_000_003 + progress.step)  # dropout by step alone: resume is exact
        self.student.train()
        batch = collate(source, draws)
        found = batch_losses(score_batch(self.student, batch), batch, self.recipe.losses)
        loss = weighted_sum(found, self.recipe.losses)
        require_finite(loss, progress.step, self.folder)
        loss.backward()
        factor = learning_rate_factor(progress.step, warmup_steps=training.warmup_steps, total_steps=total)
        norm = optimizer_step(
            self.optimizer, self.parameters, factor=factor, max_gradient_norm=training.max_gradient_norm
        )
        progress.step += 1
        values = {name: round(float(value.detach()), 6) for name, value in found.items()}
        self.log.write(progress.step, loss=float(loss.detach()), gradient_norm=norm, task=source.source.task, **values)
        advance(1, f"loss {float(loss.detach()):.3f}  dev {progress.best_dev:.4f}")

    def _evaluate(self) -> None:
        self.student.eval()
        results = evaluate_dev(self.student, self.dev_sets)
        progress = self.progress
        weights = choose_residual_weights(results)
        by_set = ndcg_by_set(results, weights)
        if progress.best_step < 0:
            progress.start_dev = by_set
        value = sum(by_set.values()) / len(by_set)
        # A state that lost on one data set is not shipped, whatever it gained on another.
        is_sound = all(by_set[name] >= start for name, start in progress.start_dev.items())
        if is_sound and value > progress.best_dev:
            progress.best_dev, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
            progress.best_by_set = {
                name: {str(weight): ndcg for weight, ndcg in result.ndcg.items()} for name, result in results.items()
            }
            progress.best_weights = weights
            best = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
            write_bytes(self.folder / _BEST, save(best))
        else:
            progress.evaluations_without_gain += 1
        dev = {name: {str(w): round(v, 5) for w, v in result.ndcg.items()} for name, result in results.items()}
        self.log.write(progress.step, dev=dev)
        _log.info("step %d: dev nDCG@10 %s", progress.step, dev)

    def _keep(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise TrainingDivergedError(
                f"weights became infinite or no numbers before step {self.progress.step}; training stopped. The last "
                f"good checkpoint is kept in {self.folder}. Lower the learning rate"
            )
        state = {name: getattr(self.progress, name) for name in self.progress.__dataclass_fields__}
        save_checkpoint(self.folder, self.progress.step, self.parameters, self.optimizer, state, run_key=self.run_key)


def _join(source: TrainingSource, labels: Path, identity: TeacherIdentity, recipe: Recipe) -> LabelledSource:
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    if not recipe.losses.imitates:
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


def _optimizer(parameters: dict[str, nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with a rate for the backbone and one for the heads; vectors and scalars are not decayed."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    head_rate = training.head_learning_rate or training.learning_rate
    for name, parameter in parameters.items():
        rate = training.learning_rate if name.startswith("backbone.") else head_rate
        decay = training.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    options = [
        {"params": group, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), group in groups.items()
    ]
    return torch.optim.AdamW(options)
