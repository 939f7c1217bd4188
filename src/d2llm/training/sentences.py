"""Describes the results of a run's steps in sentences for the user."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from d2llm.core.names import counted
from d2llm.core.types import Task
from d2llm.recipe import TrainingConfig
from d2llm.training.distill import DistillReport
from d2llm.training.fit_scores import FitScoresReport
from d2llm.training.gate import GateReport, Precheck
from d2llm.training.label import LabelReport

_NEGLIGIBLE = 0.002  # a change of the dev measure that is not meaningful
_FEW = 50


def describe_precheck(look: Precheck) -> str:
    """How an untuned teacher compares with the cosine, and what its tuning has to make up for."""
    sets = ", ".join(f"{row.name} {row.measure} {row.teacher:.3f} against {row.cosine:.3f}" for row in look.sets)
    if look.difference >= 0:
        return f"precheck: the untuned teacher is as good as the cosine or better: {sets}"
    return (
        f"precheck: the untuned teacher is worse than the cosine by {-look.difference:.3f} on average ({sets}). Its "
        "tuning has to make up for that, or the gate will close and its labels will not be used. If that is unlikely, "
        "stop now and name a better teacher"
    )


def describe_gates(gates: Mapping[str, bool]) -> str:
    """The data sets whose gate is open, and those whose gate is closed."""
    by_verdict = {
        word: [name for name, is_open in gates.items() if is_open == (word == "open")] for word in ("open", "closed")
    }
    return "; ".join(f"{word} for {', '.join(names)}" for word, names in by_verdict.items() if names)


def gate_advice(report: GateReport) -> str:
    """Which gates are closed, and what the recipe does in that case."""
    sentences: list[str] = []
    if report.num_seen:
        sentences.append(
            f"{report.num_seen} of the queries were used to fit the ensemble's weights, so its results are optimistic."
        )
    if report.num_truncated:
        pairs = counted(report.num_truncated, "pair was", "pairs were")
        sentences.append(f"{pairs} truncated to the teacher's length limit.")
    if report.num_undecided:
        sentences.append(
            f"{report.num_undecided:,} of {report.num_scored:,} pairs got no answer and count as undecided."
        )
    if report.num_ungraded:
        sentences.append(
            f"{report.num_ungraded:,} candidates have no grade of the teacher and come last in both rankings; record "
            "or ask for more of the dev candidates if that is many."
        )
    if not report.closed:
        return " ".join(
            ["gate: open for every data set: the teacher is significantly better than the cosine.", *sentences]
        )
    closed = ", ".join(report.closed)
    sentences.insert(0, f"gate: closed for {closed}: the teacher is not significantly better than the cosine there.")
    consequence = {
        "labels": "The recipe's when_closed is 'labels': the student learns there from the data set's own judgements.",
        "teacher": "The recipe's when_closed is 'teacher': its labels are used anyway.",
        "stop": "The recipe's when_closed is 'stop'. Tune the teacher further, combine it with the cosine, or raise "
        "queries in [gate] if the difference is small.",
    }
    return " ".join([*sentences, consequence[report.settings.when_closed]])


def describe_labels(report: LabelReport) -> str:
    """How many pairs were labelled now, and how many had labels already."""
    if not report.pairs and report.ended_by is None:
        pairs, queries = counted(report.finished_pairs, "pair"), counted(report.finished_queries, "query")
        return f"all {pairs} of {queries} already had labels"
    before = f"; {counted(report.finished_pairs, 'pair')} already had labels" if report.finished_pairs else ""
    spent = f", at a cost of {report.cost:.2f}" if report.cost else ""
    ended = ""
    if report.ended_by is not None:
        ended = (
            f"; {counted(report.unfinished_pairs, 'pair is', 'pairs are')} left, because {report.ended_by} was "
            "reached: label again to go on, or raise the limit"
        )
    undecided = f", {report.num_undecided:,} of them undecided (log-odds 0)" if report.num_undecided else ""
    cut = f", {report.num_truncated:,} cut to the teacher's length limit" if report.num_truncated else ""
    pairs, queries = counted(report.pairs, "pair"), counted(report.queries, "query")
    return f"{pairs} of {queries} labelled{undecided}{cut}{spent}{before}{ended}"


def describe_distillation(report: DistillReport) -> str:
    """The result of a distillation: steps, dev, score features, and the calibration of its probabilities."""
    dev = [
        f"{name} {result['start']:.3f} -> {result['kept']:.3f} ({result['num_items']:,} questions or pairs)"
        for name, result in report.dev.items()
    ]
    words = f"{describe_score_features(report.score_features)}; " if report.score_features else ""
    return (
        f"{counted(report.steps, 'step')}, best at {report.best_step:,}; dev: {', '.join(dev)}; {words}probabilities: "
        f"{describe_calibration(report.probabilities)}; in {report.folder}"
    )


def describe_score_features(fitted: Mapping[Task, Mapping[str, Any]]) -> str:
    """How much the score features gain on dev, and where it is left out."""
    sentences: list[str] = []
    for task, result in fitted.items():
        changes = ", ".join(f"{name} {before:.3f} -> {fused:.3f}" for name, (before, fused) in result["dev"].items())
        if not result["dev"]:
            changes = "the weights of the student that training started from"
        is_used = any(result["weights"].values())
        left_out = "" if is_used else " (no better, so they are left out)"
        sentences.append(f"words and other score features in the {task} score: {changes}{left_out}")
    return "; ".join(sentences)


def describe_calibration(fitted: Mapping[Task, Mapping[str, Any]]) -> str:
    """How well the probabilities of each task are calibrated."""
    return (
        ", ".join(
            f"{task} (expected calibration error {fit['error_before']:.3f} before, {fit['error_after']:.3f} after)"
            for task, fit in fitted.items()
        )
        or "too few dev queries"
    )


def untrained_advice(report: DistillReport, training: TrainingConfig) -> str:
    """Advice for a distillation that learnt nothing: the dev results, and which setting to change."""
    starts, ends = ([result[key] for result in report.dev.values()] for key in ("start", "last"))
    changes = ", ".join(f"{name} {result['start']:.4f} -> {result['last']:.4f}" for name, result in report.dev.items())
    change = fmean(ends) - fmean(starts)
    worse = [name for name, result in report.dev.items() if result["last"] < result["start"]]
    if min(starts) > 1 - _NEGLIGIBLE:
        advice = "The start leaves nothing to gain on dev: use harder dev questions, or keep the start"
    elif change < -_NEGLIGIBLE:
        advice = (
            f"Training made it worse: lower training.learning_rate ({training.learning_rate:g} now) to a third, and "
            "check that the training questions are of the same kind as those of dev"
        )
    elif change > _NEGLIGIBLE:
        advice = (
            f"The mean rose, but {', '.join(worse) or 'a data set'} lost more than chance explains, and such a state "
            "is not kept: lower training.learning_rate, or keep less of the change (training.interpolation)"
        )
    else:
        advice = (
            f"It hardly moved in {report.steps:,} steps: raise training.learning_rate ({training.learning_rate:g} now) "
            "threefold, or training.epochs"
        )
    few = [f"{name} {result['num_items']}" for name, result in report.dev.items() if result["num_items"] < _FEW]
    if few:
        advice += f". So few dev questions cannot show a small gain ({', '.join(few)}): use {2 * _FEW} or more"
    return (
        "nothing was learnt: no state of the run was better on dev than the start, so the student was written as it "
        f"was before training (dev, start -> last evaluation: {changes}). {advice}. Then run it with --again"
    )


def describe_fit_scores(report: FitScoresReport) -> str:
    """What ``fit-scores`` fitted."""
    features, probabilities, task = report.score_features, report.probabilities, report.task
    facts = [
        describe_score_features({task: features}) if features else "words were not fitted",
        f"probabilities: {describe_calibration({task: probabilities} if probabilities else {})}",
    ]
    for name, measure, fitted in (
        ("quality", "auc", report.quality),
        ("words", "explained", report.term_weights),
        ("document expansion", "explained", report.document_expansion),
    ):
        if fitted is not None:
            values = (f"{measure} {value:.3f} on {dataset}" for dataset, value in fitted[measure].items())
            facts.append(f"{name}: {', '.join(values)}")
    return "; ".join(facts)
