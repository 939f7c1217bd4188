"""The results of a run's steps as sentences for the user."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from d2llm.core.recipe import TrainingConfig
from d2llm.core.types import Task
from d2llm.training.distill import DistillReport
from d2llm.training.gate import FirstLook, GateReport
from d2llm.training.label import LabelReport

_HARDLY = 0.002  # a change of the dev measure that says nothing
_FEW = 50


def look_sentence(look: FirstLook) -> str:
    """How an untuned teacher does, and what its tuning has to make up for."""
    sets = ", ".join(f"{row.name} {row.measure} {row.teacher:.3f} against {row.cosine:.3f}" for row in look.sets)
    if look.difference >= 0:
        return f"first-look: untuned, the teacher is as good as the cosine or better: {sets}"
    return (
        f"first-look: untuned, the teacher is behind the cosine by {-look.difference:.3f} on average ({sets}). Its "
        "tuning has to make up for that, or the gate will close and its labels count for nothing; if you doubt it, "
        "stop now and name a better teacher"
    )


def verdict_words(gates: Mapping[str, bool]) -> str:
    """For which data sets the gate is open, and for which it is closed."""
    by_verdict = {
        word: [name for name, is_open in gates.items() if is_open == (word == "open")] for word in ("open", "closed")
    }
    return "; ".join(f"{word} for {', '.join(names)}" for word, names in by_verdict.items() if names)


def gate_advice(report: GateReport) -> str:
    """Which gates closed, and what the recipe does about it."""
    parts: list[str] = []
    if report.num_seen:
        parts.append(f"{report.num_seen} of the queries have fitted the stack's weights, so its figures flatter it.")
    if report.num_truncated:
        parts.append(f"{report.num_truncated:,} pairs were cut to the teacher's length limit.")
    if not report.closed:
        return " ".join(["gate: open for every data set: the teacher is significantly better than the cosine.", *parts])
    closed = ", ".join(report.closed)
    parts.insert(0, f"gate: closed for {closed}: the teacher is not significantly better than the cosine there.")
    consequence = {
        "labels": "The recipe's when_closed is 'labels': learn there from the data set's own judgements.",
        "teacher": "The recipe's when_closed is 'teacher': it teaches all the same.",
        "stop": "The recipe's when_closed is 'stop'. Tune the teacher further, stack it with the cosine, or raise "
        "queries in [gate] if the difference is small.",
    }
    return " ".join([*parts, consequence[report.settings.when_closed]])


def label_words(report: LabelReport) -> str:
    """What was labelled now, and what had been before."""
    if not report.pairs:
        return f"all {report.finished_pairs:,} pairs of {report.finished_queries:,} queries were labelled before"
    before = f"; {report.finished_pairs:,} pairs were labelled before" if report.finished_pairs else ""
    return f"{report.pairs:,} pairs of {report.queries:,} queries labelled{before}"


def student_words(report: DistillReport) -> str:
    """The outcome of a distillation: steps, dev, and whether its scores can be read as probabilities."""
    dev = [
        f"{name} {of_set['start']:.3f} -> {of_set['kept']:.3f} ({of_set['num_items']:,} questions or pairs)"
        for name, of_set in report.dev.items()
    ]
    words = f"{evidence_words(report.evidence)}; " if report.evidence else ""
    return (
        f"{report.steps:,} steps, best at {report.best_step:,}; dev: {', '.join(dev)}; {words}probabilities: "
        f"{probability_words(report.probabilities)}; in {report.folder}"
    )


def evidence_words(fitted: Mapping[Task, Mapping[str, Any]]) -> str:
    """What the evidence of words is worth on dev, and where it is left out."""
    parts: list[str] = []
    for task, of_task in fitted.items():
        worth = ", ".join(f"{name} {own:.3f} -> {fused:.3f}" for name, (own, fused) in of_task["dev"].items())
        is_used = any(of_task["weights"].values())
        parts.append(f"words in the {task} score: {worth}{'' if is_used else ' (no better, so they are left out)'}")
    return "; ".join(parts)


def probability_words(fitted: Mapping[Task, Mapping[str, Any]]) -> str:
    """How well the probabilities of each task are calibrated."""
    return (
        ", ".join(
            f"{task} (expected calibration error {fit['error_before']:.3f} before, {fit['error_after']:.3f} after)"
            for task, fit in fitted.items()
        )
        or "too few dev queries"
    )


def untrained_advice(report: DistillReport, training: TrainingConfig) -> str:
    """What to tell the user of a distillation that learnt nothing: the dev results, and which setting to change."""
    starts, ends = ([of_set[key] for of_set in report.dev.values()] for key in ("start", "last"))
    changes = ", ".join(f"{name} {of_set['start']:.4f} -> {of_set['last']:.4f}" for name, of_set in report.dev.items())
    change = fmean(ends) - fmean(starts)
    worse = [name for name, of_set in report.dev.items() if of_set["last"] < of_set["start"]]
    if change < -_HARDLY:
        advice = (
            f"Training made it worse: lower training.learning_rate ({training.learning_rate:g} now) to a third, and "
            "see whether the training questions are of the same kind as those of dev"
        )
    elif change > _HARDLY:
        advice = (
            f"The mean rose, but {', '.join(worse) or 'a data set'} lost more than chance explains, and such a state "
            "is not kept: lower training.learning_rate, or keep less of the change (training.interpolation)"
        )
    else:
        advice = (
            f"It hardly moved in {report.steps:,} steps: raise training.learning_rate ({training.learning_rate:g} now) "
            "threefold, or training.epochs"
        )
    few = [f"{name} {of_set['num_items']}" for name, of_set in report.dev.items() if of_set["num_items"] < _FEW]
    if few:
        advice += f". Few dev questions see no small gain ({', '.join(few)}): better {2 * _FEW} or more"
    return (
        "nothing was learnt: no state of the run was better on dev than the start, so what is written is the student "
        f"before training (dev, start -> last look: {changes}). {advice}. Then --again"
    )
