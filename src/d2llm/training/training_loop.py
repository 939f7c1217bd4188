"""The training loop of ``distill``: steps, dev evaluation, checkpoints, and the choice of the state to keep."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2llm.core.errors import OutOfTimeError, TrainingDivergedError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.recipe import Recipe, TrainingConfig
from d2llm.core.recipe_file import shaping_settings
from d2llm.core.time_limit import seconds_left, time_limit
from d2llm.core.types import Task
from d2llm.data.collation import (
    Draw,
    LabelledSource,
    batches_per_epoch,
    collate,
    epoch_batches,
    in_batch_pairs,
    queries_by_set,
)
from d2llm.data.plan import read_plan, write_plan
from d2llm.models.interaction import Interaction
from d2llm.models.student import Student
from d2llm.training.checkpoints import (
    BestState,
    RunLog,
    StopSignals,
    adamw,
    epochs_of,
    learning_rate_factor,
    load_checkpoint,
    optimizer_step,
    remarks,
    require_finite,
    restore,
    save_checkpoint,
    trainable,
    warmup_steps,
)
from d2llm.training.choose_weights import (
    choose_interaction_weights,
    choose_share,
    interpolate,
    items_at_best_weight,
    mean_value,
    value_by_set,
    worse_sets,
)
from d2llm.training.dev_sets import (
    DevResult,
    DevSet,
    encode_dev,
    evaluate_dev,
    has_interaction_weight,
    measure_by_weight,
)
from d2llm.training.fit_evidence import LISTED_PASSAGES
from d2llm.training.gradient_cache import backpropagate, graph_room
from d2llm.training.idle_gates import make_idle_gates_constant
from d2llm.training.mining.remine import remine
from d2llm.training.objective import (
    OFFSET,
    batch_losses,
    batch_tokens,
    expansion_losses,
    make_offsets,
    nested_losses,
    offset_name,
    score_vectors,
    token_places,
    weighted_sum,
    with_tokens,
)
from d2llm.training.processes import Processes
from d2llm.training.residual import AskTeacher, train_residual
from d2llm.training.trackers import open_trackers

_log = logging.getLogger(__name__)
_BEST = "best.safetensors"
_OFFSET_RATE = 0.03  # in units of the logit, whose scale starts at 20
_NUM_EVALUATIONS, _MAX_STEPS_BETWEEN = 5, 200
_LEAST_SHARE = 0.5  # of limited time that the first stage gets, however long the others will take
_MEASURING_SHARE = 0.25  # of limited time; evaluations between start and end that would take more are left out
_CALIBRATED_TEXTS = 10  # encoded for each dev query to fit probabilities
_LABEL_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class DistillProgress:
    """The progress of a run, stored as JSON in a checkpoint."""

    step: int = 0
    measured_step: int = -1
    start_dev: dict[str, float] = field(default_factory=dict[str, float])
    last_dev: dict[str, float] = field(default_factory=dict[str, float])
    start_items: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    best_by_set: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    interaction_weights: dict[Task, float] = field(default_factory=dict[Task, float])
    share_kept: float = 1.0
    label_share: float | None = None
    seconds: float = 0.0
    seconds_per_text: float = 0.0


class DistillRun:
    """The training loop of one distillation, and the state that a checkpoint restores.

    With a time limit (``core.time_limit``) the first stage ends early enough for the others, by the speed at which dev
    was encoded last.
    """

    def __init__(
        self,
        student: Student,
        recipe: Recipe,
        sources: list[LabelledSource],
        dev_sets: list[DevSet],
        settings: dict[str, Any],
        folder: Path,
        processes: Processes,
        ask_teacher: AskTeacher,
    ) -> None:
        """Begin a run, or resume the one whose checkpoint is in ``folder``.

        ``settings`` is JSON with everything that affects the run; a checkpoint with other settings is from another run.
        ``ask_teacher`` is called if ``training.unjudged`` or ``training.in_batch_labels`` says so.
        """
        self.student = student
        self.recipe = recipe
        self.sources = sources
        self.dev_sets = dev_sets
        self.settings = settings
        self.folder = folder
        self.processes = processes
        self.ask_teacher = ask_teacher
        self.folder.mkdir(parents=True, exist_ok=True)
        self.has_stages = _has_stages(student, recipe)
        if recipe.training.dual_head and isinstance(student.interaction, Interaction):
            student.interaction.split_heads()
        if self.has_stages and isinstance(student.interaction, Interaction):
            for parameter in student.interaction.residual_parameters().values():
                parameter.requires_grad_(False)
        tasks: set[Task] = {each.source.task for each in sources}
        for task in sorted(tasks):
            if has_interaction_weight(student, task) and isinstance(student.interaction, Interaction):
                # The weight that was chosen for the start may be 0, and an interaction of weight 0 learns nothing.
                student.interaction.interaction_weight(task).fill_(1.0)
        self.offsets = make_offsets(student, sources)
        self.parameters = trainable(student) | self.offsets
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = _optimizer(self.parameters, recipe.training)
        self.progress = DistillProgress()
        self.best = BestState(self.parameters, folder / _BEST)
        self.adopted: dict[str, DevResult] | None = None
        checkpoint = load_checkpoint(folder, settings=self.settings, shaping=shaping_settings)
        if checkpoint is not None:
            restore(checkpoint, self.parameters, self.optimizer)
            self._resume(checkpoint.state)
            remarks.info("distill: continues after step %d of an earlier run", self.progress.step)
        self.log: RunLog | None = None
        if processes.is_first:
            key = fingerprint_json({**self.settings, "recipe": shaping_settings(recipe)})
            trackers = open_trackers(recipe, folder, run_key=key, resume_step=self.progress.step)
            resume_step = -1 if checkpoint is None else checkpoint.step
            self.log = RunLog(folder, resume_step=resume_step, trackers=trackers)
        self.per_epoch = batches_per_epoch(self.sources, recipe.training.batch_queries)
        self.total_steps = self.per_epoch * epochs_of(recipe.training, self.per_epoch)
        self.warmup_steps = warmup_steps(recipe.training, self.total_steps)
        default_interval = min(_MAX_STEPS_BETWEEN, -(-self.total_steps // _NUM_EVALUATIONS))
        self.eval_every = recipe.training.eval_every or default_interval
        self.room = graph_room(recipe.training, student.backbone.device)
        self.signals = StopSignals()
        self.timed_at: float | None = None
        self.limit = seconds_left()
        self.measuring_seconds = 0.0
        self.num_planned = sum(len(each.entries) + len(each.passage_ids) for each in sources)
        self.saved_step, self.saved_at = -1 if checkpoint is None else checkpoint.step, time.monotonic()

    def train(self) -> bool:
        """Train to the end; returns whether it was stopped early by the dev results.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        """
        max_minutes = self.recipe.training.max_minutes
        seconds = math.inf if max_minutes is None else max(0.0, 60 * max_minutes - self.progress.seconds)
        bar = progress_bar("distilling", self.total_steps, done=self.progress.step, seconds=seconds)
        with self.signals, bar as advance:
            try:
                return self._train(advance)
            except (KeyboardInterrupt, OutOfTimeError):
                if self.signals.is_consistent and self.best.step is not None:
                    self._save()
                    remarks.info("distill: step %d is saved in %s", self.progress.step, self.folder)
                raise

    def _train(self, advance: Advance) -> bool:
        training, progress = self.recipe.training, self.progress
        batches: list[tuple[LabelledSource, list[Draw]]] = []
        self._remine((progress.step - 1) // self.per_epoch)  # takes up the plans of a run that is resumed
        self._evaluate_and_save()  # before the first step, or if a stop prevented it
        while progress.step < self.total_steps:
            if self.best.looks_since >= training.patience:
                return True
            if self._is_out_of_time():
                remarks.info("distill: stops after %d of %d steps: out of time", progress.step, self.total_steps)
                if progress.measured_step < progress.step:
                    self._evaluate()
                    self._save()
                return True
            epoch, place = divmod(progress.step, self.per_epoch)
            if not batches or place == 0:
                if place == 0 and (training.remine or training.in_batch_labels) and self.saved_step != progress.step:
                    # A run that is resumed must not see this epoch's plans and labels in the last one, and the teacher
                    # may take long, or end the run.
                    self._save()
                self._remine(epoch)
                batches = self._batches(epoch)
                if place == 0:
                    self._write(progress.step + 1, queries=queries_by_set(batches))
            self._step(*batches[place], advance)
            self._evaluate_and_save()
        return False

    def _is_out_of_time(self) -> bool:
        """Whether the first stage has taken ``training.max_minutes``, or must leave what is left of a time limit.

        The first process says so for all.
        """
        max_minutes = self.recipe.training.max_minutes
        if max_minutes is None and math.isinf(self.limit):
            return False
        now = time.monotonic()
        self.progress.seconds += 0.0 if self.timed_at is None else now - self.timed_at
        self.timed_at = now
        others = min(self.seconds_after("vectors"), (1 - _LEAST_SHARE) * self.limit)
        is_over = max_minutes is not None and self.progress.seconds >= 60 * max_minutes
        return self.processes.from_first(is_over or seconds_left() < others)

    def seconds_after(self, stage: Literal["vectors", "interaction", "tokens"]) -> float:
        """How long what follows a stage will take, nearly all of it for encoding texts."""
        training, num_dev = self.recipe.training, sum(dev_set.num_texts for dev_set in self.dev_sets)
        num_queries = sum(len(dev_set.queries) for dev_set in self.dev_sets)
        # For weights and probabilities:
        num_listed = listed_passages(training)
        num_texts = sum(min(num_listed, len(each.source.dataset.passages)) for each in self.sources)
        num_texts += _CALIBRATED_TEXTS * num_queries
        if stage != "tokens" and self.recipe.evidence.token_vectors:
            num_texts += self.num_planned
        if stage != "tokens" and self.student.config.interaction.gates:
            num_texts += num_dev
        if stage == "vectors":
            num_shares = 1 + len(training.interpolation) if training.steps_back else 0
            num_shares += self.student.pooling.gate is not None
            num_texts += (1 + num_shares) * num_dev + (num_dev + self.num_planned if self.has_stages else 0)
        return num_texts * self.progress.seconds_per_text

    def _evaluate_and_save(self) -> None:
        """After a step, evaluate on dev and save a checkpoint if they are due."""
        training, progress = self.recipe.training, self.progress
        at_end = progress.step == self.total_steps
        is_due = progress.step // self.eval_every > progress.measured_step // self.eval_every
        is_evaluated = at_end or (is_due and self._has_time_to_measure())
        is_evaluated &= progress.measured_step < progress.step
        if is_evaluated:
            self._evaluate()
        # Save a checkpoint with every new best state, so that a resumed run has matching ones.
        is_due = progress.step % training.checkpoint_every == 0 or at_end or self.best.step == progress.step
        is_due |= time.monotonic() - self.saved_at > 60 * training.checkpoint_minutes
        if is_due and (is_evaluated or self.saved_step != progress.step):
            self._save()

    def _has_time_to_measure(self) -> bool:
        """Whether measuring on dev leaves most of a limited time to training; the first process says so for all.

        The start and the end are always measured.
        """
        if math.isinf(self.limit) or self.progress.measured_step < 0:
            return True
        needed = self.progress.seconds_per_text * sum(dev_set.num_texts for dev_set in self.dev_sets)
        needed *= 2  # also at the end
        return self.processes.from_first(self.measuring_seconds + needed <= _MEASURING_SHARE * self.limit)

    def take_best(self) -> None:
        """Load the best state into the student."""
        self.best.put_back()

    def merge_heads(self) -> None:
        """Combine the two heads, if there are two, with the weight that is best on dev; even weights if all are equal.

        As during the training, a weight that is significantly worse than the start on some data set is not chosen,
        unless ``step_back`` makes sure of that.
        """
        head, seed = self.student.interaction, self.recipe.seed
        if not isinstance(head, Interaction) or head.teacher_anchors is None:
            return
        self.student.eval()
        total = sum((1 + len(_LABEL_SHARES)) * len(dev.queries) + len(dev.passages) for dev in self.dev_sets)
        by_share: dict[float, dict[str, DevResult]] = {}
        with progress_bar("measuring combinations of the heads", total) as advance:
            encoded = [
                encode_dev(self.student, dev, advance=advance, processes=self.processes) for dev in self.dev_sets
            ]
            for share in _LABEL_SHARES if self.processes.is_first else ():
                head.label_share = share
                by_share[share] = {e.dev.name: measure_by_weight(self.student, e, advance=advance) for e in encoded}
        by_share = self.processes.from_first(by_share)
        sound = [
            share
            for share, results in by_share.items()
            if not worse_sets(self.progress.start_items, items_at_best_weight(results), seed=seed)
        ]
        allowed = list(by_share) if self.recipe.training.steps_back else sound or [0.5]
        share = max(allowed, key=lambda share: (mean_value(by_share[share]), -abs(share - 0.5)))
        head.label_share = self.progress.label_share = share
        head.merge_heads()
        self.parameters = trainable(self.student) | self.offsets
        self._adopt(by_share[share])
        for each, results in by_share.items():
            self._write(self.progress.step, label_share=each, dev=_rounded(results))

    def step_back(self) -> None:
        """Undo as much of the change as possible without a significant loss on dev (``training.choose_weights``)."""
        training, progress = self.recipe.training, self.progress
        if self.best.step == 0 or not training.steps_back:
            return
        end = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

        def measure(share: float) -> dict[str, DevResult]:
            interpolate(self.parameters, self.start, end, share)
            return self.processes.from_first(self._dev_results(f"measuring {share:.0%} of the change on dev"))

        self.student.eval()
        share, results = choose_share(
            training.interpolation,
            measure,
            progress.start_items,
            seed=self.recipe.seed,
            largest=training.largest_share,
        )
        interpolate(self.parameters, self.start, end, share)
        self._adopt(results[share])
        progress.share_kept = share
        for each, share_results in results.items():
            self._write(progress.step, share=each, dev=_rounded(share_results))

    def leave_out_pma(self) -> None:
        """Set the gate of PMA to 0, unless some dev set is significantly worse without it (``choose_weights``)."""
        gate = self.student.pooling.gate
        if gate is None or not float(gate.detach()):
            return
        self.student.eval()
        trained = float(gate.detach())
        with_it = self.processes.from_first(self.adopted)
        if with_it is None:  # the run was resumed after its last step
            with_it = self.processes.from_first(self._dev_results("measuring with PMA on dev"))
        self._set(gate, 0.0)
        without = self.processes.from_first(self._dev_results("measuring without PMA on dev"))
        if worse_sets(items_at_best_weight(with_it), items_at_best_weight(without), seed=self.recipe.seed):
            self._set(gate, trained)
        else:
            self._adopt(without)

    @staticmethod
    def _set(parameter: Tensor, value: float) -> None:
        with torch.no_grad():
            parameter.fill_(value)

    def train_interaction(self) -> None:
        """Run the second stage, if the recipe has one: train the interaction alone, with the vectors fixed."""
        if not self.has_stages:
            return
        try:
            with time_limit(seconds_left() - self.seconds_after("interaction")):
                results = train_residual(
                    self.student,
                    self.sources,
                    self.dev_sets,
                    self.recipe,
                    lambda source: self.offsets.get(offset_name(source.source)),
                    self._write_after,
                    ask_teacher=self.ask_teacher,
                    processes=self.processes,
                )
        except OutOfTimeError:
            remarks.info("distill: there was no time to train the interaction")
            return
        if self.processes.is_first:
            self._adopt(results)
            start = self.progress.start_items
            self.progress.interaction_weights = choose_interaction_weights(results, start, seed=self.recipe.seed)

    def _write_after(self, step: int, **values: Any) -> None:
        self._write(self.progress.step + step, **values)

    def finish(self) -> None:
        """Close the log at the end of the run."""
        if self.log is not None:
            self.log.finish()

    def _remine(self, epoch: int) -> None:
        """Mine hard negatives with the current student; they are stored, so that a resumed run uses the same ones."""
        if not self.recipe.training.remine or epoch < 1:
            return
        renewed: list[LabelledSource] = []
        for labelled in self.sources:
            folder = self.folder / "remined" / f"epoch-{epoch}" / labelled.source.dataset.name
            if self.processes.is_first and not (folder / MANIFEST).is_file():
                self.student.eval()
                remined = remine(
                    labelled.source,
                    self.student,
                    self.recipe.mining,
                    seed=self.recipe.seed,
                    epoch=epoch,
                    labels=labelled.labels,
                    same_text=labelled.same_text,
                )
                write_plan(folder, remined.plan.entries, {"remined": remined.plan.manifest.get("remined")})
            self.processes.from_first(None)  # wait until the plan is written
            mined = labelled.with_source(replace(labelled.source, plan=read_plan(folder)))
            renewed.append(mined if self.recipe.training.unjudged == "negatives" else self._judged_alone(mined))
        self.sources = renewed

    def _judged_alone(self, mined: LabelledSource) -> LabelledSource:
        """Keep only the mined negatives that the teacher has judged; with "ask_teacher", it judges new ones first."""
        if self.recipe.training.unjudged == "ask_teacher":
            labelled = (entry for entry in mined.entries if entry.query_id not in mined.unlabelled)
            mined = self._let_teacher_judge(mined, {entry.query_id: entry.hard_negatives for entry in labelled})
        return mined.without_unjudged_negatives()

    def _let_teacher_judge(self, labelled: LabelledSource, passages: Mapping[str, Sequence[str]]) -> LabelledSource:
        """The data set with the teacher's labels of these passages (query_id -> passage ids) beside those it has."""
        if self.processes.is_first:
            self.ask_teacher(labelled, passages)
        self.processes.from_first(None)  # wait until the labels are written
        return replace(labelled, labels=labelled.labels.read_again())

    def _batches(self, epoch: int) -> list[tuple[LabelledSource, list[Draw]]]:
        """The batches of an epoch; with ``training.in_batch_labels``, all of their pairs have labels."""
        batches = self._draw_batches(epoch)
        if not self.recipe.training.in_batch_labels:
            return batches
        pairs = in_batch_pairs(batches)
        self.sources = [
            self._let_teacher_judge(each, pairs[name]) if (name := each.source.dataset.name) in pairs else each
            for each in self.sources
        ]
        by_name = {each.source.dataset.name: each for each in self.sources}
        return [(by_name[labelled.source.dataset.name], draws) for labelled, draws in batches]

    def _draw_batches(self, epoch: int) -> list[tuple[LabelledSource, list[Draw]]]:
        training = self.recipe.training
        return epoch_batches(
            self.sources,
            epoch=epoch,
            batch_queries=training.batch_queries,
            num_positives=training.num_positives,
            num_hard=training.num_hard,
            num_easy=training.num_easy,
            seed=self.recipe.seed,
            temperature=training.sampling_temperature,
        )

    def _step(self, source: LabelledSource, draws: list[Draw], advance: Advance) -> None:
        progress, training = self.progress, self.recipe.training
        self.student.train()
        batch = collate(source, draws)
        ids = batch_tokens(self.student, batch)
        losses: dict[str, Tensor] = {}
        depths = self.recipe.losses.nested_depths if batch.targets is None else ()

        def loss_of(encoded: Tensor, tokens: Sequence[Tensor]) -> Tensor:
            vectors, *nested = encoded.split(self.student.vector_dim, dim=1)
            scores = score_vectors(self.student, vectors, batch, anchors_only=self.has_stages)
            scores = with_tokens(self.student, scores, tokens, batch, ids)
            offset = self.offsets.get(offset_name(source.source))
            losses.update(batch_losses(scores, batch, self.recipe.losses, offset=offset))
            losses.update(nested_losses(self.student, vectors, batch, self.recipe.losses, nested))
            losses.update(expansion_losses(vectors, batch, self.recipe.losses))
            loss = weighted_sum(losses, self.recipe.losses)
            require_finite(loss, progress.step, self.folder)
            return loss

        loss = backpropagate(
            self.student,
            ids,
            loss_of,
            places=token_places(self.student, batch, ids),
            depths=depths,
            part_tokens=training.part_tokens,
            room=self.room,
            seed=self.recipe.seed * 1_000_003 + progress.step,  # dropout depends only on the step: resuming is exact
            processes=self.processes,
        )
        factor = learning_rate_factor(progress.step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        with self.signals.held():
            norm = optimizer_step(
                self.optimizer, self.parameters, factor=factor, max_gradient_norm=training.max_gradient_norm
            )
            progress.step += 1
            values = {name: round(float(value.detach()), 6) for name, value in losses.items()}
            self._write(progress.step, loss=float(loss), gradient_norm=norm, task=source.source.task, **values)
        advance(1, f"loss {float(loss):.3f}  dev {self.best.value or 0:.4f}")

    def _write(self, step: int, **values: Any) -> None:
        if self.log is not None:
            self.log.write(step, **values)

    def _evaluate(self) -> None:
        """Evaluate on dev, record the result in the first process, and share the progress with the others."""
        self.student.eval()
        started = time.monotonic()
        results = self._dev_results("measuring on dev" if self.progress.step else "measuring the start on dev")
        self.measuring_seconds += time.monotonic() - started
        if self.processes.is_first:
            num_texts = sum(dev_set.num_texts for dev_set in self.dev_sets)
            self.progress.seconds_per_text = (time.monotonic() - started) / max(1, num_texts)
            with self.signals.held():
                self._record(results)
        progress, best = self.processes.from_first((vars(self.progress), self.best.record()))
        vars(self.progress).update(progress)
        self.best.take_up(best)

    def _dev_results(self, title: str) -> dict[str, DevResult]:
        """The dev results; empty in other processes than the first."""
        return evaluate_dev(self.student, self.dev_sets, title=title, processes=self.processes)

    def _record(self, results: dict[str, DevResult]) -> None:
        """Record the dev results of this step, and keep the state if it is the best so far."""
        progress = self.progress
        weights = choose_interaction_weights(results)
        by_set = value_by_set(results, weights)
        progress.last_dev = by_set
        value = mean_value(results)
        items = items_at_best_weight(results)
        if self.best.step is None:
            progress.start_dev, progress.start_items = by_set, items
        # A state that is worse on one data set is not kept, whatever it gained on another. If ``step_back`` runs at the
        # end, it makes sure of that.
        is_sound = self.recipe.training.steps_back or not worse_sets(progress.start_items, items, seed=self.recipe.seed)
        if self.best.offer(value, progress.step, is_sound=is_sound):
            self._adopt(results)
        progress.measured_step = progress.step
        dev = _rounded(results)
        self._write(progress.step, dev=dev)
        _log.info("step %d: dev %s", progress.step, dev)

    def _adopt(self, results: dict[str, DevResult]) -> None:
        """Use these as the dev results of the student to be written, and choose the weights r by them."""
        progress = self.progress
        progress.best_by_set = {
            name: {str(weight): value for weight, value in result.values.items()} for name, result in results.items()
        }
        progress.interaction_weights = choose_interaction_weights(results)
        self.adopted = results

    def set_interaction_weights(self) -> None:
        """Set the chosen weight r of each task in the student's interaction; during training it is 1."""
        head = self.student.interaction
        for task, weight in self.progress.interaction_weights.items():
            if has_interaction_weight(self.student, task) and isinstance(head, Interaction):
                head.interaction_weight(task).fill_(weight)

    def drop_idle_parts(self) -> None:
        """Remove what adds nothing from the student (``Student.drop_idle_parts``), after its weights r were set.

        A task without data has a branch that was not trained, so its interaction counts nothing. Only the first process
        does this; it writes the student.
        """
        if not self.processes.is_first:
            return
        head = self.student.interaction
        if isinstance(head, Interaction) and head.has_anchor and head.config.branches == "per_task":
            for task in head.config.tasks:
                if task not in self.progress.interaction_weights:
                    head.interaction_weight(task).zero_()
        self.student.eval()
        make_idle_gates_constant(self.student, self.dev_sets, seed=self.recipe.seed)
        if dropped := self.student.drop_idle_parts():
            remarks.info("distill: %s added nothing and is not in the student", " and ".join(dropped))

    def _state(self) -> dict[str, Any]:
        """The progress of the run, as JSON."""
        best = {
            "best_step": self.best.step,
            "best_dev": self.best.value,
            "evaluations_without_gain": self.best.looks_since,
        }
        return vars(self.progress) | best

    def _resume(self, state: Mapping[str, Any]) -> None:
        best = {"step": "best_step", "value": "best_dev", "looks_since": "evaluations_without_gain"}
        self.best.take_up({name: state[key] for name, key in best.items()})
        self.progress = DistillProgress(**{key: value for key, value in state.items() if key not in best.values()})

    def _save(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise TrainingDivergedError(
                f"weights became infinite or NaN before step {self.progress.step}; training stopped. The last good "
                f"checkpoint is kept in {self.folder}. Lower the learning rate"
            )
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        if self.processes.is_first:
            step, state = self.progress.step, self._state()
            with self.signals.held():
                save_checkpoint(self.folder, step, self.parameters, self.optimizer, state, settings=self.settings)


def listed_passages(training: TrainingConfig) -> int:
    """How many passages of a data set are encoded to fit weights of evidence; in limited time as suits its dev sets."""
    return LISTED_PASSAGES if math.isinf(seconds_left()) else min(LISTED_PASSAGES, 2 * training.dev_passages)


def _has_stages(student: Student, recipe: Recipe) -> bool:
    interaction = student.config.interaction
    return recipe.training.residual.epochs > 0 and interaction.head == "anchored" and bool(interaction.tasks)


def _rounded(results: dict[str, DevResult]) -> dict[str, dict[str, float]]:
    return {name: {str(w): round(v, 5) for w, v in result.values.items()} for name, result in results.items()}


def _optimizer(parameters: dict[str, nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with separate learning rates for backbone and heads."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters.items():
        is_encoder = name.startswith(("backbone.", "token_projection."))
        rate = training.learning_rate if is_encoder else training.head_learning_rate
        rate = _OFFSET_RATE if name.startswith(OFFSET) else rate
        groups.setdefault(rate, []).append(parameter)
    return adamw((group, rate, training.weight_decay) for rate, group in groups.items())
