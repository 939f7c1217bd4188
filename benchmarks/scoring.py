"""How fast the student scores passages, beside the plain procedure and the machine's own limit.

One run, the same inputs: a query against N passages with the default head (anchored, rich features), in pairs a second:
- the reference: every pair's features written out, [a; b; a * b; |a - b|], through the unsplit network in float32;
- `Student.score`: query half once, product part folded into the passage's weights, the machine's fast number format;
- the limit: bare matrix products of exactly the shapes that the network has, in the same number format.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from d2llm import Student
from d2llm.core.recipe import StudentConfig
from d2llm.ops.scoring import Linear, multilayer_perceptron, pair_features

NUM_PASSAGES = 10_000
REPEATS = 7
RESULT = Path(__file__).parent / "results" / "scoring.json"


def seconds(work: Callable[[], object]) -> float:
    """Median time of some calls after one that is not counted."""
    work()
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    """Measure, print a table, write the JSON."""
    student = Student.create(StudentConfig())
    dim, interaction, dtype = student.vector_dim, student.interaction, student.backbone.compute_dtype
    rng = np.random.default_rng(0)
    query = rng.standard_normal(dim, dtype=np.float32)
    passages = rng.standard_normal((NUM_PASSAGES, dim), dtype=np.float32)
    branch = interaction.branches["asymmetric"]
    linears = [interaction.first, interaction.shared, branch[0], branch[2], interaction.output]  # type: ignore[index]
    layers = [Linear(layer.weight, layer.bias) for layer in linears]

    def reference() -> None:
        with torch.inference_mode():
            for start in range(0, NUM_PASSAGES, 1000):
                block = torch.from_numpy(passages[start : start + 1000])
                multilayer_perceptron(pair_features(torch.from_numpy(query).expand_as(block), block, "rich"), layers)

    shapes = [(dim, layers[0].weight.shape[0])] * 2 + [tuple(reversed(layer.weight.shape)) for layer in layers[1:]]
    products = [(torch.randn(NUM_PASSAGES, a, dtype=dtype), torch.randn(a, b, dtype=dtype)) for a, b in shapes]

    def limit() -> None:
        with torch.inference_mode():
            for left, right in products:
                torch.mm(left, right)

    times = {
        "reference, float32": seconds(reference),
        f"Student.score, {str(dtype).removeprefix('torch.')}": seconds(
            lambda: student.score(query, passages, "asymmetric")
        ),
        "bare products (limit)": seconds(limit),
    }
    base = times["reference, float32"]
    result = {
        name: {"pairs_per_second": NUM_PASSAGES / value, "ratio_to_reference": base / value}
        for name, value in times.items()
    }
    for name, row in result.items():
        print(f"{name:28} {row['pairs_per_second']:12,.0f} pairs/s   {row['ratio_to_reference']:5.2f} x")
    RESULT.write_text(json.dumps({"num_passages": NUM_PASSAGES, "dim": dim, "rows": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
