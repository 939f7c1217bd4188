"""Is a variant of an ablation better than the recipe on each data set, and not only in the mean?

Of every finished student of `d2llm ablate`: nDCG@10 of each dev query, its mean over seeds, and a paired randomisation
test over the queries of a data set, variant against recipe. `d2llm ablate` itself has intervals over seeds, of the mean
of the data sets.

    python benchmarks/ablation_sets.py RECIPE DATA RUN --json FILE
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recorded_lists import run_parser

from d2llm import Run, Student
from d2llm.core.manifest import read_manifest
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.ops.significance import bootstrap_interval, paired_randomisation
from d2llm.training.ablate import MEASURING_SEED
from d2llm.training.ablation_report import BASE
from d2llm.training.dev_sets import DevSet, evaluate_dev, make_dev_set
from d2llm.training.settings import DEV_QUERIES

Values = dict[str, NDArray[np.float64]]
"""Data set -> the value of each dev query."""


def values_of(folder: Path, dev_sets: list[DevSet]) -> Values:
    """The values of one student."""
    weights: dict[str, float] = read_manifest(folder, KIND, FORMAT_VERSION)["interaction_weights"]
    results = evaluate_dev(Student.load(folder, device="cpu", dtype="float32"), dev_sets)
    return {name: result.by_item[weights[result.task]] for name, result in results.items()}


def compared(variant: Values, base: Values) -> dict[str, dict[str, float]]:
    """The difference on each data set, its interval over queries, and p."""
    found: dict[str, dict[str, float]] = {}
    for name, values in variant.items():
        interval = bootstrap_interval(values - base[name])
        found[name] = {
            "value": float(values.mean()),
            "difference": float((values - base[name]).mean()),
            "low": interval.low,
            "high": interval.high,
            "p": paired_randomisation(values, base[name]),
        }
    return found


def main() -> None:
    """Measure every student, and print a row for each variant."""
    parser = run_parser(__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    run = Run(given.recipe, given.run, data=str(given.data), device="cpu")
    passages = run.recipe.training.dev_passages
    dev_sets = [
        make_dev_set(source, num_queries=DEV_QUERIES, num_passages=passages, seed=MEASURING_SEED)
        for source in run.folder.sources(run.recipe)
    ]
    seeds: dict[str, list[Values]] = {}
    for manifest in sorted((given.run / "ablation").glob("*/*/seed-*/manifest.json")):
        seeds.setdefault(manifest.parent.parent.name, []).append(values_of(manifest.parent, dev_sets))
    means: dict[str, Values] = {
        variant: {dev.name: np.mean([each[dev.name] for each in found], axis=0) for dev in dev_sets}
        for variant, found in seeds.items()
    }
    results: dict[str, Any] = {"seeds": {variant: len(found) for variant, found in seeds.items()}, "variants": {}}
    print("| variant | " + " | ".join(dev.name for dev in dev_sets) + " |\n|" + "---|" * (len(dev_sets) + 1))
    for variant, values in means.items():
        found = results["variants"][variant] = compared(values, means[BASE])
        cells = [f"{each['value']:.4f} ({each['difference']:+.4f}, p {each['p']:.3f})" for each in found.values()]
        print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
