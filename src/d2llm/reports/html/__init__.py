"""The report of an evaluation as one self-contained HTML file, which loads no scripts, fonts or other resources."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from d2llm.core.document import Document, Values
from d2llm.evaluation.report import EvaluationReport, EvaluationRow
from d2llm.reports import phrases
from d2llm.reports.evaluation_tables import agreement_table, comparison_table, cost_table, measure_table
from d2llm.reports.html import charts


def page(document: Document) -> str:
    """A document as a page to open in a browser, mail or print; it loads nothing and runs no script."""
    return render("document.html.j2", document=document)


def render(template: str, **values: object) -> str:
    """Render a template; every value is escaped."""
    sheet = _environment().get_template("style.css").render()
    style_hash = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    page = _environment().get_template(template).render(style=Markup(sheet), style_hash=style_hash, **values)
    # Truncated JSON texts may contain lone surrogates, which are replaced.
    return page.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> Environment:
    """The environment of the templates, created once per process."""
    return Environment(
        loader=PackageLoader("d2llm.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_SIZES = (False, True)  # wide and narrow: the style sheet shows one of the two


def render_html(report: EvaluationReport) -> str:
    """The whole report as an HTML page to open in a browser, mail or print.

    All texts are escaped, and the page's content security policy forbids scripts, foreign styles and all requests.
    Sections without data say so.
    """
    sample = None
    if report.sample_rows:
        sample = measure_table(
            report, report.sample_rows, title=phrases.sample_title(report), marks=False, intervals="cells", tagged=True
        )
    return render(
        "evaluation.html.j2",
        report=report,
        phrases=phrases,
        measures=measure_table(report, report.rows, title="Measures of every system", intervals="cells", tagged=True),
        sample=sample,
        comparisons=comparison_table(report, report.comparisons, title="All comparisons", detailed=True),
        parts_of_score=comparison_table(report, report.parts, title="Without a part of the score", detailed=True),
        agreement=agreement_table(report, tagged=True),
        costs=cost_table(report, tagged=True),
        labels=_labels(report),
        **_quality_cost(report),
        **_differences(report),
        calibration=[
            (row, charts.reliability(row, "plot-calibration" if index == 1 else f"plot-calibration-{index}"))
            for index, row in enumerate(report.calibration, start=1)
        ],
        histograms=[
            (row, charts.histogram(row.counts, f"plot-histogram-{index}", name=row.name, labels=_labels(report)))
            for index, row in enumerate(report.histograms, start=1)
        ],
        made=[
            Values(report.settings),
            *(Values(value, name) for name, value in report.provenance.items()),
            Values({row.name: row.fingerprint for row in report.rows if row.fingerprint}, "Fingerprints"),
        ],
    )


def _labels(report: EvaluationReport) -> tuple[str, str]:
    """The names of the two classes in the histograms."""
    return ("relevant", "others") if report.kind == "retrieval" else ("yes", "no")


def _quality_cost(report: EvaluationReport) -> dict[str, Any]:
    """The plot of the rows with both quality and time, and the names of the others."""
    points = [
        charts.Point(
            name=row.name,
            milliseconds=time,
            quality=row.measures[report.main_measure],
            role=_role(report, row),
            on_sample=row.num_items < report.num_items,
        )
        for row in report.rows
        if (time := _milliseconds(row)) is not None and report.main_measure in row.measures
    ]
    shown = {point.name for point in points}
    return {
        "quality_cost": [
            charts.quality_cost(points, report.main_measure, phrases.item_noun(report, 1), narrow=narrow)
            for narrow in _SIZES
            if points
        ],
        "not_plotted": [row.name for row in report.rows if row.name not in shown],
        "sampled": [point.name for point in points if point.on_sample],
    }


def _milliseconds(row: EvaluationRow) -> float | None:
    """The median time, or None if a logarithmic axis cannot show it."""
    time = row.cost.total
    return time.p50 if time is not None and math.isfinite(time.p50) and time.p50 > 0 else None


def _role(report: EvaluationReport, row: EvaluationRow) -> charts.Role:
    if row.name == report.subject:
        return "subject"
    return "baseline" if row.name == report.baseline else "other"


def _differences(report: EvaluationReport) -> dict[str, Any]:
    """The plot of subject minus baseline in the main measure, or else in the first measure known for single items."""
    details = report.details
    subject, baseline = details.values.get(report.subject, {}), details.values.get(report.baseline or "", {})
    common = [measure for measure in subject if measure in baseline]
    if not common or not details.item_ids:
        return {"differences": [], "differences_measure": None}
    measure = report.main_measure if report.main_measure in common else common[0]
    changes = [
        charts.Difference(item_id, value - baseline_value)
        for item_id, value, baseline_value in zip(details.item_ids, subject[measure], baseline[measure], strict=True)
    ]
    return {
        "differences": [
            charts.differences(changes, measure, report.subject, report.baseline or "", narrow=narrow)
            for narrow in _SIZES
        ],
        "differences_measure": measure,
    }
