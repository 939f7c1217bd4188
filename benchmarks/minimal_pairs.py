"""Minimal pairs: of two passages with nearly the same words, is the right one scored above the wrong one?

The items (generated.minimal_pairs) come in twins, so a scorer that looks at the passages alone is right in half of
them. Measured per kind: BM25, the untuned backbone's cosine, the shipped student, and heads fitted to the training
items, whose content words do not occur in the test items: on the backbone's frozen vectors, and with LoRA on the
backbone.

`python benchmarks/minimal_pairs.py` measures a small part in about two minutes, `--full` everything in
docs/limit-set.md. Finished cells are kept in the JSON and not measured again; `--fresh` starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from generated.minimal_pairs import DEFAULT_ITEMS, KINDS, MinimalPair, Split, make_minimal_pairs
from limit_set import COLOURS, HEADS, Cell, Cells, arguments, new_head, optimise, pyplot, save
from limit_set_text import load_system
from torch import Tensor, nn

from d2llm import Student
from d2llm.core.table import Column, Table
from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.recipe import BackboneConfig, Frozen, Lora, StudentConfig
from d2llm.retrieval.reading import encode_pairs
from d2llm.store.bm25 import WordIndex

QUICK_ITEMS: dict[Split, int] = {"train": 200, "dev": 60, "test": 100}
SYSTEMS = (
    "BM25",
    "cosine, untuned MiniLM",
    "d2llm-minilm, cosine part, symmetric",
    "d2llm-minilm, symmetric",
    "d2llm-minilm, asymmetric",
)
PROJECTED_DIM, HIDDEN = 128, 64
FROZEN_STEPS, LORA_STEPS, LORA_TWINS = 500, 100, 16
FROZEN_RATES, LORA_RATES = (0.001, 0.003), (0.0003, 0.002)
NUM_SEEDS = {"frozen": 3, "lora": 1}
RATE_SEED = {"frozen": 100, "lora": 0}
Items = tuple[MinimalPair, ...]
Score = Callable[[Items], Tensor]  # -> [items, 2], the right passage's score and the wrong one's


def verdicts(scores: Tensor) -> str:
    """One digit an item: 2 right above wrong, 1 a tie, 0 wrong above right."""
    return "".join(str(int(sign) + 1) for sign in torch.sign(scores[:, 0] - scores[:, 1]).tolist())


def result(score: Score, items: Items) -> Cell:
    """Accuracy of each kind, counting a tie as one half, and the verdicts it is computed from."""
    cell: Cell = {}
    for kind in KINDS:
        digits = verdicts(score(tuple(item for item in items if item.kind == kind)))
        cell |= {kind: sum(int(digit) for digit in digits) / 2 / len(digits), f"{kind} verdicts": digits}
    return cell


def accuracy(score: Score, items: Items) -> float:
    cell = result(score, items)
    return sum(cell[kind] for kind in KINDS) / len(KINDS)


def interval(cells: Sequence[Cell], kind: str, *, num_samples: int = 2000) -> tuple[float, float, float]:
    """Mean accuracy and the 95 % bootstrap interval over twins and seeds together."""
    digits = np.array([[int(digit) for digit in cell[f"{kind} verdicts"]] for cell in cells]) / 2  # [seeds, items]
    twins = digits.reshape(len(cells), -1, 2).mean(axis=2)
    generator = np.random.default_rng(0)
    means = [
        twins[generator.integers(len(twins), size=len(twins))][
            :, generator.integers(twins.shape[1], size=twins.shape[1])
        ].mean()
        for _ in range(num_samples)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(twins.mean()), float(low), float(high)


def bm25_scores(items: Items) -> Tensor:
    texts = list(dict.fromkeys(text for item in items for text in (item.right, item.wrong)))
    index, row = WordIndex.from_texts(texts), {text: position for position, text in enumerate(texts)}
    pairs = [index.score(index.query(item.query), np.array([row[item.right], row[item.wrong]]))[0] for item in items]
    return torch.from_numpy(np.stack(pairs))


def system_scores(name: str, items: Items) -> Tensor:
    if name == "BM25":
        return bm25_scores(items)
    student = load_system(name)
    task = "asymmetric" if "asymmetric" in name else "symmetric"
    pairs = [(item.query, text) for item in items for text in (item.right, item.wrong)]
    return torch.from_numpy(encode_pairs(student, pairs).score(student, task).reshape(-1, 2))


@cache
def untuned() -> Any:
    return Student.create(StudentConfig(backbone=BackboneConfig(tuning=Frozen())))


@cache
def frozen_vector(texts: tuple[str, ...]) -> Tensor:
    return torch.from_numpy(untuned().encode_passages(texts).vectors)


def pair_scores(head: nn.Module, queries: Tensor, passages: Tensor) -> Tensor:
    """Queries [n, d], passages [2 n, d] (right, wrong, right, ...) -> [n, 2], in blocks of all against all."""
    blocks: list[Tensor] = []
    for start in range(0, len(queries), 32):
        block = head(queries[start : start + 32], passages[2 * start : 2 * start + 64])
        own = 2 * torch.arange(len(block))[:, None] + torch.arange(2)
        blocks.append(block.gather(1, own))
    return torch.cat(blocks)


def twin_loss(head: nn.Module, queries: Tensor, passages: Tensor) -> Tensor:
    """Cross-entropy of twins, vectors [2 t, d] each: query 2 i belongs to passage 2 i and not to 2 i + 1, and so on."""
    positives = torch.eye(len(queries), dtype=torch.bool)
    own = torch.block_diag(*torch.ones(len(queries) // 2, 2, 2)).bool()
    return in_batch_cross_entropy(head(queries, passages), positives, own)


def fit(
    embed: Callable[[list[str]], Tensor],
    head: nn.Module,
    groups: list[dict[str, Any]],
    splits: dict[Split, Items],
    *,
    steps: int,
    num_twins: int,
    check_every: int,
) -> Cell:
    """Fit on random twins of the training items; the test verdicts are from the step that is best on dev."""
    train = splits["train"]
    best: Cell = {"dev": -1.0}
    calls = 0

    def score(items: Items) -> Tensor:
        queries = embed([item.query for item in items])
        return pair_scores(head, queries, embed([text for item in items for text in (item.right, item.wrong)]))

    def check() -> None:
        nonlocal best
        with torch.no_grad():
            if (dev := accuracy(score, splits["dev"])) > best["dev"]:
                best = {"dev": dev, "step": calls, **result(score, splits["test"])}

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls % check_every == 0:
            check()
        chosen = torch.randperm(len(train) // 2)[:num_twins].tolist()
        batch = [train[2 * twin + which] for twin in chosen for which in (0, 1)]
        return twin_loss(head, embed([item.query for item in batch]), embed([item.right for item in batch]))

    optimise(groups, steps, loss)
    check()
    return best


def fit_frozen(name: str, seed: int, rate: float, splits: dict[Split, Items]) -> Cell:
    """One linear map of the backbone's own vectors, and a head."""
    rows: dict[str, int] = {}
    for items in splits.values():
        for item in items:
            for text in (item.query, item.right, item.wrong):
                rows.setdefault(text, len(rows))
    vectors = frozen_vector(tuple(rows))
    head = new_head(name, PROJECTED_DIM, seed, HIDDEN)
    torch.manual_seed(seed)
    project = nn.Linear(vectors.shape[1], PROJECTED_DIM, bias=False)
    groups: list[dict[str, Any]] = [{"params": [*project.parameters(), *head.parameters()], "lr": rate}]
    return fit(
        lambda texts: project(vectors[[rows[text] for text in texts]]),
        head,
        groups,
        splits,
        steps=FROZEN_STEPS,
        num_twins=32,
        check_every=100,
    )


def fit_lora(name: str, seed: int, rate: float, splits: dict[Split, Items]) -> Cell:
    """The backbone with LoRA, the student's pooling (warm start), and a head."""
    config = StudentConfig(backbone=BackboneConfig(tuning=Lora(rank=16, alpha=32, dropout=0.05)))
    student = Student.create(config, seed=seed)
    student.prepare_training(seed=seed)
    head = new_head(name, student.vector_dim, seed, HIDDEN)
    torch.manual_seed(seed)

    def embed(texts: list[str]) -> Tensor:
        student.train(torch.is_grad_enabled())
        return student(*student.backbone.pad(student.tokenize(texts, "passage").ids))

    tuned = [*(p for p in student.backbone.parameters() if p.requires_grad), *student.pooling.parameters()]
    groups: list[dict[str, Any]] = [{"params": tuned, "lr": rate}, {"params": list(head.parameters()), "lr": 0.002}]
    return fit(embed, head, groups, splits, steps=LORA_STEPS, num_twins=LORA_TWINS, check_every=LORA_STEPS + 1)


def fitted(cells: Cells, kind: str, name: str, num_seeds: int, splits: dict[Split, Items]) -> list[Cell]:
    """The cells of all seeds, at the learning rate that is best on dev for one seed."""
    work, rates = (fit_frozen, FROZEN_RATES) if kind == "frozen" else (fit_lora, LORA_RATES)

    def cell(rate: float, seed: int) -> Cell:
        return cells.get((kind, name, f"rate={rate}", f"seed={seed}"), lambda: work(name, seed, rate, splits))

    rate = max(rates, key=lambda rate: cell(rate, RATE_SEED[kind])["dev"])
    return [cell(rate, seed) for seed in range(num_seeds)]


def rows_of(cells: Cells, *, full: bool) -> dict[str, list[Cell]]:
    """Row name -> the cells of its seeds."""
    splits = make_minimal_pairs(num_items=DEFAULT_ITEMS if full else QUICK_ITEMS)
    rows: dict[str, list[Cell]] = {}
    for name in SYSTEMS:
        rows[name] = [
            cells.get(
                ("system", name), lambda name=name: result(lambda items: system_scores(name, items), splits["test"])
            )
        ]
    for kind in ("frozen", "lora") if full else ("frozen",):
        for name in HEADS[:3]:
            title = f"{name}, {'frozen vectors' if kind == 'frozen' else 'backbone tuned'}"
            rows[title] = fitted(cells, kind, name, NUM_SEEDS[kind] if full else 1, splits)
    return rows


def print_table(rows: dict[str, list[Cell]]) -> None:
    table = Table("system", Column("seeds"), *(Column(kind) for kind in KINDS))
    for name, cells in rows.items():
        values = (interval(cells, kind) for kind in KINDS)
        table.add_row(name, len(cells), *(f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in values))
    print(f"\n{table.to_markdown()}")


def draw(rows: dict[str, list[Cell]]) -> None:
    """Accuracy of each system, one panel per kind."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(KINDS), figsize=(9.5, 3.6), sharey=True, layout="constrained")
    names = list(rows)[::-1]
    for panel, kind in zip(panels, KINDS, strict=True):
        for index, name in enumerate(names):
            mean, low, high = interval(rows[name], kind)
            colour = COLOURS.get(name.split(",")[0], "#666666") if "frozen" in name or "tuned" in name else "#666666"
            colour = "#666666" if "untuned" in name else colour
            panel.plot([low, high], [index, index], color=colour, linewidth=2)
            panel.plot(mean, index, "o", color=colour, markersize=5)
        panel.axvline(0.5, color="#999999", linestyle=":", linewidth=1)
        panel.set(title=kind, xlim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=range(len(names)), yticklabels=names)
    figure.supxlabel("fraction of items whose right passage is scored above the wrong one (dotted: chance)", fontsize=9)
    save(figure, "minimal-pairs.svg")


def main() -> None:
    """Measure missing cells, print the table, draw the plot."""
    options = arguments(__doc__ or "")
    cells = Cells("minimal-pairs", options)
    rows = rows_of(cells, full=options.full)
    print_table(rows)
    cells.report()
    if options.full:
        draw(rows)


if __name__ == "__main__":
    main()
