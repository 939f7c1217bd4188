"""How much of the limit set's capacity generalises: heads from other worlds, and unseen queries.

1. frozen: a head with random weights, or fitted in one other world or in four of them together, is frozen, and the
   vectors of a new world are fitted with it. The new judgements can then only be represented by the vectors.
2. unseen: a small network makes a query from its two passages; 30 % of the pairs are held out.

`python benchmarks/limit_set_unseen.py` measures a small part in less than a minute, `--full` everything in
docs/limit-set.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from limit_set import (
    CALIBRATION_SEED,
    CAPACITY_STEPS,
    HEADS,
    Cell,
    Cells,
    Head,
    arguments,
    capacity_rates,
    draw_by_width,
    fit_vectors,
    fraction_right,
    new_head,
    optimise,
    qrels_of,
)
from torch import Tensor, nn

from d2llm.core.table import Column, Table
from d2llm.ops.losses import in_batch_cross_entropy

NUM_PASSAGES, ITEM_DIM = 20, 64
UNSEEN_STEPS, UNSEEN_RATES = 400, (0.01, 0.03)
FROZEN_DIM, NUM_WORLDS, FROZEN_SEEDS = 4, 4, 1
ORIGINS = ("as drawn", "fitted in one world", f"fitted in {NUM_WORLDS} worlds")


def fit_worlds(head: Head, dim: int, seed: int, rates: tuple[float, float]) -> float:
    """Fit one head and the vectors of several worlds, one world per step; returns the mean fraction right."""
    torch.manual_seed(seed)
    pairs, relevant = qrels_of(NUM_PASSAGES)
    worlds = [
        [nn.Parameter(torch.randn(number, dim)) for number in (len(pairs), NUM_PASSAGES)] for _ in range(NUM_WORLDS)
    ]

    def loss() -> Tensor:
        queries, passages = worlds[int(torch.randint(NUM_WORLDS, ()))]
        return in_batch_cross_entropy(head(queries, passages), relevant, torch.ones_like(relevant))

    vectors = [parameter for world in worlds for parameter in world]
    groups: list[dict[str, Any]] = [
        {"params": vectors, "lr": rates[0]},
        {"params": list(head.parameters()), "lr": rates[1]},
    ]
    optimise(groups, CAPACITY_STEPS * NUM_WORLDS, loss)
    with torch.no_grad():
        return float(np.mean([fraction_right(head(*world), relevant) for world in worlds]))


def frozen(cells: Cells, name: str, origin: str, seed: int) -> Cell:
    """Fit vectors of a new world to a frozen head; ``source`` is the fraction right in the head's own world."""
    rates = capacity_rates(cells, name)

    def measure() -> Cell:
        head, source = new_head(name, FROZEN_DIM, seed), float("nan")
        if origin == ORIGINS[1]:
            source = fit_vectors(head, FROZEN_DIM, NUM_PASSAGES, 50 + seed, rates)["right"]
        elif origin == ORIGINS[2]:
            source = fit_worlds(head, FROZEN_DIM, 50 + seed, rates)
        new = fit_vectors(head, FROZEN_DIM, NUM_PASSAGES, seed, rates, frozen=True)
        return new if origin == ORIGINS[0] else {"source": source, **new}

    return cells.get(("frozen", origin, name, f"seed={seed}"), measure)


def fit_composed(name: str, dim: int, seed: int, rate: float) -> Cell:
    """Fit a small network that makes query (i, j) from the sum of two learned item vectors; some pairs are held out."""
    head = new_head(name, dim, seed)
    torch.manual_seed(seed)
    pairs, relevant = qrels_of(NUM_PASSAGES)
    order = torch.randperm(len(pairs))
    num_dev, num_test = round(0.1 * len(pairs)), round(0.3 * len(pairs))
    dev, test, train = order[:num_dev], order[num_dev : num_dev + num_test], order[num_dev + num_test :]
    items = nn.Parameter(torch.randn(NUM_PASSAGES, ITEM_DIM))
    passages = nn.Parameter(torch.randn(NUM_PASSAGES, dim))
    network = nn.Sequential(nn.Linear(ITEM_DIM, ITEM_DIM), nn.ReLU(), nn.Linear(ITEM_DIM, dim))

    def scores(rows: Tensor) -> Tensor:
        return head(network(items[pairs[rows]].sum(dim=1)), passages)

    def loss() -> Tensor:
        return in_batch_cross_entropy(scores(train), relevant[train], torch.ones_like(relevant[train]))

    parameters = [items, passages, *network.parameters(), *head.parameters()]
    optimise([{"params": parameters, "lr": rate}], UNSEEN_STEPS, loss)
    with torch.no_grad():
        parts = {"train": train, "dev": dev, "right": test}
        return {part: fraction_right(scores(rows), relevant[rows]) for part, rows in parts.items()}


def unseen(cells: Cells, name: str, dim: int, seed: int) -> Cell:
    def dev(rate: float) -> float:
        return cells.get(("unseen rates", name, rate), lambda: fit_composed(name, 8, CALIBRATION_SEED, rate))["dev"]

    rate = max(UNSEEN_RATES, key=dev)
    return cells.get(("unseen", name, f"d={dim}", f"seed={seed}"), lambda: fit_composed(name, dim, seed, rate))


def measure_unseen(cells: Cells, *, full: bool) -> dict[str, dict[int, list[Cell]]]:
    """Head -> width -> cells of all seeds."""
    dims, num_seeds = ((2, 4, 8, 16, 32), 2) if full else ((4, 16), 1)
    return {
        name: {dim: [unseen(cells, name, dim, seed) for seed in range(num_seeds)] for dim in dims} for name in HEADS
    }


def print_unseen(cells: dict[str, dict[int, list[Cell]]]) -> None:
    dims = list(cells[HEADS[0]])
    print(f"\nUnseen queries, n = {NUM_PASSAGES}: fraction right of test pairs, mean (range over seeds); train:\n")
    table = Table("head", *(Column(f"width {dim}") for dim in dims))
    for name, by_dim in cells.items():
        shown: list[str] = []
        for of_seeds in by_dim.values():
            values, train = ([cell[part] for cell in of_seeds] for part in ("right", "train"))
            shown.append(f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f}); {np.mean(train):.2f}")
        table.add_row(name, *shown)
    print(table.to_markdown())


def print_frozen(cells: Cells) -> None:
    print(f"\nFrozen head, new vectors, width {FROZEN_DIM}, n = {NUM_PASSAGES}: fraction right (in its own world)\n")
    table = Table("head", *(Column(origin) for origin in ("initial weights", *ORIGINS[1:])))
    for name in (HEADS[1], HEADS[3]):
        columns: list[str] = []
        for origin in ORIGINS:
            of_seeds = [frozen(cells, name, origin, seed) for seed in range(FROZEN_SEEDS)]
            source = "" if origin == ORIGINS[0] else f" ({np.mean([cell['source'] for cell in of_seeds]):.2f})"
            columns.append(", ".join(f"{cell['right']:.2f}" for cell in of_seeds) + source)
        table.add_row(name, *columns)
    print(table.to_markdown())


def main() -> None:
    """Measure missing cells, print the tables, draw the plot."""
    options = arguments(__doc__ or "")
    cells = Cells("limit-set-unseen", options)
    unseen_cells = measure_unseen(cells, full=options.full)
    print_unseen(unseen_cells)
    if options.full:
        print_frozen(cells)
        fractions = {
            name: {dim: [cell["right"] for cell in of_seeds] for dim, of_seeds in by_dim.items()}
            for name, by_dim in unseen_cells.items()
        }
        draw_by_width(fractions, {}, "unseen queries with both\nanswers on top", "limit-set-unseen.svg")
    cells.report()


if __name__ == "__main__":
    main()
