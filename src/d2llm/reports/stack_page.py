"""What ``stack`` found as one HTML file with reliability diagrams, that needs nothing else: nothing is loaded."""

from __future__ import annotations

from markupsafe import Markup

from d2llm.evaluation.report import Calibration
from d2llm.reports.html import charts
from d2llm.reports.html.page import environment, styling
from d2llm.reports.teach_tables import stack_cells, stack_headings, stack_title
from d2llm.training.stack_teachers import CalibrationFigures, StackReport, TaskReport

_STYLE = """
.pair { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair figure { flex: 1 1 18rem; max-width: 24rem; }
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{{ style_hash }}'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>Stacked teachers – d2llm</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header><h1>Stacked teachers</h1></header>
<main>
{% for task, found in report.tasks.items() %}
<section>
<h2>{{ title(task, found) }}</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Figures of {{ task }}">
<table>
<thead><tr>{% for heading in headings(found) %}<th scope="col"><bdi>{{ heading }}</bdi></th>{% endfor %}</tr></thead>
<tbody>
{% for row in found.rows %}
{% set shown = cells(row) %}
<tr><th scope="row"><bdi>{{ shown[0] }}</bdi></th>{% for cell in shown[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="muted">Lists hold all positives, and what BM25 and the cosine put first. Before: the score taken as log-odds.
After: calibrated, each query by a fit without it. ECE: expected calibration error, over ten bins.</p>
{% for pair in diagrams(task, found) %}
<div class="pair">
{% for caption, plot in pair %}
<figure>{{ plot }}<figcaption><bdi>{{ caption }}</bdi></figcaption></figure>
{% endfor %}
</div>
{% endfor %}
</section>
{% endfor %}
<p class="muted">Written to <bdi>{{ report.folder }}</bdi>, fingerprint {{ report.fingerprint }}.</p>
</main>
</body>
</html>
"""


def render_page(report: StackReport) -> str:
    """The report as a page to open in a browser, mail or print; nothing in its texts acts as HTML."""
    return (
        environment()
        .from_string(_PAGE)
        .render(
            report=report,
            **styling(_STYLE),
            title=stack_title,
            headings=stack_headings,
            cells=stack_cells,
            diagrams=_diagrams,
        )
    )


def _diagrams(task: str, found: TaskReport) -> list[list[tuple[str, Markup]]]:
    """For each row its diagram before (where there is one) and after calibration, with captions."""
    rows: list[list[tuple[str, Markup]]] = []
    for number, row in enumerate(found.rows):
        pair: list[tuple[str, Markup]] = []
        for when, figures in (("before", row.before), ("after", row.after)):
            if figures is not None:
                name = f"{row.name}, {when} calibration"
                caption = f"{name}: ECE {figures.expected_error:.4f}, log-loss {figures.log_loss:.4f}"
                pair.append((caption, _diagram(name, figures, f"plot-{task}-{number}-{when}")))
        rows.append(pair)
    return rows


def _diagram(name: str, figures: CalibrationFigures, identity: str) -> Markup:
    num_pairs = sum(part.count for part in figures.bins)
    return charts.reliability(Calibration(name, figures.bins, figures.expected_error, num_pairs), identity)
