"""A limit set for vectors: how many different answers can each head give from vectors of a given width?

Every pair of n passages is the answer of one query (Weller et al. 2025, arXiv 2508.21038). The vectors are free: they
and the head are fitted to all judgements, which is the best case for any encoder. limit_set_unseen.py tests how much of
this generalises to queries and worlds that were not fitted; limit_set_text.py uses texts.

`python benchmarks/limit_set.py` measures a small part in less than a minute, `--full` everything in docs/limit-set.md.
Finished cells are kept in a JSON file and not measured again; `--fresh` starts over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2llm.core.extras import require
from d2llm.core.files import write_json
from d2llm.core.table import Column, Table
from d2llm.data.limit_set import all_pairs
from d2llm.models.interaction import Interaction
from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.recipe import InteractionConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"
IMAGES = ROOT / "docs" / "images"

HEADS = ("cosine", "paper", "dot", "dot, B ≤ 64")
COLOURS: dict[str, str] = dict(zip(HEADS, ("#4477AA", "#EE6677", "#228833", "#AA3377"), strict=True))
HIDDEN = 32
CAPACITY_STEPS = 1000
CAPACITY_RATES = ((0.03, 0.003), (0.1, 0.003), (0.1, 0.01), (0.3, 0.01))  # of the vectors, of the head
CALIBRATION_SEED = 100
Cell = dict[str, Any]


def moment_curve(num_passages: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vectors of width 4 that solve the limit set of any size in exact arithmetic, by inner product.

    Passage t is (cos t, sin t, cos 2t, sin 2t), all of equal length. (1 - cos(t - a)) (1 - cos(t - b)) is 0 at a and b,
    above 0 elsewhere; its negative is, up to a constant, an inner product of t's vector with one made of a and b. The
    margin shrinks as n^-4, so the precision of the numbers limits n. Trigonometric moment curve: Gale 1963.

    Returns:
        queries [n (n - 1) / 2, 4] in the order of ``all_pairs``, passages [n, 4].
    """
    angles = 2 * np.pi * np.arange(num_passages) / num_passages
    first, second = angles[np.array(all_pairs(num_passages))].T
    both = first + second
    queries = [np.cos(first) + np.cos(second), np.sin(first) + np.sin(second), -np.cos(both) / 2, -np.sin(both) / 2]
    passages = [np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(2 * angles)]
    return np.stack(queries, axis=1), np.stack(passages, axis=1)


class Head(nn.Module):
    """Scores of all queries against all passages, from vectors that are first scaled to the length sqrt(dim)."""

    def __init__(self, name: str, dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(20.0).log()) if name == "cosine" else None
        if name != "cosine":
            config = InteractionConfig(
                head="paper" if name == "paper" else "dot",
                features="concat" if name == "paper" else "rich",
                hidden_dim=hidden,
                feature_dim=hidden,
                max_bound=64.0 if "64" in name else 8.0,
            )
            self.interaction = Interaction(config, dim)

    def forward(self, queries: Tensor, passages: Tensor) -> Tensor:
        queries, passages = _same_length(queries), _same_length(passages)
        if self.log_scale is not None:
            return queries @ passages.T * (self.log_scale.exp() / queries.shape[1])
        return self.interaction(queries, passages, "asymmetric").logits


def _same_length(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=1) * vectors.shape[1] ** 0.5


class Cells:
    """Measured values by their key, saved in a JSON file as soon as they are available."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.path = path = (RESULTS if options.full else QUICK_RESULTS) / f"{name}.json"
        self.values: dict[str, Cell] = {}
        self.requested: set[str] = set()
        self.num_measured = 0
        if path.is_file() and not options.fresh:
            self.values = json.loads(path.read_text(encoding="utf-8"))["cells"]

    def get(self, key: Sequence[object], measure: Callable[[], Cell]) -> Cell:
        name = " | ".join(str(part) for part in key)
        self.requested.add(name)
        if name not in self.values:
            start = time.process_time()
            value = measure()
            self.values[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in value.items()}
            self.values[name]["seconds"] = round(time.process_time() - start, 1)
            self.num_measured += 1
            write_json(self.path, {"cells": self.values})
        return self.values[name]

    def report(self) -> None:
        seconds = sum(cell["seconds"] for cell in self.values.values())
        num_reused = len(self.requested) - self.num_measured
        print(f"\n{self.num_measured} cells measured, {num_reused} read from {self.path.relative_to(ROOT)}", end=" ")
        print(f"(all cells together: {seconds:.0f} CPU seconds; --fresh measures again)")


def optimise(groups: list[dict[str, Any]], steps: int, loss: Callable[[], Tensor | None]) -> int:
    """Adam with a short warm-up and linear decay until ``loss`` returns None; returns the number of steps."""
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps) + 0.01
    )
    for step in range(steps):
        value = loss()
        if value is None:
            return step
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    return steps


def fraction_right(scores: Tensor, relevant: Tensor) -> float:
    """Fraction of the queries whose two answers are the first two."""
    return relevant.gather(1, scores.topk(2, dim=1).indices).all(dim=1).double().mean().item()


def qrels_of(num_passages: int) -> tuple[Tensor, Tensor]:
    """Pairs [queries, 2] and which passages answer which query [queries, passages]."""
    pairs = torch.tensor(all_pairs(num_passages))
    return pairs, torch.zeros(len(pairs), num_passages, dtype=torch.bool).scatter_(1, pairs, True)


def fit_vectors(
    head: Head, dim: int, num_passages: int, seed: int, rates: tuple[float, float], *, frozen: bool = False
) -> Cell:
    """Fit free vectors, and the head unless it is frozen, to every judgement; stop when all queries are right."""
    torch.manual_seed(seed)
    pairs, relevant = qrels_of(num_passages)
    queries, passages = (nn.Parameter(torch.randn(number, dim)) for number in (len(pairs), num_passages))
    everything = torch.ones_like(relevant)
    best, calls = 0.0, 0

    def loss() -> Tensor | None:
        nonlocal best, calls
        scores = head(queries, passages)
        if calls % 20 == 0:
            best = max(best, fraction_right(scores, relevant))
        calls += 1
        return None if best == 1 else in_batch_cross_entropy(scores, relevant, everything)

    head.requires_grad_(not frozen)
    groups: list[dict[str, Any]] = [{"params": [queries, passages], "lr": rates[0]}]
    if not frozen:
        groups.append({"params": list(head.parameters()), "lr": rates[1]})
    steps = optimise(groups, CAPACITY_STEPS, loss)
    with torch.no_grad():
        best = max(best, fraction_right(head(queries, passages), relevant))
    return {"right": best, "steps": steps}


def new_head(name: str, dim: int, seed: int, hidden: int = HIDDEN) -> Head:
    torch.manual_seed(1000 + seed)
    return Head(name, dim, hidden)


def capacity_rates(cells: Cells, name: str) -> tuple[float, float]:
    def right(rates: tuple[float, float]) -> float:
        head = new_head(name, 4, CALIBRATION_SEED)
        key = ("capacity rates", name, rates)
        cell = cells.get(key, lambda: fit_vectors(head, 4, 20, CALIBRATION_SEED, rates))
        return cell["right"] - cell["steps"] / 1e6  # among rates that get all right, the fastest

    return max(CAPACITY_RATES, key=right)


def capacity(cells: Cells, name: str, dim: int, num_passages: int, seed: int) -> Cell:
    rates = capacity_rates(cells, name)
    return cells.get(
        ("capacity", name, f"d={dim}", f"n={num_passages}", f"seed={seed}"),
        lambda: fit_vectors(new_head(name, dim, seed), dim, num_passages, seed, rates),
    )


def constructed(num_passages: int, dtype: torch.dtype) -> float:
    """Share right of the constructed vectors of width 4, rounded to ``dtype``."""
    queries, passages = (torch.from_numpy(part).to(dtype).double() for part in moment_curve(num_passages))
    return fraction_right(queries @ passages.T, qrels_of(num_passages)[1])


def capacity_plan(*, full: bool) -> list[tuple[int, int, int]]:
    """Width, passages, seeds."""
    if not full:
        return [(2, 10, 1), (4, 10, 1)]
    plan = [(dim, size, 2) for dim in (2, 4, 8) for size in (4, 6, 8, 10, 15, 20)]
    plan += [(4, 30, 1), (8, 30, 1), (8, 40, 1)]
    return plan + [(dim, size, 1) for dim in (16, 32) for size in (20, 40)]


def measure_capacity(cells: Cells, *, full: bool) -> dict[tuple[str, int], dict[int, float]]:
    """(head, width) -> passages -> fraction of queries right, mean over seeds."""
    means: dict[tuple[str, int], dict[int, float]] = {}
    for dim, size, num_seeds in capacity_plan(full=full):
        for name in HEADS:
            values = [capacity(cells, name, dim, size, seed)["right"] for seed in range(num_seeds)]
            means.setdefault((name, dim), {})[size] = float(np.mean(values))
    return means


def print_capacity(means: dict[tuple[str, int], dict[int, float]]) -> None:
    dims = sorted({dim for _, dim in means})
    print("\nShare of queries whose two answers are the first two, vectors fitted to all judgements:\n")
    for dim in dims:
        sizes = sorted(means[HEADS[0], dim])
        table = Table(f"width {dim}", *(Column(f"n = {size}", ".2f") for size in sizes))
        for name in HEADS:
            table.add_row(name, *(means[name, dim][size] for size in sizes))
        print(table.to_markdown(), end="\n\n")
    largest = Table("largest n tried with all right", *(Column(f"width {dim}") for dim in dims))
    parameters = Table("parameters of", *(Column(f"width {dim}", ",") for dim in dims))
    for name in HEADS:
        largest.add_row(name, *(critical(means[name, dim]) for dim in dims))
        parameters.add_row(f"the head: {name}", *(num_used(Head(name, dim)) for dim in dims))
    parameters.add_row("vectors, n = 20", *(210 * dim for dim in dims))
    print(largest.to_markdown(), parameters.to_markdown(), sep="\n\n")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        wrong = next((size for size in range(3, 121) if constructed(size, dtype) < 1), None)
        reach = "up to n = 120, where we stopped" if wrong is None else f"up to n = {wrong - 1}"
        print(f"constructed vectors of width 4, {str(dtype).removeprefix('torch.')}: all right {reach}")


def critical(means: dict[int, float]) -> str:
    """The largest size up to which every seed got everything right; "≥" if nothing larger was tried."""
    sizes = sorted(means)
    solved = [size for size in sizes if all(means[smaller] == 1 for smaller in sizes if smaller <= size)]
    if not solved:
        return f"< {sizes[0]}"
    return f"≥ {solved[-1]}" if solved == sizes else str(solved[-1])


def num_used(head: Head) -> int:
    """Number of parameters in use; those of the other task's branch are not."""
    return sum(p.numel() for name, p in head.named_parameters() if ".symmetric." not in name)


def pyplot() -> Any:
    """matplotlib with plain settings: text stays text, and the same values give the same file."""
    require("matplotlib", extra="report", purpose="drawing a plot")
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "d2llm",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, name: str) -> None:
    path = IMAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def draw_capacity(means: dict[tuple[str, int], dict[int, float]]) -> None:
    plt = pyplot()
    dims = (2, 4)
    figure, panels = plt.subplots(1, len(dims), figsize=(6.5, 2.9), sharey=True, layout="constrained")
    for panel, dim in zip(panels, dims, strict=True):
        for name in HEADS:
            values = means[name, dim]
            panel.plot(list(values), list(values.values()), "o-", color=COLOURS[name], markersize=4, label=name)
        panel.set(title=f"vectors of width {dim}", xlabel="passages n", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("queries with both\nanswers on top")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, "limit-set-capacity.svg")


def draw_by_width(values: dict[str, dict[int, list[float]]], levels: dict[str, float], ylabel: str, name: str) -> None:
    """Mean and range over seeds of each head by width, and horizontal lines for systems without a width."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    for head, by_dim in values.items():
        dims = list(by_dim)
        panel.plot(dims, [np.mean(of_seeds) for of_seeds in by_dim.values()], "o-", color=COLOURS[head], label=head)
        low, high = ([reduce(of_seeds) for of_seeds in by_dim.values()] for reduce in (min, max))
        panel.fill_between(dims, low, high, color=COLOURS[head], alpha=0.12, linewidth=0)
    dims = list(values[HEADS[0]])
    for label, level in levels.items():
        panel.axhline(level, color="#666666", linestyle=":", linewidth=1)
        panel.text(dims[0], level + 0.012, label, ha="left", fontsize=8, color="#444444")
    panel.set_xscale("log", base=2)
    panel.set(xticks=dims, xticklabels=dims, xlabel="width of the vectors", ylabel=ylabel, ylim=(-0.03, 1.08))
    panel.legend(frameon=False, fontsize=8)
    save(figure, name)


def arguments(description: str) -> argparse.Namespace:
    """Command-line options of the limit set and minimal pairs. Sets one thread, because the products are small."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all widths, sizes and seeds, as in docs/limit-set.md")
    parser.add_argument("--fresh", action="store_true", help="measure cells again that are already in the JSON")
    torch.set_num_threads(1)
    return parser.parse_args()


def main() -> None:
    """Measure missing cells, print the tables, draw the plot."""
    options = arguments(__doc__ or "")
    cells = Cells("limit-set", options)
    means = measure_capacity(cells, full=options.full)
    print_capacity(means)
    cells.report()
    if options.full:
        draw_capacity(means)


if __name__ == "__main__":
    main()
