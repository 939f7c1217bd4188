"""Decides on dev whether the gates of an interaction's bound are worth anything.

A gate is there to make the bound of a pair smaller, so that an exact search scores fewer passages in full. Gates that
are almost the same for every text do not: the mean of their product over the dev pairs, multiplied into the bound once,
gives as good rankings and as few passages to score.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch

from d2llm.models.interaction import Interaction
from d2llm.models.student import Student
from d2llm.training.choose_weights import Items, by_position, worse_sets
from d2llm.training.dev_sets import DevSet, EncodedDev, encode_dev

_DEPTH, _TOLERATED, _MORE = 10, 0.001, 1.01


def make_idle_gates_constant(student: Student, dev_sets: Sequence[DevSet], *, seed: int) -> bool:
    """Give every text the same gates, unless that is worse on dev; whether it was done.

    It is worse if some dev set is significantly worse (``choose_weights.worse_sets``), if their mean falls by more than
    .001, or if more passages of the dev lists could be among the first ten by their bounds. Only tasks in which the
    interaction counts are measured.
    """
    head = student.interaction
    if not isinstance(head, Interaction) or head.query_gate is None or head.passage_gate is None:
        return False
    used = [encode_dev(student, dev) for dev in dev_sets if head.changes_scores(dev.task)]
    if not used:
        return False
    gates = (head.query_gate, head.passage_gate)
    learned = [(gate.weight.detach().clone(), gate.bias.detach().clone()) for gate in gates]
    before, to_score = _measure(student, used)
    mean_gate = fmean(_mean_gate(student, head, encoded) for encoded in used)
    with torch.no_grad():
        for gate in gates:
            gate.weight.zero_()
            gate.bias.fill_(float(torch.logit(torch.tensor(mean_gate**0.5, dtype=torch.float64))))
    after, to_score_without = _measure(student, used)
    lost = fmean(fmean(before[name].values()) - fmean(after[name].values()) for name in before)
    if worse_sets(before, after, seed=seed) or lost > _TOLERATED or to_score_without > _MORE * to_score:
        with torch.no_grad():
            for gate, (weight, bias) in zip(gates, learned, strict=True):
                gate.weight.copy_(weight)
                gate.bias.copy_(bias)
        return False
    return True


def _mean_gate(student: Student, head: Interaction, encoded: EncodedDev) -> float:
    """The mean of r_q r_p over the pairs of a dev set."""
    queries, passages = (
        torch.from_numpy(vectors).to(student.device) for vectors in (encoded.queries, encoded.passages)
    )
    with torch.inference_mode():
        bound = head.bound(encoded.dev.task)
        of_queries = (head.query_bound(queries, encoded.dev.task) / bound).cpu().numpy()
        of_passages = head.passage_bound(passages).cpu().numpy()
    return fmean(float(gate * of_passages[rows].mean()) for gate, rows in zip(of_queries, encoded.rows, strict=True))


def _measure(student: Student, used: Sequence[EncodedDev]) -> tuple[Items, float]:
    """The dev measure of each item, and how many passages a query's bounds leave on average."""
    items: Items = {}
    left: list[int] = []
    for encoded in used:
        scores: list[np.ndarray] = []
        for query, rows in zip(encoded.queries, encoded.rows, strict=True):
            passages = encoded.passages[rows]
            scorer = student.prepare(query, encoded.dev.task)
            dot = student.score(query, passages, encoded.dev.task, interaction_weight=0.0)
            scores.append(scorer(passages))
            if len(rows) > _DEPTH:
                tenth = np.partition(scores[-1], -_DEPTH)[-_DEPTH]
                left.append(int((dot + scorer.bound * student.passage_bound(passages) >= tenth).sum()))
        items[encoded.dev.name] = by_position(encoded.dev.measure(scores).by_item)
    return items, fmean(left) if left else 0.0
