"""The results of ``ablate``: a table, and a document with a forest plot."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import get_args
from xml.etree.ElementTree import Element

from d2llm.core.document import Document, Figures, Items, Note, Section, Values
from d2llm.core.errors import RecipeError
from d2llm.core.table import Cell, Column, Style, Table
from d2llm.core.types import Task
from d2llm.ops.significance import Interval
from d2llm.recipe import Recipe
from d2llm.recipe.variants import VARIANTS, Variant, VariantGroup
from d2llm.reports.html import svg
from d2llm.training.ablation_report import BASE, MEASURE, AblationReport, AblationRow

_SHORT: dict[Task, str] = {"asymmetric": "asym", "symmetric": "sym"}
_NAME_WIDTH, _FIGURE_WIDTH = 34, 12  # characters, so that the table of two data sets fits a screen of 120
_SAMPLE = 5  # number of missing runs to list
_GROUPS: tuple[VariantGroup, ...] = get_args(VariantGroup)

_ROW, _LEFT, _WIDTH = 26.0, 190.0, 900.0
_MAX_AXIS = 4.0  # limit of the axis, in multiples of a seed's largest difference: intervals over two seeds are huge


def ablation_table(report: AblationReport, *, wide: bool = False) -> Table:
    """The recipe and its variants by group, with the half widths of intervals; the best mean is bold.

    ``wide`` puts the descriptions of variants into a separate column, for which a terminal has no room.
    """
    sets = [data.name for data in report.sets] if len(report.sets) > 1 else []
    table = Table(
        Column("variant", align="left", max_width=_NAME_WIDTH),
        *(["what it is"] if wide else []),
        Column(report.measure, ".4f", max_width=_FIGURE_WIDTH),
        Column("difference", "+.4f", max_width=_FIGURE_WIDTH),
        *(Column(name, ".4f", max_width=_FIGURE_WIDTH) for name in sets),
        Column("r", max_width=_FIGURE_WIDTH),
        Column("best step", max_width=_FIGURE_WIDTH),
        Column("s / run", ",.0f", max_width=_FIGURE_WIDTH),
        Column("seeds", max_width=_FIGURE_WIDTH),
        title=f"Ablations of {report.recipe}",
        caption="" if wide else "\n".join(remarks(report)),
    )
    for rows in groups(report):
        table.add_section(rows[0].group)
        for row in rows:
            runs = row.runs
            style: Style = "bold" if row.name == report.best else ""
            weights = "\n".join(f"{_SHORT[task]} {weight:.2f}" for task, weight in row.interaction_weights.items())
            steps = f"{fmean(r.best_step for r in runs):,.0f} of {fmean(r.steps for r in runs):,.0f}" if runs else None
            table.add_row(
                Cell(row.name, style, note="" if wide else row.title),
                *([row.title] if wide else []),
                Cell(row.mean, style, note=_half_width(row.interval)),
                Cell(row.difference, note=_half_width(row.difference_interval)),
                *(row.by_set.get(name) for name in sets),
                weights or None,
                steps,
                fmean(run.seconds for run in runs) if runs else None,
                f"{len(runs)} of {len(report.seeds)}",
            )
    return table


def ablation_document(report: AblationReport) -> Document:
    """The plot of differences, the table with its remarks, and the settings."""
    plot = forest_plot(report)
    effect = Note("There is no variant yet that has a seed in common with the recipe.")
    if plot is not None:
        effect = Figures([(plot, _plot_caption(report))], is_wide=True)
    return Document(
        f"Ablations of {report.recipe}",
        [
            Section("Effect of each change", [effect]),
            Section("All results", [ablation_table(report, wide=True), Items(remarks(report))]),
            Section("Settings", [Values({"folder": report.folder, **report.settings})]),
        ],
    )


def _plot_caption(report: AblationReport) -> str:
    return (
        f"{report.measure} of each variant minus the recipe's with the same seed, on the same dev queries or pairs. "
        "Large dot: mean; line: 95 % interval over seeds (Student's t); small dots: the seeds. Right of 0, the change "
        "helps. Coloured if the interval excludes 0; not corrected for the number of variants."
    )


def variants_table(recipe: Recipe | None) -> Table:
    """All variants by group; with a recipe, those are marked that change nothing in it, and those it cannot have."""
    table = Table("variant", "what it is")
    for group in _GROUPS:
        table.add_section(group)
        for variant in VARIANTS.values():
            if variant.group == group:
                table.add_row(variant.name, variant.title + ("" if recipe is None else _effect(variant, recipe)))
    return table


def _effect(variant: Variant, recipe: Recipe) -> str:
    """What to remark about a variant of this recipe; empty if it can be trained and differs."""
    try:
        changed = variant.apply(recipe)
    except RecipeError:
        return " (not possible in this recipe)"
    return " (changes nothing in this recipe)" if changed.model_copy(update={"name": recipe.name}) == recipe else ""


def listed() -> list[dict[str, str]]:
    """All variants as plain values."""
    return [{"name": variant.name, "group": variant.group, "title": variant.title} for variant in VARIANTS.values()]


def groups(report: AblationReport) -> list[list[AblationRow]]:
    """The recipe alone, then its variants by group."""
    rows = [[report.base], *([row for row in report.rows if row.group == group] for group in _GROUPS)]
    return [group for group in rows if group]


def remarks(report: AblationReport) -> list[str]:
    """How to read the figures, and what is missing."""
    lines = [_legend(report), *(_measured_on(report))]
    for name, equal in report.same.items():
        lines.append(f"{name}: not trained, {'the same as the recipe' if equal == BASE else f'the same as {equal}'}")
    if report.missing:
        names = [f"{name} with seed {seed}" for name, seed in report.missing]
        more = f" and {len(names) - _SAMPLE:,} more" if len(names) > _SAMPLE else ""
        first = ", ".join(names[:_SAMPLE])
        lines.append(f"the budget ended before {len(names):,} runs ({first}{more}); the same command continues")
    lines += [
        f"{failed.variant} with seed {failed.seed} could not be trained: {failed.reason}" for failed in report.failed
    ]
    return [*lines, *report.notes]


def _legend(report: AblationReport) -> str:
    mean = "mean over data sets and seeds" if len(report.sets) > 1 else "mean over seeds"
    text = f"{report.measure}: {mean} on dev; difference: variant minus recipe, seed by seed"
    if len(report.seeds) > 1:
        text += "; ±: 95 % interval over seeds (Student's t), not corrected for the number of variants"
    return f"{text}; r: weight of the interaction, chosen on dev, mean over seeds"


def _measured_on(report: AblationReport) -> Iterator[str]:
    for data in report.sets:
        items = f"dev queries against {data.num_passages:,} passages" if data.measure == MEASURE else "dev pairs"
        yield (
            f"{data.name} ({data.task}): trained on {data.num_training_queries:,} queries, {data.measure} measured on "
            f"{data.num_queries:,} {items}, the same for every run"
        )


def _half_width(interval: Interval | None) -> str:
    return "" if interval is None else f"±{(interval.high - interval.low) / 2:.4f}"


def forest_plot(report: AblationReport) -> str | None:
    """The difference of each variant with its interval and its seeds, by group; None if there is no difference yet.

    An interval that extends beyond four times the largest difference of a seed ends there with an arrow.
    """
    compared = [[row for row in rows if row.differences] for rows in groups(report)]
    compared = [rows for rows in compared if rows]
    if not compared:
        return None
    num_lines = sum(len(rows) + 1 for rows in compared)
    frame = svg.Box(_LEFT, 8, _WIDTH - 150, 8 + num_lines * _ROW)
    low, high = _extent([row for rows in compared for row in rows])
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
    for rows in compared:
        svg.label(root, "muted strong", 4, y + 0.7 * _ROW, rows[0].group)
        for row in rows:
            y += _ROW
            _draw(root, row, x, y + _ROW / 2, (low, high))
        y += _ROW
    return svg.markup(root)


def _extent(rows: list[AblationRow]) -> tuple[float, float]:
    """The ends of the axis, which covers all seeds, the intervals as far as they are drawn, and 0."""
    seeds = [value for row in rows for value in row.differences.values()]
    limit = _MAX_AXIS * max(map(abs, seeds)) or 0.01
    ends = [end for row in rows if (i := row.difference_interval) is not None for end in (i.low, i.high)]
    values = [0.0, *seeds, *(min(max(end, -limit), limit) for end in ends)]
    margin = 0.04 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin


def _draw(root: Element, row: AblationRow, x: svg.Scale, y: float, extent: tuple[float, float]) -> None:
    mean, interval = row.difference or 0.0, row.difference_interval
    text = f"{mean:+.4f} {_half_width(interval)}".rstrip()
    sign = ""
    if interval is not None and (interval.low > 0 or interval.high < 0):
        sign = " better" if interval.low > 0 else " worse"
    group = svg.add(root, "g", class_=f"variant{sign}")
    svg.add(group, "title", f"{row.title}: {text}, {len(row.differences)} seeds")
    svg.label(group, "name", 18, y + 4, row.name)
    svg.label(group, "muted", _WIDTH - 140, y + 4, text)
    if interval is not None:
        left, right = x(max(interval.low, extent[0])), x(min(interval.high, extent[1]))
        svg.line(group, "whisker", left, y, right, y)
        for end, edge, inwards in ((interval.low, left, 5), (interval.high, right, -5)):
            if extent[0] <= end <= extent[1]:
                svg.line(group, "whisker", edge, y - 4, edge, y + 4)
            else:
                svg.line(group, "whisker", edge, y, edge + inwards, y - 4)
                svg.line(group, "whisker", edge, y, edge + inwards, y + 4)
    for value in row.differences.values():
        svg.add(group, "circle", class_="seed", cx=x(value), cy=y, r=2.5)
    svg.add(group, "circle", class_="mark dot", cx=x(mean), cy=y, r=5.5)
