"""What ``ablate`` found as one HTML file with a forest plot, that needs nothing else: nothing is loaded."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from d2llm.reports.ablation_table import cells, groups, headings, remarks, two_lines
from d2llm.reports.html import svg
from d2llm.reports.html.page import environment, styling
from d2llm.training.ablation.report import AblationReport, AblationRow

_ROW, _LEFT, _WIDTH = 26.0, 190.0, 900.0
_LARGEST = 4.0  # the axis ends at this many times the largest difference of a seed: two seeds make endless intervals

_STYLE = """
svg .better .dot { fill: var(--good); } svg .better .whisker { stroke: var(--good); }
svg .worse .dot { fill: var(--bad); } svg .worse .whisker { stroke: var(--bad); }
svg .whisker { stroke-width: 2; } svg .seed { fill: var(--muted); opacity: .55; } svg .zero { stroke: var(--ink); }
tr.group th { color: var(--muted); } td.what, th.what { text-align: left; }
tbody td { white-space: pre; } tbody td.what { white-space: normal; min-width: 11rem; }
tr.best > * { font-weight: 700; }
"""

_PAGE = """\
{% import "parts.html.j2" as parts %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{{ style_hash }}'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{{ report.recipe }} – d2llm ablations</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header><h1>Ablations of <bdi>{{ report.recipe }}</bdi></h1></header>
<main>
<section id="differences">
<h2>What each change does</h2>
{% if plot %}
<figure class="wide">
<div class="scroll" tabindex="0" role="region" aria-label="Differences to the recipe">{{ plot | safe }}</div>
<figcaption>{{ report.measure }} of each variant minus the recipe's with the same seed, on the same dev queries or
pairs. Large dot: mean; line: 95 % interval over seeds (Student's t); small dots: the seeds. Right of 0 the change
helps. Coloured where the interval leaves out 0; that is not corrected for the number of variants.</figcaption>
</figure>
{% else %}
<p>There is no variant yet with a seed that the recipe has too.</p>
{% endif %}
</section>
<section id="table">
<h2>All figures</h2>
<div class="scroll" tabindex="0" role="region" aria-label="All figures">
<table>
<thead><tr><th scope="col">variant</th><th scope="col" class="what">what it is</th>
{% for heading in headings %}<th scope="col"><bdi>{{ heading }}</bdi></th>{% endfor %}</tr></thead>
<tbody>
{% for rows in groups %}
<tr class="group"><th scope="rowgroup" colspan="{{ headings | length + 2 }}">{{ rows[0].group }}</th></tr>
{% for row in rows %}
<tr{% if row.name == report.best %} class="best"{% endif %}><th scope="row">{{ row.name }}</th>
<td class="what">{{ row.title }}</td>
{%- for cell in cells(report, row) %}<td>{{ two_lines(cell) }}</td>{% endfor %}</tr>
{% endfor %}
{% endfor %}
</tbody>
</table>
</div>
<ul>
{% for remark in remarks %}
<li><bdi>{{ remark }}</bdi></li>
{% endfor %}
</ul>
</section>
<section id="made">
<h2>What made this</h2>
<details><summary>Settings</summary>{{ parts.tree(report.settings) }}</details>
<p class="muted">Runs: <bdi>{{ report.folder }}</bdi></p>
</section>
</main>
</body>
</html>
"""


def render_page(report: AblationReport) -> str:
    """The report as a page to open in a browser, mail or print.

    Nothing in its texts acts as HTML, and the page's content security policy forbids scripts, foreign styles and every
    request.
    """
    return (
        environment()
        .from_string(_PAGE)
        .render(
            report=report,
            **styling(_STYLE),
            plot=forest_plot(report),
            headings=headings(report),
            groups=groups(report),
            cells=cells,
            two_lines=two_lines,
            remarks=remarks(report),
        )
    )


def forest_plot(report: AblationReport) -> str | None:
    """The difference of each variant with its interval and its seeds, by group; None where there is none yet.

    An interval that reaches beyond four times the largest difference of a seed ends in an arrow there.
    """
    found = [[row for row in rows if row.differences] for rows in groups(report)]
    found = [rows for rows in found if rows]
    if not found:
        return None
    num_lines = sum(len(rows) + 1 for rows in found)
    frame = svg.Box(_LEFT, 8, _WIDTH - 150, 8 + num_lines * _ROW)
    low, high = _extent([row for rows in found for row in rows])
    x = svg.linear(low, high, frame.left, frame.right)
    root = svg.chart(
        "plot-ablation",
        _WIDTH,
        frame.bottom + 48,
        title=f"Difference in {report.measure} to the recipe",
        description="One line for each variant: the mean of its differences over seeds, and their 95 % interval.",
    )
    for tick in svg.linear_ticks(low, high, 7):
        svg.line(root, "grid", x(tick), frame.top, x(tick), frame.bottom)
        svg.label(root, "tick", x(tick), frame.bottom + 16, svg.tick_text(tick), anchor="middle")
    svg.line(root, "axis zero", x(0), frame.top, x(0), frame.bottom)
    middle = (frame.left + frame.right) / 2
    svg.label(root, "axis-title", middle, frame.bottom + 38, f"{report.measure}, variant minus recipe", anchor="middle")
    y = frame.top
    for rows in found:
        svg.label(root, "muted strong", 4, y + 0.7 * _ROW, rows[0].group)
        for row in rows:
            y += _ROW
            _draw(root, report, row, x, y + _ROW / 2, (low, high))
        y += _ROW
    return svg.markup(root)


def _extent(rows: list[AblationRow]) -> tuple[float, float]:
    """Ends of the axis: all seeds, and the intervals as far as they are drawn; 0 is always inside."""
    seeds = [value for row in rows for value in row.differences.values()]
    limit = _LARGEST * max(map(abs, seeds)) or 0.01
    ends = [end for row in rows if (i := row.difference_interval) is not None for end in (i.low, i.high)]
    values = [0.0, *seeds, *(min(max(end, -limit), limit) for end in ends)]
    margin = 0.04 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin


def _draw(
    root: Element, report: AblationReport, row: AblationRow, x: svg.Scale, y: float, extent: tuple[float, float]
) -> None:
    mean, interval = row.difference or 0.0, row.difference_interval
    shown = cells(report, row)[1]
    sign = ""
    if interval is not None and (interval.low > 0 or interval.high < 0):
        sign = " better" if interval.low > 0 else " worse"
    group = svg.add(root, "g", class_=f"variant{sign}")
    svg.add(group, "title", f"{row.title}: {shown}, {len(row.differences)} seeds")
    svg.label(group, "name", 18, y + 4, row.name)
    svg.label(group, "muted", _WIDTH - 140, y + 4, shown)
    if interval is not None:
        left, right = x(max(interval.low, extent[0])), x(min(interval.high, extent[1]))
        svg.line(group, "whisker", left, y, right, y)
        for end, place, inwards in ((interval.low, left, 5), (interval.high, right, -5)):
            if extent[0] <= end <= extent[1]:
                svg.line(group, "whisker", place, y - 4, place, y + 4)
            else:
                svg.line(group, "whisker", place, y, place + inwards, y - 4)
                svg.line(group, "whisker", place, y, place + inwards, y + 4)
    for value in row.differences.values():
        svg.add(group, "circle", class_="seed", cx=x(value), cy=y, r=2.5)
    svg.add(group, "circle", class_="mark dot", cx=x(mean), cy=y, r=5.5)
