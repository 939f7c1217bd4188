"""What ``distill`` trains: its steps and dev evaluations, and the stages that follow the training loop."""

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

from d2llm.core.errors import OutOfTimeError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.progress import progress_bar, remarks
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
from d2llm.recipe import Recipe, TrainingConfig
from d2llm.recipe.recipe import shaping_settings
from d2llm.training.checkpoints import BestState, epochs_of, open_trackers, trainable, warmup_steps
from d2llm.training.choose_weights import (
    choose_fraction,
    choose_interaction_weights,
    interpolate,
    items_at_best_weight,
    make_idle_gates_constant,
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
from d2llm.training.gradient_cache import backpropagate, graph_room
from d2llm.training.losses import (
    OFFSET,
    LossInput,
    batch_losses,
    batch_tokens,
    embedded_positions,
    make_offsets,
    offset_name,
    score_vectors,
    weighted_sum,
    with_tokens,
)
from d2llm.training.mining.mine import remine
from d2llm.training.processes import Processes
from d2llm.training.residual import AskTeacher, train_residual
from d2llm.training.settings import LISTED_PASSAGES
from d2llm.training.trainer import Trainable, Trainer

_log = logging.getLogger(__name__)
_OFFSET_RATE = 0.03  # in units of the logit, whose scale starts at 20
_NUM_EVALUATIONS, _MAX_STEPS_BETWEEN = 5, 200
_MIN_FRACTION = 0.5  # of limited time that the first stage gets, however long the others will take
_MEASURING_FRACTION = 0.25  # of limited time; evaluations between start and end that would take more are left out
_CALIBRATED_TEXTS = 10  # encoded for each dev query to fit probabilities
_LABEL_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class DistillProgress:
    """What the dev evaluations of a run have found, stored as JSON in a checkpoint."""

    start_dev: dict[str, float] = field(default_factory=dict[str, float])
    last_dev: dict[str, float] = field(default_factory=dict[str, float])
    start_items: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    best_by_set: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    interaction_weights: dict[Task, float] = field(default_factory=dict[Task, float])
    fraction_kept: float = 1.0
    label_weight: float | None = None
    seconds_per_text: float = 0.0


class DistillRun(Trainable):
    """One distillation.

    With a time limit (``core.time_limit``) the first stage ends early enough for the others, by the speed at which dev
    was encoded last.
    """

    title = "distilling"

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
        self.has_stages = _has_stages(student, recipe)
        if recipe.training.dual_head and isinstance(student.interaction, Interaction):
            student.interaction.split_heads()
        if self.has_stages and isinstance(student.interaction, Interaction):
            for parameter in student.interaction.residual_parameters().values():
                parameter.requires_grad_(False)
        tasks: set[Task] = {source.source.task for source in sources}
        for task in sorted(tasks):
            if has_interaction_weight(student, task) and isinstance(student.interaction, Interaction):
                # The weight that was chosen for the start may be 0, and an interaction of weight 0 learns nothing.
                student.interaction.interaction_weight(task).fill_(1.0)
        self.offsets = make_offsets(student, sources)
        self.parameters = trainable(student) | self.offsets
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.groups = _groups(self.parameters, recipe.training)
        self.progress = DistillProgress()
        self.adopted: dict[str, DevResult] | None = None
        self.batches: list[tuple[LabelledSource, list[Draw]]] = []
        self.per_epoch = batches_per_epoch(self.sources, recipe.training.batch_queries)
        self.total_steps = self.per_epoch * epochs_of(recipe.training, self.per_epoch)
        self.room = graph_room(recipe.training, student.backbone.device)
        self.measuring_seconds = 0.0
        self.num_planned = sum(len(source.entries) + len(source.passage_ids) for source in sources)
        training, key = recipe.training, fingerprint_json({**settings, "recipe": shaping_settings(recipe)})
        self.trainer = Trainer(
            self,
            folder,
            settings,
            shaping=shaping_settings,
            seed=recipe.seed,
            warmup_steps=warmup_steps(training, self.total_steps),
            max_gradient_norm=training.max_gradient_norm,
            eval_every=training.eval_every or min(_MAX_STEPS_BETWEEN, -(-self.total_steps // _NUM_EVALUATIONS)),
            eval_start=True,
            patience=training.patience,
            max_minutes=training.max_minutes or math.inf,
            checkpoint_every=training.checkpoint_every,
            checkpoint_minutes=training.checkpoint_minutes,
            open_trackers=lambda step: open_trackers(recipe, folder, run_key=key, resume_step=step),
            processes=processes,
        )

    def train(self) -> bool:
        """Train to the end, and load the best state; returns whether the training ended early.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        """
        self._remine((self.trainer.step - 1) // self.per_epoch)  # takes up the plans of a run that is resumed
        return self.trainer.train()

    def finish_student(self) -> None:
        """Run the stages that follow the training loop, each if it has something to do."""
        self.merge_heads()
        self.interpolate_with_start()
        self.leave_out_pma()
        self.train_interaction()
        self.set_interaction_weights()
        self.drop_idle_parts()

    @property
    def keeps_start(self) -> bool:
        """Whether the vectors are those of the start: no state was better on dev, or nothing of the change is kept."""
        return self.trainer.best.step == 0 or self.progress.fraction_kept == 0

    def reserved_seconds(self) -> float:
        """What the other stages need, at most half of the time."""
        return min(self.seconds_after("vectors"), (1 - _MIN_FRACTION) * self.trainer.limit)

    def seconds_after(self, stage: Literal["vectors", "interaction", "tokens"]) -> float:
        """How long what follows a stage will take, nearly all of it for encoding texts."""
        training, num_dev = self.recipe.training, sum(dev_set.num_texts for dev_set in self.dev_sets)
        num_queries = sum(len(dev_set.queries) for dev_set in self.dev_sets)
        # For weights and probabilities:
        num_listed = listed_passages(training)
        num_texts = sum(min(num_listed, len(source.source.dataset.passages)) for source in self.sources)
        num_texts += _CALIBRATED_TEXTS * num_queries
        if stage != "tokens" and self.recipe.score_features.maxsim:
            num_texts += self.num_planned
        if stage != "tokens" and self.student.config.interaction.gates:
            num_texts += num_dev
        if stage == "vectors":
            num_fractions = 1 + len(training.interpolation) if training.interpolates else 0
            num_fractions += self.student.pooling.gated is not None
            num_texts += (1 + num_fractions) * num_dev + (num_dev + self.num_planned if self.has_stages else 0)
        return num_texts * self.progress.seconds_per_text

    def may_evaluate(self) -> bool:
        """Whether measuring on dev leaves most of a limited time to training."""
        if math.isinf(self.trainer.limit):
            return True
        needed = self.progress.seconds_per_text * sum(dev_set.num_texts for dev_set in self.dev_sets)
        needed *= 2  # also at the end
        return self.processes.from_first(self.measuring_seconds + needed <= _MEASURING_FRACTION * self.trainer.limit)

    def merge_heads(self) -> None:
        """Combine the two heads, if there are two, with the weight that is best on dev; even weights if all are equal.

        As during the training, a weight that is significantly worse than the start on some data set is not chosen,
        unless ``interpolate_with_start`` makes sure of that.
        """
        head, seed = self.student.interaction, self.recipe.seed
        if not isinstance(head, Interaction) or head.teacher_dots is None:
            return
        self.student.eval()
        total = sum((1 + len(_LABEL_WEIGHTS)) * len(dev.queries) + len(dev.passages) for dev in self.dev_sets)
        by_weight: dict[float, dict[str, DevResult]] = {}
        with progress_bar("measuring combinations of the heads", total) as advance:
            encoded = [
                encode_dev(self.student, dev, advance=advance, processes=self.processes) for dev in self.dev_sets
            ]
            for weight in _LABEL_WEIGHTS if self.processes.is_first else ():
                head.label_weight = weight
                by_weight[weight] = {e.dev.name: measure_by_weight(self.student, e, advance=advance) for e in encoded}
        by_weight = self.processes.from_first(by_weight)
        sound = [
            weight
            for weight, results in by_weight.items()
            if not worse_sets(self.progress.start_items, items_at_best_weight(results), seed=seed)
        ]
        allowed = list(by_weight) if self.recipe.training.interpolates else sound or [0.5]
        weight = max(allowed, key=lambda weight: (mean_value(by_weight[weight]), -abs(weight - 0.5)))
        head.label_weight = self.progress.label_weight = weight
        head.merge_heads()
        self.parameters = trainable(self.student) | self.offsets
        self._adopt(by_weight[weight])
        for weight, results in by_weight.items():
            self.trainer.write(self.trainer.step, label_weight=weight, dev=_rounded(results))

    def interpolate_with_start(self) -> None:
        """Undo as much of the change as possible without a significant loss on dev (``training.choose_weights``)."""
        training, progress = self.recipe.training, self.progress
        if self.trainer.best.step == 0 or not training.interpolates:
            return
        end = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

        def measure(fraction: float) -> dict[str, DevResult]:
            interpolate(self.parameters, self.start, end, fraction)
            return self.processes.from_first(self._dev_results(f"measuring {fraction:.0%} of the change on dev"))

        self.student.eval()
        fraction, results = choose_fraction(
            training.interpolation,
            measure,
            progress.start_items,
            seed=self.recipe.seed,
            largest=training.max_interpolation,
        )
        interpolate(self.parameters, self.start, end, fraction)
        self._adopt(results[fraction])
        progress.fraction_kept = fraction
        for tried, dev_results in results.items():
            self.trainer.write(self.trainer.step, fraction=tried, dev=_rounded(dev_results))

    def leave_out_pma(self) -> None:
        """Set the gate of PMA to 0, unless some dev set is significantly worse without it (``choose_weights``)."""
        gated = self.student.pooling.gated
        gate = None if gated is None else gated.gate
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
        self.trainer.write(self.trainer.step + step, **values)

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
            renewed.append(mined if self.recipe.training.unjudged == "negatives" else self._scored_alone(mined))
        self.sources = renewed

    def _scored_alone(self, mined: LabelledSource) -> LabelledSource:
        """Keep only the mined negatives that the teacher has scored; with "ask_teacher", it scores new ones first."""
        if self.recipe.training.unjudged == "ask_teacher":
            labelled = (entry for entry in mined.entries if entry.query_id not in mined.unlabelled)
            mined = self._let_teacher_score(mined, {entry.query_id: entry.hard_negatives for entry in labelled})
        return mined.without_unjudged_negatives()

    def _let_teacher_score(self, labelled: LabelledSource, passages: Mapping[str, Sequence[str]]) -> LabelledSource:
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
            self._let_teacher_score(source, pairs[name]) if (name := source.source.dataset.name) in pairs else source
            for source in self.sources
        ]
        by_name = {source.source.dataset.name: source for source in self.sources}
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

    def step(self, step: int) -> dict[str, Any]:
        """Add the gradient of a batch."""
        training = self.recipe.training
        epoch, batch_index = divmod(step, self.per_epoch)
        if not self.batches or batch_index == 0:
            if batch_index == 0 and (training.remine or training.in_batch_labels) and self.trainer.saved != step:
                # A run that is resumed must not see this epoch's plans and labels in the last one, and the teacher
                # may take long, or end the run.
                self.trainer.save()
            self._remine(epoch)
            self.batches = self._batches(epoch)
            if batch_index == 0:
                self.trainer.write(step + 1, queries=queries_by_set(self.batches))
        source, draws = self.batches[batch_index]
        self.student.train()
        batch = collate(source, draws)
        ids = batch_tokens(self.student, batch)
        losses: dict[str, Tensor] = {}
        objective = self.recipe.losses.root
        depths = self.recipe.losses.depths if batch.targets is None else ()

        def loss_of(encoded: Tensor, tokens: Sequence[Tensor]) -> Tensor:
            vectors, *nested = encoded.split(self.student.vector_dim, dim=1)
            scores = score_vectors(self.student, vectors, batch, dots_only=self.has_stages)
            scores = with_tokens(self.student, scores, tokens, batch, ids)
            offset = self.offsets.get(offset_name(source.source))
            after = dict(zip(depths, nested, strict=True))
            losses.update(batch_losses(objective, LossInput(batch, scores, self.student, vectors, after, offset)))
            return weighted_sum(losses, objective)

        loss = backpropagate(
            self.student,
            ids,
            loss_of,
            token_positions=embedded_positions(self.student, batch, ids),
            depths=depths,
            part_tokens=training.part_tokens,
            checkpointed=training.gradient_checkpointing,
            room=self.room,
            seed=self.recipe.seed * 1_000_003 + step,  # dropout depends only on the step: resuming is exact
            processes=self.processes,
        )
        values = {name: round(float(value.detach()), 6) for name, value in losses.items()}
        return {"loss": loss, "task": source.source.task, **values}

    def evaluate(self) -> dict[str, DevResult]:
        """Measure the student on dev; empty in other processes than the first."""
        self.student.eval()
        started = time.monotonic()
        results = self._dev_results("measuring on dev" if self.trainer.step else "measuring the start on dev")
        seconds = time.monotonic() - started
        self.measuring_seconds += seconds
        self.progress.seconds_per_text = seconds / max(1, sum(dev_set.num_texts for dev_set in self.dev_sets))
        return results

    def _dev_results(self, title: str) -> dict[str, DevResult]:
        """The dev results; empty in other processes than the first."""
        return evaluate_dev(self.student, self.dev_sets, title=title, processes=self.processes)

    def record(self, results: dict[str, DevResult], step: int, best: BestState) -> dict[str, Any]:
        """Record the dev results of a step, and keep the state if it is the best so far."""
        progress = self.progress
        by_set = value_by_set(results, choose_interaction_weights(results))
        progress.last_dev = by_set
        items = items_at_best_weight(results)
        if best.step is None:
            progress.start_dev, progress.start_items = by_set, items
        # A state that is worse on one data set is not kept, whatever it gained on another; if
        # ``interpolate_with_start`` runs at the end, it makes sure of that.
        is_sound = self.recipe.training.interpolates or not worse_sets(
            progress.start_items, items, seed=self.recipe.seed
        )
        if best.update(mean_value(results), step, is_sound=is_sound):
            self._adopt(results)
        dev = _rounded(results)
        _log.info("step %d: dev %s", step, dev)
        return {"dev": dev}

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
        if isinstance(head, Interaction) and head.has_dot and head.config.branches == "per_task":
            for task in head.config.tasks:
                if task not in self.progress.interaction_weights:
                    head.interaction_weight(task).zero_()
        self.student.eval()
        make_idle_gates_constant(self.student, self.dev_sets, seed=self.recipe.seed)
        if dropped := self.student.drop_idle_parts():
            remarks.info("distill: left out of the student, which is as good without: %s", ", ".join(dropped))

    def state(self) -> dict[str, Any]:
        """The progress of the run, as JSON."""
        return vars(self.progress)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state."""
        vars(self.progress).update(state)


def listed_passages(training: TrainingConfig) -> int:
    """How many passages of a data set are encoded to fit feature weights; in limited time as suits its dev sets."""
    return LISTED_PASSAGES if math.isinf(seconds_left()) else min(LISTED_PASSAGES, 2 * training.dev_passages)


def _has_stages(student: Student, recipe: Recipe) -> bool:
    interaction = student.config.interaction
    return recipe.training.residual.epochs > 0 and interaction.head == "dot" and bool(interaction.tasks)


def _rounded(results: dict[str, DevResult]) -> dict[str, dict[str, float]]:
    return {name: {str(w): round(v, 5) for w, v in result.values.items()} for name, result in results.items()}


def _groups(parameters: dict[str, nn.Parameter], training: TrainingConfig) -> list[tuple[list[Tensor], float, float]]:
    """The parameters with their learning rates: backbone, heads and offsets have their own."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters.items():
        is_encoder = name.startswith(("backbone.", "token_projection."))
        rate = training.learning_rate if is_encoder else training.head_learning_rate
        rate = _OFFSET_RATE if name.startswith(OFFSET) else rate
        groups.setdefault(rate, []).append(parameter)
    return [(group, rate, training.weight_decay) for rate, group in groups.items()]
