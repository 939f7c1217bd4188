"""The verb ``tune-teacher``: trains a teacher, by adapters or in full, on labelled pairs by yes/no cross-entropy."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import progress_bar, remarks
from d2llm.core.types import TASKS, Task
from d2llm.data.labels import label_keys, only_labels
from d2llm.data.plan import TrainingPair, TrainingPlan, TrainingSource, labelled_pairs
from d2llm.data.run_folder import require_unfinished, working_folder
from d2llm.models.device import choose_dtype, size_of_states, tokens_to_train
from d2llm.models.row_features import score_by_query
from d2llm.models.student import Student
from d2llm.models.teachers.identity import TEACHER_KIND
from d2llm.models.teachers.local import LocalTeacher
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.ops.batching import token_budget_batches
from d2llm.recipe import LocalTeacherConfig, Recipe, TeacherConfig, TeacherTuningConfig, VllmTeacherConfig
from d2llm.recipe.recipe import tuning_settings
from d2llm.training.checkpoints import BestState, trainable
from d2llm.training.gradient_cache import backpropagate_parts, graph_room
from d2llm.training.trainer import Trainable, Trainer, save_tuned

_HELD_OUT_DIVISOR = 5  # at most one fifth of a plan is held out
_ALL = 1_000_000
_SORTED_BATCHES = 16  # number of batches whose pairs are sorted by length together


@dataclass(frozen=True, slots=True)
class TeacherTuningReport:
    """The result of a tuning run; ``loss`` is the mean training loss over the last tenth of the steps.

    With held-out queries, ``best_step`` is the step whose state was kept, and ``dev`` its value of ``dev_measure``.
    """

    folder: str
    fingerprint: str
    pairs: int
    steps: int
    num_truncated: int
    loss: float
    seconds: float
    best_step: int | None = None
    dev: float | None = None


def tune_teacher(
    sources: list[TrainingSource],
    folder: Path,
    *,
    teacher: TeacherConfig,
    tuning: TeacherTuningConfig,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> TeacherTuningReport:
    """Tune a teacher and write it to ``folder``; an interrupted run continues from its last checkpoint.

    Args:
        sources: data sets with their plans and tasks.
        folder: where to write the tuned teacher; ``<folder>.run`` beside it has the checkpoint and the log.
        teacher: the LLM and its prompt.
        tuning: which weights to train, the schedule, and the held-out queries for early stopping.
        seed: seed of the sample of pairs, their order, and the adapter's initial weights.
        device: where to compute; by default the best device available.
        dtype: number format; by default the fastest on that device.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        ModelNotFoundError: there is no such student in ``teacher_tuning.students``.
        DataFormatError: ``teacher_tuning.labels`` has no labels, or is damaged.
        InputError: there are no pairs, or no labels of them; ``folder`` already holds a finished teacher; the
            checkpoint is from another run, this kind of teacher cannot be tuned, or the plans are too small to hold
            queries out.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    require_unfinished(folder, TEACHER_KIND)
    started = time.monotonic()
    pairs, dev_pairs, learns_from = _pairs(sources, tuning, seed=seed, device=device, dtype=dtype)
    model = _load(teacher, tuning, device=device, dtype=dtype)
    model.prepare_training(
        tuning.lora, tuning=tuning.tuning, gradient_checkpointing=tuning.gradient_checkpointing, seed=seed
    )
    settings = {  # everything that affects a run; a checkpoint or tuned teacher with other settings is from another run
        "recipe": tuning_settings(Recipe(teacher=teacher, teacher_tuning=tuning, seed=seed)),
        "model": model.fingerprint,
        "plans": {source.dataset.name: source.plan.manifest["content_hash"] for source in sources},
        **learns_from,
    }
    batches = _epoch_batches(pairs, tuning, seed)
    run = _Tuning(model, batches, dev_pairs, tuning)
    trainer = Trainer(
        run,
        working_folder(folder),
        settings,
        shaping=tuning_settings,
        seed=seed,
        warmup_steps=tuning.warmup_of(len(batches)),
        eval_every=tuning.eval_every if dev_pairs else None,
        lower_is_better=tuning.dev_measure == "cross_entropy",
        patience=tuning.patience,
        checkpoint_minutes=tuning.checkpoint_minutes,
    )
    trainer.train()
    report = TeacherTuningReport(
        folder=str(folder),
        fingerprint="",
        pairs=sum(map(len, batches[: trainer.step])),
        steps=trainer.step,
        num_truncated=sum(run.num_truncated),
        loss=trainer.mean_losses[1],
        seconds=time.monotonic() - started,
        best_step=trainer.best.step,
        dev=trainer.best.value,
    )
    names = [source.dataset.name for source in sources]
    content = {"tuning": tuning.model_dump(), "seed": seed, "settings": settings, "data": names}

    def save(content: dict[str, Any]) -> str:
        with new_folder(folder, kind=TEACHER_KIND) as temporary:
            return model.save(temporary, content)

    return save_tuned(report, save, content, [trainer])


class _Tuning(Trainable):
    """A teacher and its batches."""

    title = "tuning the teacher"

    def __init__(
        self,
        model: LocalTeacher,
        batches: Sequence[list[TrainingPair]],
        dev_pairs: Sequence[TrainingPair],
        tuning: TeacherTuningConfig,
    ) -> None:
        self.model, self.batches, self.dev_pairs, self.tuning = model, batches, dev_pairs, tuning
        self.total_steps = len(batches)
        self.num_truncated: list[int] = []
        """By step."""
        self.parameters = trainable(model)
        self.groups = [([*self.parameters.values()], tuning.learning_rate, 0.0)]
        self.part_tokens = tuning.part_tokens or tokens_to_train(
            model.device, size_of_states(model.model), checkpointed=tuning.gradient_checkpointing
        )
        self.room = graph_room(tuning, model.device)

    def step(self, step: int) -> dict[str, Any]:
        self.model.train()
        batch = self.batches[step]
        loss, num_truncated = accumulate(self.model, batch, self.part_tokens, self.tuning, room=self.room)
        self.num_truncated[step:] = [num_truncated]  # a step that was interrupted is repeated
        return {"loss": loss, "pairs": len(batch)}

    def evaluate(self) -> DevScore:
        return score_dev(self.model, self.dev_pairs)

    def record(self, results: DevScore, step: int, best: BestState) -> dict[str, Any]:
        best.update(getattr(results, self.tuning.dev_measure), step)
        return {"dev_cross_entropy": results.cross_entropy, "dev_mrr": results.mrr}

    def state(self) -> dict[str, Any]:
        return {"num_truncated": self.num_truncated}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.num_truncated = state["num_truncated"]


# Targets of pairs ----------------------------------------------------------------------------------------------------


def _pairs(
    sources: Sequence[TrainingSource],
    tuning: TeacherTuningConfig,
    *,
    seed: int,
    device: str | None,
    dtype: str | None,
) -> tuple[list[TrainingPair], list[TrainingPair], dict[str, str]]:
    """The pairs to learn, those of dev, and the fingerprint of what their targets are from, if not of judgements."""
    training, dev_pairs = hold_out(sources, tuning, seed=seed) if tuning.eval_every and sources else (sources, [])
    pairs = labelled_pairs(training, num_negatives=tuning.num_negatives, max_queries=tuning.max_queries, seed=seed)
    if not pairs:
        raise InputError("the plans hold no queries, so there is nothing to tune the teacher on; mine a plan first")
    if tuning.labels is not None:
        labelled, made_by = with_labels([*pairs, *dev_pairs], sources, Path(tuning.labels))
        return labelled[: len(pairs)], labelled[len(pairs) :], {"learns_from": made_by}
    if not tuning.students:
        return pairs, dev_pairs, {}
    students = [Student.load(name, device=device, dtype=dtype) for name in tuning.students]
    scored = with_student_scores([*pairs, *dev_pairs], students)
    learns_from = " ".join(student.fingerprint for student in students)
    return scored[: len(pairs)], scored[len(pairs) :], {"learns_from": learns_from}


def with_student_scores(pairs: Sequence[TrainingPair], students: Sequence[Student]) -> list[TrainingPair]:
    """The same pairs, whose targets are the mean of students' scores as probabilities: sigmoid(mean of z - m).

    m is a student's mean score of the task's pairs, so that yes and no are about equally frequent; the differences of
    scores, and so their order, become those of the teacher's log-odds.

    Source: Liu et al., "Trans-Encoder", ICLR 2022 (arXiv 2109.13059), which takes cosines, or the mean of two models'
    (mutual distillation), as targets of the same cross-entropy.
    """
    scores = np.mean([_centred_scores(pairs, student) for student in students], axis=0)
    probabilities = torch.sigmoid(torch.from_numpy(scores)).tolist()
    return [replace(pair, target=target) for pair, target in zip(pairs, probabilities, strict=True)]


def _centred_scores(pairs: Sequence[TrainingPair], student: Student) -> NDArray[np.float64]:
    """A student's score of each pair less the mean of its task's pairs."""
    scores = np.empty(len(pairs), np.float64)
    for task in TASKS:
        indices = [index for index, pair in enumerate(pairs) if pair.task == task]
        if not indices:
            continue
        texts = [(pairs[index].query, pairs[index].passage) for index in indices]
        queries, passages = (list(dict.fromkeys(side)) for side in zip(*texts, strict=True))
        with progress_bar("scoring pairs for the teacher", len(queries) + len(passages)) as advance:
            by_query = dict(zip(queries, student.encode_queries(queries, advance=advance).vectors, strict=True))
            by_passage = dict(zip(passages, student.encode_passages(passages, advance=advance).vectors, strict=True))
        values = score_by_query(student, texts, by_query, by_passage, task)
        scores[indices] = values - values.astype(np.float64).mean()
    return scores


def with_labels(
    pairs: Sequence[TrainingPair], sources: Sequence[TrainingSource], folder: Path
) -> tuple[list[TrainingPair], str]:
    """The same pairs, where the target of those that have a label in ``folder`` is its P(yes); and its fingerprint.

    Raises:
        InputError: ``folder`` has labels of two teachers or prompts for one data set, or of none of these pairs.
        DataFormatError: it has no labels, or is damaged.
    """
    probabilities: dict[tuple[Task, str, str], float] = {}
    for source in sources:
        store = only_labels(folder, source.dataset.name)
        if store is None:
            continue
        for query_id in filter(source.dataset.queries.__contains__, store.query_ids):
            for passage_id, log_odds in store.log_odds(query_id).items():
                if passage_id in source.dataset.passages:
                    pair = source.task, source.query_text(query_id), source.passage_text(passage_id)
                    probabilities[pair] = float(expit(log_odds))
    targets = [probabilities.get((pair.task, pair.query, pair.passage)) for pair in pairs]
    found = sum(target is not None for target in targets)
    if not found:
        raise InputError(
            f"{folder}: has no label of any pair of these plans, only {'; '.join(map(str, label_keys(folder)))}"
        )
    remarks.info(
        "tune-teacher: %s of %s pairs have a label; the others keep their judgements", f"{found:,}", f"{len(pairs):,}"
    )
    labelled = [
        pair if target is None else replace(pair, target=target) for pair, target in zip(pairs, targets, strict=True)
    ]
    return labelled, fingerprint_json([target for target in targets if target is not None])


# Held-out queries ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DevScore:
    """A teacher's quality on held-out pairs: yes/no cross-entropy, and mean reciprocal rank of the first positive."""

    cross_entropy: float
    mrr: float


def hold_out(
    sources: Sequence[TrainingSource], tuning: TeacherTuningConfig, *, seed: int
) -> tuple[list[TrainingSource], list[TrainingPair]]:
    """Split the plans: sources without the held-out queries, and the held-out pairs.

    Queries that share a positive with a held-out query are removed from training too, because a passage that was a
    positive in training is easy to recognise. The held-out pairs are drawn as for training; ``mrr`` is measured on all
    pairs of their plans.

    Raises:
        InputError: the plans are too small to hold anything out.
    """
    kept: list[TrainingSource] = []
    held: list[TrainingSource] = []
    for source in sources:
        entries = sorted(source.plan.entries, key=lambda entry: entry.query_id)
        random.Random(f"{seed}:dev:{source.dataset.name}").shuffle(entries)
        dev = entries[: min(tuning.dev_queries, len(entries) // _HELD_OUT_DIVISOR)]
        dev_positives = {passage_id for entry in dev for passage_id in entry.positives}
        dev_ids = {entry.query_id for entry in dev}
        rest = [e for e in source.plan.entries if e.query_id not in dev_ids and dev_positives.isdisjoint(e.positives)]
        kept.append(replace(source, plan=TrainingPlan(tuple(rest), source.plan.manifest)))
        held.append(replace(source, plan=TrainingPlan(tuple(dev), source.plan.manifest)))
    num_negatives = tuning.num_negatives if tuning.dev_measure == "cross_entropy" else _ALL
    pairs = labelled_pairs(held, num_negatives=num_negatives, max_queries=None, seed=seed)
    if not pairs or not any(source.plan.entries for source in kept):
        raise InputError(
            "the plans are too small to hold queries out (a fifth at most, and queries that share their positives): "
            "remove eval_every from teacher_tuning, or mine larger plans"
        )
    return kept, pairs


def score_dev(teacher: PairTeacher, pairs: Sequence[TrainingPair]) -> DevScore:
    """Measure a teacher on held-out pairs."""
    log_odds = np.empty(len(pairs), dtype=np.float32)
    by_list: dict[tuple[Task, str], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_list.setdefault((pair.task, pair.query), []).append(index)
    for task in TASKS:
        indices = [index for (list_task, _), indices in by_list.items() if list_task == task for index in indices]
        if indices:
            texts = [(pairs[index].query, pairs[index].passage) for index in indices]
            log_odds[indices] = teacher.score_pairs(texts, task).log_odds
    targets = torch.tensor([pair.target for pair in pairs])
    loss = functional.binary_cross_entropy_with_logits(torch.from_numpy(log_odds), targets)
    is_positive = np.array([pair.is_positive for pair in pairs])
    ranks = [_reciprocal_rank(log_odds[indices], is_positive[indices]) for indices in by_list.values()]
    return DevScore(float(loss), float(np.mean([rank for rank in ranks if rank is not None] or [0.0])))


def _reciprocal_rank(log_odds: NDArray[np.float32], is_positive: NDArray[np.bool_]) -> float | None:
    """1 / rank of the first positive, ranked after negatives with the same score; None for a list without one."""
    if not is_positive.any():
        return None
    return 1.0 / (1 + int((log_odds[~is_positive] >= log_odds[is_positive].max()).sum()))


# Model and batches ---------------------------------------------------------------------------------------------------


def _load(
    teacher: TeacherConfig, tuning: TeacherTuningConfig, *, device: str | None, dtype: str | None
) -> LocalTeacher:
    """Load the teacher to tune; if all weights are tuned they are float32, whatever it computes in."""
    quantization = tuning.base_quantization(teacher)
    if isinstance(teacher, VllmTeacherConfig):  # which only scores
        teacher = teacher.as_kind("auto")
    chosen = "float32" if tuning.tuning == "full" else dtype
    if teacher.needs_tuning and tuning.tuning != "full":
        raise InputError("a new head can only be tuned with all weights; set teacher_tuning.tuning = 'full'")
    model: PairTeacher | None = None
    if isinstance(teacher, LocalTeacherConfig):
        model = teacher.model_copy(update={"quantization": quantization}).load(device=device, dtype=chosen)
    if not isinstance(teacher, LocalTeacherConfig) or not isinstance(model, LocalTeacher):
        raise InputError(
            f"teacher '{teacher.model}' has no local weights to tune; skip tune-teacher, or name a local model"
        )
    model.compute_dtype = choose_dtype(model.device, dtype or teacher.dtype)
    return model


def _epoch_batches(pairs: list[TrainingPair], tuning: TeacherTuningConfig, seed: int) -> list[list[TrainingPair]]:
    """The batches of all epochs: each has one task and pairs (or lists) of similar length; their order is random."""
    batches: list[list[TrainingPair]] = []
    for epoch in range(tuning.epochs):
        rng = random.Random(f"{seed}:{epoch}")
        epoch_batches: list[list[TrainingPair]] = []
        for task in TASKS:
            task_pairs = [pair for pair in pairs if pair.task == task]
            if not task_pairs:
                continue
            units = _lists(task_pairs) if tuning.loss == "lists" else [[pair] for pair in task_pairs]
            size = max(1, tuning.batch_pairs * len(units) // len(task_pairs))  # units per batch
            rng.shuffle(units)
            for start in range(0, len(units), size * _SORTED_BATCHES):
                group = units[start : start + size * _SORTED_BATCHES]
                group.sort(key=lambda unit: sum(len(pair.query) + len(pair.passage) for pair in unit))
                epoch_batches += [list(chain(*group[i : i + size])) for i in range(0, len(group), size)]
        rng.shuffle(epoch_batches)
        batches += epoch_batches
    return batches


def _lists(pairs: list[TrainingPair]) -> list[list[TrainingPair]]:
    """Group the pairs by query."""
    lists: dict[str, list[TrainingPair]] = {}
    for pair in pairs:
        lists.setdefault(pair.query, []).append(pair)
    return list(lists.values())


def accumulate(
    model: LocalTeacher,
    batch: list[TrainingPair],
    part_tokens: int,
    tuning: TeacherTuningConfig,
    *,
    room: float = 0,
) -> tuple[Tensor, int]:
    """Add the gradient of a batch's loss, in parts of about ``part_tokens`` to limit memory.

    The loss of pairs is the mean yes/no cross-entropy; that of lists is a softmax over each query's passages, plus a
    fraction of the yes/no cross-entropy. A list that exceeds ``part_tokens`` is computed in several parts; those whose
    activations do not fit into ``room`` (``graph_room``) are computed twice, with the same dropout. Returns the loss
    and the number of truncated pairs.
    """
    task, of_lists = batch[0].task, tuning.loss == "lists"
    inputs, num_truncated = model.tokenize([(pair.query, pair.passage) for pair in batch], task)
    by_list: dict[str | int, list[int]] = {}
    for pair_index, pair in enumerate(batch):
        by_list.setdefault(pair.query if of_lists else pair_index, []).append(pair_index)
    lists = list(by_list.values())
    pair_weight = tuning.pair_weight if of_lists else 1.0
    lengths = [max(len(inputs[pair_index]) for pair_index in indices) * len(indices) for indices in lists]
    together = token_budget_batches(lengths, max_tokens=part_tokens, max_items=len(lists))
    seeds: list[int] = torch.randint(1 << 31, (len(together),)).tolist()
    total = torch.zeros((), device=model.device)
    for list_numbers, seed in zip(together, seeds, strict=True):
        rows = [inputs[pair_index] for list_number in list_numbers for pair_index in lists[list_number]]
        targets = torch.tensor(
            [batch[pair_index].target for list_number in list_numbers for pair_index in lists[list_number]],
            device=model.device,
        )
        sizes = [len(lists[list_number]) for list_number in list_numbers]

        def loss_of(log_odds: Tensor, targets: Tensor = targets, sizes: Sequence[int] = sizes) -> Tensor:
            yes_or_no = functional.binary_cross_entropy_with_logits(log_odds, targets, reduction="sum")
            part_loss = pair_weight * yes_or_no / len(batch)
            for scores, labels in zip(log_odds.split(sizes), targets.split(sizes), strict=True):
                if of_lists and float(labels.sum()) > 0:
                    part_loss = part_loss + functional.cross_entropy(scores, labels / labels.sum()) / len(lists)
            return part_loss

        def compute(part: Sequence[int], rows: Sequence[Any] = rows) -> Tensor:
            return model(*model.pad([rows[index] for index in part]), task)[0]

        row_lengths = [len(ids) for ids in rows]
        micro_batches = token_budget_batches(row_lengths, max_tokens=part_tokens, max_items=len(rows))
        total += backpropagate_parts(model, compute, micro_batches, row_lengths, loss_of, room=room, seed=seed)
    return total, num_truncated
