"""Tune the teacher on labelled pairs: yes/no cross-entropy, adapters or all weights; then it is frozen and labels."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.core.files import new_folder
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.progress import progress_bar
from d2llm.core.recipe import TeacherConfig, TeacherTuningConfig
from d2llm.core.recipe_file import tuning_settings
from d2llm.core.types import Task
from d2llm.data.training import TrainingPair, TrainingSource, labelled_pairs
from d2llm.models.device import choose_dtype, tokens_at_a_time
from d2llm.models.teachers.classifier import ClassifierTeacher
from d2llm.models.teachers.identity import TEACHER_KIND
from d2llm.models.teachers.judge import Judge, load_judge
from d2llm.models.teachers.local import LocalTeacher
from d2llm.ops.batching import token_budget_batches
from d2llm.training.teacher_dev import Best, DevWatch, hold_out
from d2llm.training.training_run import (
    CHECKPOINT,
    RunLog,
    StopSignals,
    adamw,
    learning_rate_factor,
    load_checkpoint,
    optimizer_step,
    remarks,
    require_finite,
    restore,
    save_checkpoint,
    trainable,
)

_PAIR_SHARE = 0.3  # of the yes/no loss beside the softmax over lists
_SORTED_BATCHES = 16  # batches whose pairs are sorted by length together


@dataclass(frozen=True, slots=True)
class TeacherTuningReport:
    """What a tuning run did; ``loss`` is the mean yes/no cross-entropy of the last tenth of the steps.

    With held-out queries: ``best_step`` is the step whose state was kept, ``dev`` its value of ``dev_measure``.
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
    show_progress: bool | None = None,
) -> TeacherTuningReport:
    """Tune a teacher and write it to ``folder``; an interrupted run goes on from its last checkpoint.

    Args:
        sources: data sets with their plans and tasks.
        folder: where the tuned teacher goes; ``<folder>.run`` beside it keeps checkpoint and log.
        teacher: the LLM and its prompt.
        tuning: what is trained, the schedule, and held-out queries to stop by.
        seed: of the draw of pairs, their order, and the adapter's start.
        device: by default what this machine has.
        dtype: by default what is fast there.
        show_progress: by default only on a terminal.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last whole step is kept.
        InputError: no pairs, a finished teacher already in ``folder``, a checkpoint of another run, a kind of teacher
            that is not tuned, or plans too small to hold queries out.
        TrainingDivergedError: the loss is no number; the last good checkpoint is kept.
    """
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: holds a finished teacher already; give another folder, or delete it to start anew")
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: holds files that are no teacher's; give a new or empty folder")
    started = time.monotonic()
    training, dev_pairs = hold_out(sources, tuning, seed=seed) if tuning.eval_every and sources else (sources, [])
    pairs = labelled_pairs(training, num_negatives=tuning.num_negatives, max_queries=tuning.max_queries, seed=seed)
    if not pairs:
        raise InputError("the plans hold no queries, so there is nothing to tune the teacher on; mine a plan first")
    model = _load(teacher, tuning, device=device, dtype=dtype)
    model.prepare_training(tuning.lora, tuning=tuning.tuning, seed=seed)
    part_tokens = tuning.part_tokens or tokens_at_a_time(model.device)
    batches = _epoch_batches(pairs, tuning, seed)
    parameters = trainable(model)
    optimizer = adamw([(list(parameters.values()), tuning.learning_rate, 0.0)])

    run_folder = folder.with_name(folder.name + ".run")
    run_folder.mkdir(parents=True, exist_ok=True)
    settings = _run_settings(sources, teacher, model.fingerprint, tuning, seed)
    checkpoint = load_checkpoint(run_folder, settings=settings)
    watch, losses, num_truncated, num_finished = DevWatch(dev_pairs, tuning, run_folder), list[float](), 0, 0
    if checkpoint is not None:
        restore(checkpoint, parameters, optimizer)
        losses, num_truncated = checkpoint.state["losses"], checkpoint.state["num_truncated"]
        num_finished, watch.best = checkpoint.state["num_finished"], Best(**checkpoint.state["best"])
        remarks.info("tune-teacher: goes on after step %d of an earlier run", len(losses))
    log = RunLog(run_folder, resume_step=-1 if checkpoint is None else num_finished)
    total, warmup = len(batches), int(tuning.warmup_fraction * len(batches))
    accumulate = accumulate_lists if tuning.loss == "lists" else accumulate_pairs
    signals, kept_at = StopSignals(), time.monotonic()

    def keep() -> None:
        state = {"losses": losses, "num_truncated": num_truncated, "num_finished": num_finished}
        state["best"] = asdict(watch.best)
        with signals.held():
            save_checkpoint(run_folder, len(losses), parameters, optimizer, state, settings=settings)

    model.train()
    with signals, progress_bar("tuning the teacher", total, show=show_progress) as advance:
        advance(num_finished)
        try:
            while not watch.is_over and num_finished < total:
                if len(losses) == num_finished:  # else a stop came between the step and the look at held-out queries
                    step = len(losses)
                    torch.manual_seed(seed * 1_000_003 + step)  # dropout by the step alone: resume is exact
                    loss, truncated = accumulate(model, batches[step], part_tokens)
                    require_finite(loss, step, run_folder)
                    factor = learning_rate_factor(step, warmup_steps=warmup, total_steps=total)
                    with signals.held():
                        optimizer_step(optimizer, parameters, factor=factor, max_gradient_norm=1.0)
                        losses.append(float(loss))
                        num_truncated += truncated
                measured = watch.measure(model, len(losses), is_last=len(losses) == total)
                with signals.held():
                    seen = watch.take_in(measured, parameters, len(losses))
                    log.write(len(losses), loss=losses[-1], pairs=len(batches[num_finished]), **seen)
                    num_finished += 1
                advance(1)
                if time.monotonic() - kept_at > 60 * tuning.checkpoint_minutes:
                    keep()
                    kept_at = time.monotonic()
        except KeyboardInterrupt:
            if signals.is_consistent and losses:
                keep()
                remarks.info("tune-teacher: step %d is kept in %s", len(losses), run_folder)
            raise
    keep()
    watch.put_back(parameters)
    tail = losses[-max(1, len(losses) // 10) :]
    report = TeacherTuningReport(
        folder=str(folder),
        fingerprint="",
        pairs=sum(map(len, batches[: len(losses)])),
        steps=len(losses),
        num_truncated=num_truncated,
        loss=sum(tail) / len(tail),
        seconds=time.monotonic() - started,
        best_step=watch.best.step,
        dev=watch.best.value,
    )
    content: dict[str, Any] = {
        "tuning": tuning.model_dump(),
        "seed": seed,
        "settings": settings,
        "data": [source.dataset.name for source in sources],
        "report": {key: value for key, value in asdict(report).items() if key not in ("fingerprint", "folder")},
    }
    with new_folder(folder, kind=TEACHER_KIND) as temporary:
        fingerprint = model.save(temporary, content)
    watch.path.unlink(missing_ok=True)
    (run_folder / CHECKPOINT).unlink()  # whoever deletes the finished teacher wants a new one, not this one again
    return replace(report, fingerprint=fingerprint)


def _load(
    teacher: TeacherConfig, tuning: TeacherTuningConfig, *, device: str | None, dtype: str | None
) -> LocalTeacher:
    """The teacher to tune; where every weight is tuned, these are float32, however it computes."""
    chosen = "float32" if tuning.tuning == "full" else dtype
    if teacher.new_head and tuning.tuning != "full":
        raise InputError("a new head is tuned with every weight; set teacher_tuning.tuning = 'full'")
    if teacher.new_head:
        model: Judge = ClassifierTeacher.load(teacher, device=device, dtype=chosen)
    else:
        model = load_judge(teacher, device=device, dtype=chosen)
    if not isinstance(model, LocalTeacher):
        raise InputError(
            f"teacher '{teacher.model}' has no weights here to tune; leave tune-teacher out, or name a local model"
        )
    model.compute_dtype = choose_dtype(model.device, dtype)
    return model


def _run_settings(
    sources: list[TrainingSource], teacher: TeacherConfig, fingerprint: str, tuning: TeacherTuningConfig, seed: int
) -> dict[str, Any]:
    """All that shapes a run: a checkpoint, or a tuned teacher, of anything else is another run's."""
    return {
        "recipe": tuning_settings(teacher, tuning, seed),
        "model": fingerprint,
        "plans": {source.dataset.name: source.plan.manifest["content_hash"] for source in sources},
    }


def _epoch_batches(pairs: list[TrainingPair], tuning: TeacherTuningConfig, seed: int) -> list[list[TrainingPair]]:
    """All batches of all epochs: one task each, pairs (or lists) of like length together, batches in random order."""
    batches: list[list[TrainingPair]] = []
    for epoch in range(tuning.epochs):
        rng = random.Random(f"{seed}:{epoch}")
        of_epoch: list[list[TrainingPair]] = []
        for task in ("symmetric", "asymmetric"):
            of_task = [pair for pair in pairs if pair.task == task]
            if not of_task:
                continue
            units = _lists(of_task) if tuning.loss == "lists" else [[pair] for pair in of_task]
            size = max(1, tuning.batch_pairs * len(units) // len(of_task))  # units of a batch
            rng.shuffle(units)
            for start in range(0, len(units), size * _SORTED_BATCHES):
                group = units[start : start + size * _SORTED_BATCHES]
                group.sort(key=lambda unit: sum(len(pair.query) + len(pair.passage) for pair in unit))
                of_epoch += [list(chain(*group[i : i + size])) for i in range(0, len(group), size)]
        rng.shuffle(of_epoch)
        batches += of_epoch
    return batches


def _lists(pairs: list[TrainingPair]) -> list[list[TrainingPair]]:
    """The pairs of each query together."""
    lists: dict[str, list[TrainingPair]] = {}
    for pair in pairs:
        lists.setdefault(pair.query, []).append(pair)
    return list(lists.values())


def accumulate_lists(model: LocalTeacher, batch: list[TrainingPair], part_tokens: int) -> tuple[Tensor, int]:
    """As ``accumulate_pairs``, of lists: a softmax over each query's passages, and some of the yes/no loss."""
    inputs, num_truncated = model.tokenize([(pair.query, pair.passage) for pair in batch], batch[0].task)
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(batch):
        places.setdefault(pair.query, []).append(place)
    lists = list(places.values())
    lengths = [max(len(inputs[place]) for place in of_query) * len(of_query) for of_query in lists]
    total = torch.zeros((), device=model.device)
    for part in token_budget_batches(lengths, max_tokens=part_tokens, max_items=len(lists)):
        chosen = [place for index in part for place in lists[index]]
        targets = torch.tensor([batch[place].target for place in chosen], device=model.device)
        by_list = targets.split([len(lists[index]) for index in part])

        def loss_of(log_odds: Tensor, targets: Tensor = targets, by_list: Sequence[Tensor] = by_list) -> Tensor:
            yes_or_no = functional.binary_cross_entropy_with_logits(log_odds, targets, reduction="sum")
            loss = _PAIR_SHARE * yes_or_no / len(batch)
            for scores, wanted in zip(log_odds.split([len(w) for w in by_list]), by_list, strict=True):
                if float(wanted.sum()) > 0:
                    loss = loss + functional.cross_entropy(scores, wanted / wanted.sum()) / len(lists)
            return loss

        total += _backpropagate(model, [inputs[place] for place in chosen], batch[0].task, loss_of, part_tokens)
    return total, num_truncated


def _backpropagate(
    model: LocalTeacher, inputs: list[Any], task: Task, loss_of: Callable[[Tensor], Tensor], part_tokens: int
) -> Tensor:
    """Add the gradient of a loss of the log-odds of all inputs, in memory for ``part_tokens``; returns the loss.

    Where they are more, they are read twice, as in ``gradient_cache``: for the loss, and part by part for its gradient.
    """
    parts = token_budget_batches([len(ids) for ids in inputs], max_tokens=part_tokens, max_items=len(inputs))
    if len(parts) == 1:
        loss = loss_of(model(*model.pad(inputs), task)[0])
        loss.backward()
        return loss.detach()
    seeds: list[int] = torch.randint(1 << 31, (len(parts),)).tolist()  # of the dropout, the same in both readings

    def read(number: int) -> Tensor:
        torch.manual_seed(seeds[number])
        return model(*model.pad([inputs[index] for index in parts[number]]), task)[0]

    log_odds = torch.zeros(len(inputs), device=model.device)
    with torch.no_grad():
        for number, part in enumerate(parts):
            log_odds[part] = read(number)
    log_odds.requires_grad_()
    loss = loss_of(log_odds)
    loss.backward()
    assert log_odds.grad is not None
    for number, part in enumerate(parts):
        read(number).backward(log_odds.grad[part])
    return loss.detach()


def accumulate_pairs(model: LocalTeacher, batch: list[TrainingPair], part_tokens: int) -> tuple[Tensor, int]:
    """Mean yes/no cross-entropy of a batch, with its gradient, in parts that bound memory; and the pairs cut short."""
    task = batch[0].task
    inputs, num_truncated = model.tokenize([(pair.query, pair.passage) for pair in batch], task)
    total = torch.zeros((), device=model.device)
    for part in token_budget_batches([len(ids) for ids in inputs], max_tokens=part_tokens, max_items=len(inputs)):
        log_odds, _ = model(*model.pad([inputs[index] for index in part]), task)
        labels = torch.tensor([batch[index].target for index in part], device=model.device)
        loss = functional.binary_cross_entropy_with_logits(log_odds, labels, reduction="sum") / len(batch)
        loss.backward()
        total += loss.detach()
    return total, num_truncated
