"""Queries held out of a teacher's tuning, to stop at its best state."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.core.files import write_bytes
from d2llm.core.recipe import TeacherTuningConfig
from d2llm.core.types import Task
from d2llm.data.plan import TrainingPlan
from d2llm.data.training import TrainingPair, TrainingSource, labelled_pairs
from d2llm.models.sources import load_tensors
from d2llm.models.teachers.judge import Judge
from d2llm.models.teachers.local import LocalTeacher

_LARGEST_SHARE = 5  # at most a fifth of a plan is held out
_ALL = 1_000_000


@dataclass(frozen=True, slots=True)
class DevScore:
    """How a teacher does on held-out pairs: yes/no cross-entropy, and mean reciprocal rank of the first positive."""

    cross_entropy: float
    mrr: float

    def better_than(self, other: float | None, measure: str) -> bool:
        """Whether this is better than the value ``other`` of ``measure``."""
        value = getattr(self, measure)
        return other is None or (value < other if measure == "cross_entropy" else value > other)


@dataclass(slots=True)
class Best:
    """The best look so far: its step, its value of the measure, and how many looks ago it was."""

    step: int | None = None
    value: float | None = None
    looks_since: int = 0


class DevWatch:
    """Looks at held-out pairs while a teacher is tuned; the best state is kept in a file of the run's folder.

    A resumed run looks again at the steps after its checkpoint, with the same result, so the file fits in the end.
    """

    def __init__(self, pairs: Sequence[TrainingPair], tuning: TeacherTuningConfig, folder: Path) -> None:
        self.best = Best()
        self.path = folder / "best.safetensors"
        self._pairs, self._tuning = pairs, tuning

    @property
    def is_over(self) -> bool:
        """Whether the last ``patience`` looks brought nothing better."""
        return self.best.looks_since >= self._tuning.patience

    def measure(self, model: LocalTeacher, step: int, *, is_last: bool) -> DevScore | None:
        """Measure the model where it is due after ``step``; None where it is not."""
        if not self._pairs or self._tuning.eval_every is None or (step % self._tuning.eval_every and not is_last):
            return None
        return score_dev(model, self._pairs)

    def take_in(self, score: DevScore | None, parameters: Mapping[str, nn.Parameter], step: int) -> dict[str, float]:
        """Keep the state if it is the best; what was measured, for the log."""
        if score is None:
            return {}
        if score.better_than(self.best.value, self._tuning.dev_measure):
            self.best = Best(step, getattr(score, self._tuning.dev_measure))
            write_bytes(self.path, save({name: tensor.detach().cpu() for name, tensor in parameters.items()}))
        else:
            self.best.looks_since += 1
        return {"dev_cross_entropy": score.cross_entropy, "dev_mrr": score.mrr}

    def put_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters their best values, where there was a look at all."""
        if self.best.step is None:
            return
        best = load_tensors(self.path, remedy="delete the run's folder and tune again")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(best[name])


def hold_out(
    sources: Sequence[TrainingSource], tuning: TeacherTuningConfig, *, seed: int
) -> tuple[list[TrainingSource], list[TrainingPair]]:
    """Part the plans: sources without the held-out queries, and the held-out pairs.

    A query that shares a positive with a held-out one is left out of the training too: a passage that was a positive in
    training is easily found again.

    Args:
        sources: data sets with their plans.
        tuning: how many queries; the pairs are drawn as for training, or all of the plan's for ``mrr``.
        seed: of the draw.

    Raises:
        InputError: the plans are too small to hold anything out.
    """
    kept: list[TrainingSource] = []
    held: list[TrainingSource] = []
    for source in sources:
        entries = sorted(source.plan.entries, key=lambda entry: entry.query_id)
        random.Random(f"{seed}:dev:{source.dataset.name}").shuffle(entries)
        dev = entries[: min(tuning.dev_queries, len(entries) // _LARGEST_SHARE)]
        taken = {passage_id for entry in dev for passage_id in entry.positives}
        dev_ids = {entry.query_id for entry in dev}
        rest = [e for e in source.plan.entries if e.query_id not in dev_ids and taken.isdisjoint(e.positives)]
        kept.append(dataclasses.replace(source, plan=TrainingPlan(tuple(rest), source.plan.manifest)))
        held.append(dataclasses.replace(source, plan=TrainingPlan(tuple(dev), source.plan.manifest)))
    num_negatives = tuning.num_negatives if tuning.dev_measure == "cross_entropy" else _ALL
    pairs = labelled_pairs(held, num_negatives=num_negatives, max_queries=None, seed=seed)
    if not pairs or not any(source.plan.entries for source in kept):
        raise InputError(
            "the plans are too small to hold queries out (a fifth at most, and what shares their positives): "
            "leave eval_every out of teacher_tuning, or mine larger plans"
        )
    return kept, pairs


def score_dev(teacher: Judge, pairs: Sequence[TrainingPair]) -> DevScore:
    """Judge held-out pairs, and measure the judgement."""
    log_odds = np.empty(len(pairs), dtype=np.float32)
    by_list: dict[tuple[Task, str], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_list.setdefault((pair.task, pair.query), []).append(index)
    tasks: tuple[Task, ...] = ("symmetric", "asymmetric")
    for task in tasks:
        places = [index for (of, _), places in by_list.items() if of == task for index in places]
        if places:
            asked = [(pairs[index].query, pairs[index].passage) for index in places]
            log_odds[places] = teacher.judge(asked, task).log_odds
    targets = torch.tensor([pair.target for pair in pairs])
    loss = functional.binary_cross_entropy_with_logits(torch.from_numpy(log_odds), targets)
    is_positive = np.array([pair.is_positive for pair in pairs])
    ranks = [_reciprocal_rank(log_odds[places], is_positive[places]) for places in by_list.values()]
    return DevScore(float(loss), float(np.mean([rank for rank in ranks if rank is not None] or [0.0])))


def _reciprocal_rank(log_odds: np.ndarray, is_positive: np.ndarray) -> float | None:
    """1 / rank of the first positive, behind the negatives it ties with; None for a list without one."""
    if not is_positive.any():
        return None
    return 1.0 / (1 + int((log_odds[~is_positive] >= log_odds[is_positive].max()).sum()))
