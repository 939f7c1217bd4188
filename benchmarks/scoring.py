"""Scoring speed of the student, compared with the plain procedure and the machine's own limit.

One run, the same inputs, processor time in one thread (so that other work on the machine matters little):
- a query against N passages with the default head (dot, rich features): every pair's features written out,
  [a; b; a * b; |a - b|], through the unsplit network in float32; `Student.score`, from float32 and from bfloat16
  vectors; and bare matrix products of exactly the shapes that scoring needs, in the same number format (the limit);
- the cost of each choice of features and width: pairs per second at N, latency of 1,000 passages in two threads.

On a CPU without bfloat16 products everything is float32, and the result is written to a separate file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from unsplit_interaction import multilayer_perceptron, pair_features

from d2llm import Student
from d2llm.models.device import choose_dtype
from d2llm.models.interaction import Interaction
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.models.vector_scorer import SCORE_BLOCK
from d2llm.ops.scoring import Linear
from d2llm.recipe import InteractionConfig

NUM_PASSAGES = 10_000
NUM_CANDIDATES = 1_000
REPEATS = 9
LIMIT_BLOCKS = (256, 512, 1024, NUM_PASSAGES)
HEADS = [("paper", "concat", 256, 512)] + [
    ("dot", features, 384, hidden)
    for features in ("concat", "product", "difference", "rich")
    for hidden in (128, 256, 512)
]
RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], object]) -> float:
    """Median time of several calls after one that is not counted."""
    work()
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return float(np.median(times))


def least_wall_seconds(work: Callable[[], object]) -> float:
    """Minimum wall time of many calls, the one least disturbed by other work on the machine. Ends after ten seconds."""
    walls: list[float] = []
    begin = time.perf_counter()
    while len(walls) < 10 * REPEATS and time.perf_counter() - begin < 10:
        start = time.perf_counter()
        work()
        walls.append(time.perf_counter() - start)
    return min(walls)


def limit_seconds(shapes: list[tuple[int, int]], dtype: torch.dtype) -> float:
    """Bare products of N rows with weights of these shapes, in the blocks that are fastest."""
    weights = [torch.randn(into, outof, dtype=dtype) for into, outof in shapes]

    def products(block: int) -> Callable[[], None]:
        inputs = [torch.randn(block, into, dtype=dtype) for into, _ in shapes]
        outputs = [torch.empty(block, outof, dtype=dtype) for _, outof in shapes]

        def work() -> None:
            with torch.inference_mode():
                for _ in range(NUM_PASSAGES // block):
                    for left, right, out in zip(inputs, weights, outputs, strict=True):
                        torch.mm(left, right, out=out)

        return work

    return min(seconds(products(block)) * NUM_PASSAGES / (NUM_PASSAGES // block * block) for block in LIMIT_BLOCKS)


def shapes_of(dim: int, hidden: int, features: str) -> list[tuple[int, int]]:
    """(in, out) of the products that scoring computes for a passage."""
    return [(dim * (2 if features in ("difference", "rich") else 1), hidden), (hidden, hidden), (hidden, hidden)]


def default_head(rng: np.random.Generator) -> tuple[dict[str, float], int]:
    """Seconds for N passages with each way of scoring with the default student, and its width."""
    student = Student.load("d2llm-minilm")
    dim, interaction, dtype = student.vector_dim, student.interaction, student.backbone.compute_dtype
    assert isinstance(interaction, Interaction)
    assert interaction.shared is not None
    query = rng.standard_normal(dim, dtype=np.float32)
    passages = rng.standard_normal((NUM_PASSAGES, dim), dtype=np.float32)
    stored = torch.from_numpy(passages).to(torch.bfloat16)
    branch = interaction.branches["symmetric"]
    linears = [interaction.first, interaction.shared, branch[0], branch[2], interaction.output]  # type: ignore[index]
    layers = [Linear(layer.weight, layer.bias) for layer in linears]

    def reference() -> None:
        with torch.inference_mode():
            for start in range(0, NUM_PASSAGES, 1000):
                block = torch.from_numpy(passages[start : start + 1000])
                multilayer_perceptron(pair_features(torch.from_numpy(query).expand_as(block), block, "rich"), layers)

    name = str(dtype).removeprefix("torch.")
    return {
        "reference, float32": seconds(reference),
        f"Student.score in {name}, of float32": seconds(lambda: student.score(query, passages, "symmetric")),
        f"Student.score in {name}, of bfloat16": seconds(lambda: student.score(query, stored, "symmetric")),
        "bare products (limit)": limit_seconds(shapes_of(dim, interaction.config.hidden_dim, "rich"), dtype),
    }, dim


def cost(rng: np.random.Generator, head: str, features: str, dim: int, hidden: int) -> dict[str, str | float]:
    """Cost of one choice of head, features and widths."""
    dtype = choose_dtype(torch.device("cpu"))
    config = InteractionConfig(head=head, features=features, hidden_dim=hidden, feature_dim=hidden)  # type: ignore[arg-type]
    module = Interaction(config, dim)
    query = torch.from_numpy(rng.standard_normal(dim, dtype=np.float32))
    passages = torch.from_numpy(rng.standard_normal((NUM_PASSAGES, dim), dtype=np.float32)).to(torch.bfloat16)
    with torch.inference_mode():
        weights = HeadWeights(module, "symmetric", dtype)

    def score(num: int) -> None:
        QueryScorer(module, weights, query, "symmetric", SCORE_BLOCK)(passages[:num])

    taken, limit = seconds(lambda: score(NUM_PASSAGES)), limit_seconds(shapes_of(dim, hidden, features), dtype)
    one_thread = seconds(lambda: score(NUM_CANDIDATES))
    torch.set_num_threads(2)
    two_threads = least_wall_seconds(lambda: score(NUM_CANDIDATES))
    torch.set_num_threads(1)
    return {
        "head": head,
        "features": features,
        "dim": dim,
        "hidden": hidden,
        "pairs_per_second": NUM_PASSAGES / taken,
        "share_of_limit": limit / taken,
        "candidates_ms_one_thread": one_thread * 1e3,
        "candidates_ms_two_threads_wall": two_threads * 1e3,
    }


def everything(rng: np.random.Generator) -> dict[str, object]:
    """Measure and print the default student beside the plain procedure and the limit, and the cost of each head."""
    times, dim = default_head(rng)
    base, limit = times["reference, float32"], times["bare products (limit)"]
    rows = {
        name: {
            "pairs_per_second": NUM_PASSAGES / value,
            "ratio_to_reference": base / value,
            "share_of_limit": limit / value,
        }
        for name, value in times.items()
    }
    for name, row in rows.items():
        speed = f"{row['pairs_per_second']:10,.0f} pairs/s {row['ratio_to_reference']:5.2f} x"
        print(f"{name:38} {speed} {row['share_of_limit']:5.0%} of the limit")
    heads = [cost(rng, head, features, dim, hidden) for head, features, dim, hidden in HEADS]
    print(f"\n{'head':9}{'features':11}{'dim x hidden':14}{'pairs/s':>9} {'of limit':>9}   1,000: 1 thread, 2 threads")
    for row in heads:
        name = f"{row['head']:9}{row['features']:11}{row['dim']} x {row['hidden']:<8}"
        latency = f"{row['candidates_ms_one_thread']:6.2f} ms {row['candidates_ms_two_threads_wall']:6.2f} ms"
        print(f"{name}{row['pairs_per_second']:9,.0f} {row['share_of_limit']:9.0%} {latency:>24}")
    return {"num_passages": NUM_PASSAGES, "dim": dim, "rows": rows, "heads": heads}


def main() -> None:
    """Measure, print tables, write the results into the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    dtype = str(choose_dtype(torch.device("cpu"))).removeprefix("torch.")
    measured = everything(rng)
    path = RESULTS / ("scoring.json" if dtype == "bfloat16" else f"scoring-{dtype}.json")
    path.write_text(json.dumps({**measured, "number_format": dtype}, indent=2) + "\n")


if __name__ == "__main__":
    main()
