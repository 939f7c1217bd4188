"""What ``ablate`` found as a table, for a terminal and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from statistics import fmean

from rich.table import Table
from rich.text import Text

from d2llm.core.recipe import Recipe
from d2llm.core.types import Task
from d2llm.core.variants import VARIANTS
from d2llm.ops.significance import Interval
from d2llm.reports.markdown import escape
from d2llm.training.ablation.report import BASE, MEASURE, AblationReport, AblationRow

_ABSENT = "-"
_SHORT: dict[Task, str] = {"asymmetric": "asym", "symmetric": "sym"}
_NAME_WIDTH, _FIGURE_WIDTH = 34, 12  # characters, so that the table of two data sets fits a screen of 120
_SAMPLE = 5  # names of missing runs that are written out


def ablation_table(report: AblationReport) -> Table:
    """The recipe and its variants, by group; the best mean is bold."""
    table = Table(title=Text(f"Ablations of {report.recipe}"), caption=Text("\n".join(remarks(report))))
    table.caption_justify = table.title_justify = "left"
    table.add_column("", max_width=_NAME_WIDTH, overflow="fold")
    for heading in headings(report):
        table.add_column(Text(heading), justify="right", max_width=_FIGURE_WIDTH, overflow="fold")
    for group in groups(report):
        table.add_section()
        for row in group:
            style = "bold" if row.name == report.best else ""
            name = Text.assemble((row.name, style), "\n", (row.title, "dim"))
            table.add_row(name, *(Text(two_lines(cell), style) for cell in cells(report, row)))
    return table


def render_markdown(report: AblationReport) -> str:
    """The table with its remarks and settings, as CommonMark with tables; the best mean is bold."""
    titles = ["group", "variant", "what it is", *map(escape, headings(report))]
    lines = [titles, ["---"] * 3 + ["---:"] * (len(titles) - 3)]
    for group in groups(report):
        for row in group:
            mean, *others = cells(report, row)
            mean = f"**{mean}**" if row.name == report.best else mean
            lines.append([row.group, row.name, row.title, mean, *others])
    settings = json.dumps({"folder": report.folder, **report.settings}, indent=2, ensure_ascii=False)
    parts = [
        f"# Ablations of {escape(report.recipe)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "\n".join(f"- {escape(remark)}" for remark in remarks(report)),
        "## Settings",
        "\n".join(f"    {line}" for line in settings.splitlines()),
    ]
    return "\n\n".join(parts) + "\n"


def variants_table(recipe: Recipe | None) -> Table:
    """All variants by group; with a recipe, which of them are that recipe itself."""
    table = Table()
    for heading in ("group", "variant", "what it is"):
        table.add_column(heading)
    before = None
    for variant in VARIANTS.values():
        if variant.group != before:
            table.add_section()
        same = recipe is not None and variant.apply(recipe).model_copy(update={"name": recipe.name}) == recipe
        table.add_row(
            variant.group if variant.group != before else "",
            variant.name,
            f"{variant.title} (nothing changes: so is this recipe)" if same else variant.title,
        )
        before = variant.group
    return table


def listed() -> list[dict[str, str]]:
    """All variants as plain values."""
    return [{"name": one.name, "group": one.group, "title": one.title} for one in VARIANTS.values()]


def groups(report: AblationReport) -> list[list[AblationRow]]:
    """The recipe alone, then its variants by group."""
    found = [[report.base]]
    found += [[row for row in report.rows if row.group == group] for group in ("baseline", "published", "own")]
    return [rows for rows in found if rows]


def headings(report: AblationReport) -> list[str]:
    """Of ``cells``."""
    sets = [one.name for one in report.sets] if len(report.sets) > 1 else []
    return [report.measure, "difference", *sets, "r", "best step", "s / run", "seeds"]


def cells(report: AblationReport, row: AblationRow) -> list[str]:
    """The figures of a row: mean and difference with the half width of their intervals."""
    sets = [one.name for one in report.sets] if len(report.sets) > 1 else []
    weights = (f"{_SHORT[task]} {weight:.2f}" for task, weight in row.residual_weights.items())
    runs = row.runs
    return [
        _ABSENT if row.mean is None else f"{row.mean:.4f}{_half(row.interval)}",
        _ABSENT if row.difference is None else f"{row.difference:+.4f}{_half(row.difference_interval)}",
        *(f"{row.by_set[name]:.4f}" if name in row.by_set else _ABSENT for name in sets),
        " ".join(weights) or _ABSENT,
        f"{fmean(r.best_step for r in runs):,.0f} of {fmean(r.steps for r in runs):,.0f}" if runs else _ABSENT,
        f"{fmean(run.seconds for run in runs):,.0f}" if runs else _ABSENT,
        f"{len(runs)} of {len(report.seeds)}",
    ]


def two_lines(cell: str) -> str:
    """A narrower cell: the interval below the figure, one task below the other."""
    return cell.replace(" ±", "\n±").replace(f" {_SHORT['symmetric']} ", f"\n{_SHORT['symmetric']} ")


def remarks(report: AblationReport) -> list[str]:
    """How to read the figures, and what is not there."""
    lines = [_legend(report), *(_measured_on(report))]
    for name, equal in report.same.items():
        lines.append(f"{name}: not trained, {'the recipe is so already' if equal == BASE else f'the same as {equal}'}")
    if report.missing:
        names = [f"{name} with seed {seed}" for name, seed in report.missing]
        more = f" and {len(names) - _SAMPLE:,} more" if len(names) > _SAMPLE else ""
        first = ", ".join(names[:_SAMPLE])
        lines.append(f"the budget ended before {len(names):,} runs ({first}{more}); the same command goes on")
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
    for one in report.sets:
        on = f"dev queries against {one.num_passages:,} passages" if one.measure == MEASURE else "dev pairs"
        yield (
            f"{one.name} ({one.task}): trained on {one.num_training_queries:,} queries, {one.measure} measured on "
            f"{one.num_queries:,} {on}, the same for every run"
        )


def _half(interval: Interval | None) -> str:
    return "" if interval is None else f" ±{(interval.high - interval.low) / 2:.4f}"
