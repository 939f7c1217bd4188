"""Texts that all reports of an evaluation share: marks, units, legends, explanations of measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from d2llm.core.table import ABSENT
from d2llm.evaluation.report import EvaluationReport, EvaluationRow
from d2llm.ops.measures import MEASURES
from d2llm.ops.pair_measures import MEANINGS

BETTER, WORSE = "*", "†"
BOLD = "Bold: the best of a column."
"""For where text can be bold, before ``legend``."""


def cost_columns(rows: Sequence[EvaluationRow]) -> list[tuple[str, list[str]]]:
    """The costs that were measured for at least one row: the heading, and a cell for each row."""
    figures = [row.cost.columns for row in rows]
    return [
        (heading, [quantity(costs[heading]) for costs in figures])
        for heading in (figures[0] if figures else ())
        if any(costs[heading] is not None for costs in figures)
    ]


def measure_names(rows: Sequence[EvaluationRow]) -> list[str]:
    """All measures of the rows, in order of first appearance."""
    return list(dict.fromkeys(measure for row in rows for measure in row.measures))


def best_rows(rows: Sequence[EvaluationRow], measure: str) -> frozenset[str]:
    """Names of the rows with the highest printed value.

    Rows with fewer items than others (such as the teacher's, on a sample) cannot be compared and are left out.
    """
    max_items = max((row.num_items for row in rows), default=0)
    values = {
        row.name: round(row.measures[measure].value, 4)
        for row in rows
        if measure in row.measures and row.num_items == max_items
    }
    return frozenset(name for name, value in values.items() if value == max(values.values()))


def mark(report: EvaluationReport, row: str, measure: str) -> str:
    """``*`` if a row is significantly better than the baseline, ``†`` if it is worse, else nothing."""
    comparison = report.comparison(row, measure)
    if comparison is None or not comparison.is_significant:
        return ""
    return BETTER if comparison.difference.value > 0 else WORSE


def legend(report: EvaluationReport) -> str:
    """The meaning of ``*`` and ``†``, in one sentence."""
    if not report.comparisons:
        return "Nothing was tested for significance."
    tests = ", ".join(dict.fromkeys(comparison.test for comparison in report.comparisons))
    return (
        f"{BETTER} significantly better, {WORSE} significantly worse than "
        f"{report.baseline} (p < 0.05, two-sided, Holm-adjusted over the rows; {tests})."
    )


def facts(report: EvaluationReport) -> list[tuple[str, str]]:
    """The facts at the top of a report: label and value."""
    unit = item_noun(report, report.num_items)
    pairs = [("data", f"{report.dataset} / {report.split}"), (unit, f"{report.num_items:,}")]
    if report.kind == "retrieval":
        pairs.append(("passages", f"{report.num_passages:,}"))
    if report.num_left_out:
        pairs.append(("left out", f"{report.num_left_out:,} without a relevant passage in the corpus"))
    return [*pairs, ("task", report.task), ("took", duration(report.seconds))]


def item_noun(report: EvaluationReport, count: int) -> str:
    """What was measured: "query", "queries", "pair" or "pairs"."""
    one, many = ("query", "queries") if report.kind == "retrieval" else ("pair", "pairs")
    return one if count == 1 else many


def sample_title(report: EvaluationReport) -> str:
    """The heading of the measures on what the teacher scored."""
    count = report.sample_rows[0].num_items
    return f"The same systems on the {count:,} {item_noun(report, count)} that the teacher scored"


def verdict(report: EvaluationReport) -> str | None:
    """The subject compared with the baseline in the main measure, in one sentence; None if they were not compared."""
    comparison = report.comparison(report.subject, report.main_measure)
    if comparison is None:
        return None
    difference = comparison.difference
    judgement = "not a significant difference"
    if comparison.is_significant:
        judgement = "significantly better" if difference.value > 0 else "significantly worse"
    return (
        f"{comparison.row} against {comparison.baseline}: {comparison.measure} {difference.value:+.4f} "
        f"[{difference.low:+.4f}, {difference.high:+.4f}], {judgement} (adjusted {p_text(comparison.adjusted_p)}, "
        f"{comparison.num_items:,} {item_noun(report, comparison.num_items)})."
    )


def meaning(measure: str) -> str | None:
    """How to read a measure, in one clause; None for an unknown measure."""
    return MEASURES[measure].meaning if measure in MEASURES else MEANINGS.get(measure.split()[0])


def p_text(value: float) -> str:
    """A p-value as ``p = 0.012`` or ``p < 0.0001``."""
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}".rstrip("0").rstrip(".")


def quantity(value: float | None) -> str:
    """A cost with about three digits: 0.098, 11.3, 1,013; a dash for None."""
    if value is None:
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 4)}f}"


def duration(seconds: float) -> str:
    """Time as ``4.2 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
