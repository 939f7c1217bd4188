"""What each score feature is worth: students of several seeds, with one kind left out of the sum.

    python benchmarks/score_features_ablation.py DATA_FOLDER --seeds 3 --work runs/score-features \
        --json benchmarks/results/score-features-ablation.json

For each seed, one student is trained on some queries of each data set, without a teacher, and the vectors of tokens
after it. Then its dev queries rank the passages near them, by words or by vectors. The weights of the score features
are fitted anew for each choice of terms, one set of weights for all data sets, and cross-fitted: each half of the dev
queries is measured with weights fitted on the other half. A repeated call continues after the last finished seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from d2llm.core.files import write_json
from d2llm.core.types import ScoreFeature
from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.ops.significance import mean_interval
from d2llm.recipe import (
    BackboneConfig,
    DataConfig,
    InteractionConfig,
    Lora,
    MiningConfig,
    Recipe,
    ResidualConfig,
    StudentConfig,
    TokensConfig,
    TrainingConfig,
)
from d2llm.recipe.losses import Objective
from d2llm.training.fit_score_features import fit_all_terms, make_feature_lists
from d2llm.training.fit_tokens import fit_tokens
from d2llm.training.run import Run

SETS = ("squad", "covidqa", "wikiqa")
KINDS: dict[str, tuple[ScoreFeature, ...]] = {
    "words": ("bm25", "bm25_fraction"),
    "words of windows": ("window_bm25", "window_bm25_fraction"),
    "vectors of windows": ("window_vectors",),
    "vectors of tokens": ("maxsim",),
}
TERMS: tuple[ScoreFeature, ...] = get_args(ScoreFeature)


def choices() -> dict[str, list[ScoreFeature]]:
    """The rows of the table and their terms: all, each kind left out, each kind alone, and none."""
    rows: dict[str, list[ScoreFeature]] = {"all": list(TERMS)}
    rows |= {f"all but {kind}": [term for term in TERMS if term not in own] for kind, own in KINDS.items()}
    both = {*KINDS["words"], *KINDS["words of windows"]}
    rows["all but both kinds of words"] = [term for term in TERMS if term not in both]
    rows |= {f"the student's score and {kind}": list(own) for kind, own in KINDS.items()}
    return rows


def recipe(data: Path, seed: int, max_queries: int) -> Recipe:
    """A small recipe without a teacher, of one branch: vectors first, then the interaction."""
    return Recipe(
        name="score_features-ablation",
        seed=seed,
        student=StudentConfig(
            backbone=BackboneConfig(
                model="minilm",
                tuning=Lora(),
                max_query_tokens=64,
                max_passage_tokens=256,
            ),
            interaction=InteractionConfig(head="dot", features="rich", dropout=0.2, gates=True),
        ),
        data=tuple(DataConfig(path=str(data / name), max_queries=max_queries) for name in SETS),
        mining=MiningConfig(sources=("bm25",)),
        losses=Objective.model_validate({"in_batch_cross_entropy": 1.0}),
        training=TrainingConfig(
            warmup_steps=5,
            epochs=2,
            eval_every=1_000,  # at the start and at the end
            patience=5,
            max_interpolation=0.5,
            residual=ResidualConfig(warmup_steps=10, off_task_penalty=0.0),
        ),
    )


def measure(data: Path, work: Path, seed: int, max_queries: int) -> dict[str, dict[str, float]]:
    """Train a student, and measure each choice of terms: nDCG@10 by data set."""
    run = Run(recipe(data, seed, max_queries), work / f"seed-{seed}")
    run.finish()
    student = Student.load(run.folder.student)
    datasets = [read_beir(data / name, splits=["train", "dev", "test"]) for name in SETS]
    fit_tokens(student, datasets, TokensConfig(max_queries=max_queries), seed=seed)
    lists = [make_feature_lists(student, dataset, "asymmetric", terms=TERMS, seed=seed) for dataset in datasets]
    dev = {
        name: fit_all_terms([each.of_terms(TERMS, terms) for each in lists], terms).dev
        for name, terms in choices().items()
    }
    results = {choice: {name: after for name, (_, after) in values.items()} for choice, values in dev.items()}
    return results | {"the student's score alone": {name: alone for name, (alone, _) in dev["all"].items()}}


def table(by_seed: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """For each choice of terms: means over seeds and data sets, and the difference from all terms."""
    rows: list[dict[str, Any]] = []
    for name in by_seed[0]:
        differences = [fmean(each[name].values()) - fmean(each["all"].values()) for each in by_seed]
        interval = mean_interval(differences)
        rows.append(
            {
                "terms": name,
                "nDCG@10": round(fmean(fmean(each[name].values()) for each in by_seed), 4),
                "difference": round(fmean(differences), 4),
                "plus or minus": None if interval is None else round((interval.high - interval.low) / 2, 4),
                **{data: round(fmean(each[name][data] for each in by_seed), 4) for data in SETS},
            }
        )
    return rows


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that contains the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-queries", type=int, default=400, help="training queries of each data set")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, which are continued")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    by_seed: list[dict[str, dict[str, float]]] = []
    for seed in range(args.seeds):
        finished = args.work / f"seed-{seed}.json"
        if not finished.is_file():
            write_json(finished, measure(args.data, args.work, seed, args.max_queries))
        by_seed.append(json.loads(finished.read_text(encoding="utf-8")))
    rows = table(by_seed)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json is not None:
        record = {"sets": SETS, "seeds": args.seeds, "max_queries": args.max_queries, "rows": rows, "by_seed": by_seed}
        write_json(args.json, record)


if __name__ == "__main__":
    main()
