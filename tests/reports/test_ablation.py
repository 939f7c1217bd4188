"""Ablation reports as table, Markdown and HTML page, with figures computed by hand."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from d2llm.core.types import Task
from d2llm.recipe import GradedTeacherConfig
from d2llm.recipe.recipe import load_recipe
from d2llm.recipe.variants import VARIANTS
from d2llm.reports.ablation import ablation_document, ablation_table, forest_plot, groups, remarks, variants_table
from d2llm.reports.html import page as page_of
from d2llm.training.ablation_report import AblationReport, FailedRun, MeasuredSet, RunResult, named_measures, summarise

HOSTILE = "<script>alert(1)</script>|*x*"


def result(variant: str, seed: int, one: float, two: float) -> RunResult:
    weights: dict[Task, float] = {} if variant == "cosine" else {"asymmetric": 0.5, "symmetric": 0.25 * seed}
    return RunResult(variant, seed, (one + two) / 2, {"one": one, HOSTILE: two}, weights, 200, 140, 61.4, "f")


def report(num_seeds: int = 3) -> AblationReport:
    values = {
        "recipe": [(0.5, 0.7), (0.6, 0.7), (0.4, 0.7)],
        "cosine": [(0.4, 0.7), (0.5, 0.7), (0.3, 0.7)],  # -.05 with every seed
        "without-ci": [(0.5, 0.8), (0.6, 0.9)],  # +.05, +.1
        "rich": [],
    }
    results = [result(name, s, *v) for name, pairs in values.items() for s, v in enumerate(pairs[:num_seeds])]
    base, rows = summarise(["cosine", "without-ci", "rich"], results)
    return AblationReport(
        recipe=HOSTILE,
        measure="nDCG@10",
        sets=(MeasuredSet("one", "asymmetric", 473, 4000, 1000), MeasuredSet(HOSTILE, "symmetric", 500, 385, 900)),
        seeds=tuple(range(num_seeds)),
        base=base,
        rows=rows,
        same={"paper": "recipe", "without-fi": "cosine"},
        missing=tuple(("rich", seed) for seed in range(num_seeds)),
        failed=(FailedRun("without-ci", 2, "the loss became nan"),),
        settings={"device": HOSTILE},
        notes=("one note",),
        folder="runs/x/ablation/0123",
    )


def figures(ablation: AblationReport) -> dict[str, list[str]]:
    """Variant -> its figures in the wide table."""
    return {name: cells for name, _, *cells in ablation_table(ablation, wide=True).texts()}


def printed(table: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


class TestCells:
    def test_figures_by_hand(self) -> None:
        rows = figures(report())
        # Recipe: means .6, .65, .55, so s = .05 and the half width 4.30265 * .05 / sqrt(3) = .1242.
        expected = ["0.6000 ±0.1242", "–", "0.5000", "0.7000", "asym 0.50\nsym 0.25", "140 of 200", "61", "3 of 3"]
        assert rows["recipe"] == expected
        assert rows["cosine"][:2] == ["0.5500 ±0.1242", "-0.0500 ±0.0000"]
        assert rows["cosine"][4] == "–"
        # Differences .05 and .1: s = .0354, t(1) = 12.7062, half width 12.7062 * .0354 / sqrt(2) = .3177.
        assert rows["without-ci"][1] == "+0.0750 ±0.3177"
        assert rows["without-ci"][-1] == "2 of 3"
        assert rows["rich"] == ["–", "–", "–", "–", "–", "–", "–", "0 of 3"]

    def test_one_seed_has_no_intervals(self) -> None:
        assert figures(report(1))["cosine"][:2] == ["0.5500", "-0.0500"]
        assert "±" not in remarks(report(1))[0]
        assert "±: 95 % interval over seeds" in remarks(report())[0]

    def test_groups_are_in_order(self) -> None:
        names = [[row.name for row in rows] for rows in groups(report())]
        assert names == [["recipe"], ["cosine"], ["without-ci"], ["rich"]]

    def test_skipped_missing_and_failed_runs_are_listed(self) -> None:
        text = "\n".join(remarks(report()))
        assert "paper: not trained, the same as the recipe" in text
        assert "without-fi: not trained, the same as cosine" in text
        assert "the budget ended before 3 runs (rich with seed 0, rich with seed 1, rich with seed 2); the same" in text
        assert "without-ci with seed 2 could not be trained: the loss became nan" in text
        assert (
            "one (asymmetric): trained on 1,000 queries, nDCG@10 measured on 473 dev queries against 4,000 passages"
            in text
        )
        assert text.endswith("one note")
        many = replace(report(), missing=tuple(("rich", seed) for seed in range(7)))
        assert "before 7 runs (rich with seed 0, " in "\n".join(remarks(many))
        assert "rich with seed 4 and 2 more)" in "\n".join(remarks(many))


def test_the_measures_of_all_sets_are_named() -> None:
    graded = MeasuredSet("graded", "symmetric", 4800, 480, 90, "Spearman")
    sets = (*report().sets, graded)
    assert named_measures(report().sets) == "nDCG@10"
    assert named_measures([graded]) == "Spearman"
    ablation = replace(report(), sets=sets, measure=named_measures(sets))
    assert ablation_table(ablation).columns[1].heading == "nDCG@10 and Spearman"
    assert remarks(ablation)[0].startswith("nDCG@10 and Spearman: mean over data sets and seeds on dev; ")
    assert (
        "graded (symmetric): trained on 90 queries, Spearman measured on 4,800 dev pairs, the same"
        in remarks(ablation)[3]
    )
    page = page_of(ablation_document(ablation))
    assert "nDCG@10 and Spearman of each variant minus" in page
    assert ">nDCG@10 and Spearman, variant minus recipe</text>" in page


def test_the_terminal_table_shows_every_row() -> None:
    text = printed(ablation_table(report()))
    for row in ("recipe", "cosine", "without-ci", "rich"):
        assert f"│ {row} " in text
    assert "+0.0750" in text
    assert "±0.3177" in text
    assert "the published head" not in text  # `paper` was not trained
    assert text.startswith(f"Ablations of {HOSTILE}")  # verbatim, not interpreted as markup
    assert max(map(len, printed(ablation_table(report()), 120).splitlines())) <= 120
    assert "…" not in printed(ablation_table(report()), 120)


def test_the_best_is_bold() -> None:
    better = result("cosine", 0, 0.9, 0.9), result("cosine", 1, 0.9, 0.9), result("cosine", 2, 0.9, 0.9)
    base, rows = summarise(["cosine"], [*report().base.runs, *better])
    ablation = replace(report(), base=base, rows=rows)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(ablation_table(ablation))
    bold = re.findall(r"\x1b\[1m([^\x1b]*)\x1b", console.file.getvalue())  # pyright: ignore[reportAttributeAccessIssue]
    assert {"cosine", "0.9000"} <= {part.strip() for part in bold}
    assert not any("recipe" in part for part in bold)
    rows = [line for line in ablation_document(ablation).to_markdown().splitlines() if line.startswith("| **cosine** ")]
    assert ["| **0.9000** ±0.0000 |" in row for row in rows] == [True]


def test_the_best_needs_all_seeds_of_the_recipe() -> None:
    ablation = report()
    assert ablation.rows[1].mean == pytest.approx(0.7)  # above the recipe's .6, but with two of its three seeds
    assert ablation.best == "recipe"
    assert replace(ablation, base=summarise([], [])[0]).best is None


def test_markdown_rows_have_the_same_number_of_cells() -> None:
    lines = [line for line in ablation_document(report()).to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 + 4  # two header lines, four group headings and four rows
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {11}
    assert "<script>" not in ablation_document(report()).to_markdown().partition("## Settings")[0].replace(
        r"\<script\>", ""
    )


class TestListing:
    def test_every_variant_is_listed_with_its_title(self) -> None:
        text = printed(variants_table(None))
        for variant in VARIANTS.values():
            assert f" {variant.name} " in text
            assert f" {variant.title} " in text
        assert "changes nothing" not in text
        titles = [section.title for section in variants_table(None).sections]
        assert titles == ["baseline", "published", "losses", "own"]

    def test_variants_that_change_nothing_are_marked(self) -> None:
        table = printed(variants_table(load_recipe("d2llm-paper")))
        lines = [line for line in table.splitlines() if "changes nothing" in line]
        assert {"concat", "cold-start"} < {line.split("│")[1].strip() for line in lines}
        assert len(lines) < 10

    def test_variants_that_a_recipe_cannot_have_are_marked(self) -> None:
        recipe = load_recipe("d2llm-paper")
        graded = recipe.model_copy(
            update={"teacher": GradedTeacherConfig(), "losses": recipe.losses.with_imitation({}, of_pairs=True)}
        )
        lines = [line for line in printed(variants_table(graded)).splitlines() if "not possible" in line]
        assert [line.split("│")[1].strip() for line in lines] == ["subclass-imitation"]


class TestPage:
    def test_the_page_loads_nothing_and_runs_no_scripts(self) -> None:
        page = page_of(ablation_document(report()))
        style = re.search(r"<style>(.*?)</style>", page, re.S)
        assert style
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert f"default-src 'none'; style-src 'sha256-{digest}'" in page
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert not re.findall(r"(?:src|href)=\"(?!data:,)[^#\"]", page)
        assert " style=" not in page

    def test_the_page_contains_every_figure(self) -> None:
        page = page_of(ablation_document(report()))
        assert page.count('<svg id="plot-ablation" ') == 1
        for row in (report().base, *report().rows):
            assert f"<bdi>{row.name}</bdi>" in page
        printed = re.sub("</?(small|strong)>", "", page)
        for cells in figures(report()).values():
            assert all(f"<td>{cell}</td>".replace("\n", "<br>") in printed for cell in cells)
        assert "one note" in page

    def test_the_plot_is_drawn_to_scale(self) -> None:
        plot = forest_plot(report())
        assert plot is not None
        root = ElementTree.fromstring(plot)
        groups_ = {g.find("text").text: g for g in root.iter("g")}  # pyright: ignore[reportOptionalMemberAccess]
        assert set(groups_) == {"cosine", "without-ci"}  # rich has no runs
        scale = x_scale(root)
        dots = {name: float(g.findall("circle")[-1].get("cx", "")) for name, g in groups_.items()}
        assert scale(dots["cosine"]) == pytest.approx(-0.05, abs=1e-3)
        assert scale(dots["without-ci"]) == pytest.approx(0.075, abs=1e-3)
        seeds = [scale(float(c.get("cx", ""))) for c in groups_["without-ci"].findall("circle")[:-1]]
        assert seeds == pytest.approx([0.05, 0.1], abs=1e-3)
        line = groups_["without-ci"].findall("line")[0]
        ends = [scale(float(line.get(key, ""))) for key in ("x1", "x2")]
        assert ends == pytest.approx([0.075 - 0.3177, 0.075 + 0.3177], abs=2e-3)
        assert groups_["cosine"].get("class") == "variant worse"  # the interval is the point -.05
        assert groups_["without-ci"].get("class") == "variant"
        assert [text.text for text in root.iter("text") if "strong" in text.get("class", "")] == [
            "baseline",
            "published",
        ]

    def test_clipped_intervals_end_in_an_arrow(self) -> None:
        results = [result(n, s, v, v) for n, s, v in (("recipe", 0, 0.5), ("recipe", 1, 0.5))]
        results += [result("cosine", 0, 0.5, 0.5), result("cosine", 1, 0.6, 0.6)]  # .05 +- .635
        base, rows = summarise(["cosine"], results)
        plot = forest_plot(replace(report(), base=base, rows=rows))
        assert plot is not None
        root = ElementTree.fromstring(plot)
        scale = x_scale(root)
        lines = root.findall("g/line")
        ends = [scale(float(lines[0].get(key, ""))) for key in ("x1", "x2")]
        assert ends == pytest.approx([-0.4, 0.4], abs=0.05)
        assert len(lines) == 1 + 2 + 2  # two strokes for each arrow

    def test_without_differences_there_is_no_plot(self) -> None:
        base, rows = summarise(["cosine"], [])
        empty = replace(report(), base=base, rows=rows)
        assert forest_plot(empty) is None
        assert "There is no variant yet" in page_of(ablation_document(empty))


def x_scale(root: ElementTree.Element) -> Callable[[float], float]:
    """A function from coordinates to differences, derived from the first and last tick."""
    ticks = [text for text in root.iter("text") if text.get("class") == "tick"]
    (x1, v1), (x2, v2) = (
        (float(t.get("x", "")), float((t.text or "").replace("−", "-"))) for t in (ticks[0], ticks[-1])
    )
    return lambda x: v1 + (x - x1) / (x2 - x1) * (v2 - v1)
