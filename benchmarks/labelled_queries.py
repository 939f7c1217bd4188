"""Does a student learn more from a teacher that labels the queries on which two students disagree, or a random sample?

    python benchmarks/labelled_queries.py RECIPE --run RUNFOLDER --data DATA --labelled 100 --seeds 3
    python benchmarks/labelled_queries.py ... --json benchmarks/results/labelled-queries.json

The recipe's run folder has plans and labels of all queries (`d2llm run RECIPE --out RUNFOLDER`). For each seed, a
student learns from the teacher alone (list imitation) with `--labelled` queries of each set: those whose passages the
backbone before training and the student trained on judgements (the ablation `no-imitation` with the same seed) rank
most differently, as `labelling.compared_students` chooses them (disagreement), those at which the student trained on
judgements is most surely wrong, as `labelling.mistaken_student` does (mistakes), those drawn where it is unsure, as
`labelling.unsure_student` does (robust), or a random sample of its own. `all` learns from every query. All students are
measured on the same dev queries (`d2llm ablate`); finished students are not trained again.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from d2llm import Run
from d2llm.core.files import write_json
from d2llm.data.plan import TrainingSource
from d2llm.models.student import Student
from d2llm.ops.significance import mean_interval
from d2llm.recipe import LabellingConfig, Recipe
from d2llm.recipe.variants import find_variant
from d2llm.training.ablate import ablate, only_queries
from d2llm.training.ablation_report import BASE
from d2llm.training.label import disagreements, mistakes, robust_sample
from d2llm.training.settings import DEV_QUERIES

WAYS = ("random", "disagreement", "mistakes", "robust", "all")


def choose(source: TrainingSource, way: str, count: int, seed: int, students: tuple[Student, Student]) -> list[str]:
    """The queries that the teacher labels."""
    query_ids = sorted(entry.query_id for entry in source.plan.entries)
    if way == "random":
        return random.Random(f"{source.dataset.name}:{seed}").sample(query_ids, count)
    if way in ("disagreement", "mistakes"):
        values = disagreements(source, *students) if way == "disagreement" else mistakes(source, students[1])
        return sorted(query_ids, key=lambda query_id: (-values[query_id], query_id))[:count]
    if way == "robust":
        errors: float = LabellingConfig().teacher_errors
        return robust_sample(source, students[1], count, teacher_errors=errors)
    return query_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--run", type=Path, required=True, help="the recipe's run folder, with plans and labels")
    parser.add_argument("--data", action="append", default=[], help="where the recipe's data sets are")
    parser.add_argument("--labelled", type=int, default=100, help="queries of each set that the teacher labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dev-queries", type=int, default=DEV_QUERIES, help="of each set, on which all are measured")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()

    run = Run(arguments.recipe, arguments.run, data=arguments.data, device="cpu", dtype="float32")
    sources = run.folder.sources(run.recipe)
    imitation = run.recipe.losses.with_imitation(
        {"list_imitation": 0.5, "in_batch_cross_entropy": 0.0, "dot_cross_entropy": 0.0}
    )
    recipe: Recipe = run.recipe.model_copy(update={"losses": imitation})

    def measured(chosen: list[TrainingSource], trained: Recipe) -> Any:
        return ablate(
            chosen,
            run.folder.path / "ablation",
            recipe=trained,
            labels=run.folder.labels,
            teacher=run.teacher,
            variants=[],
            num_seeds=1,
            dev_queries=arguments.dev_queries,
            device="cpu",
            dtype="float32",
        )

    results: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.ways}
    untrained = Student.create(run.recipe.student, device="cpu", dtype="float32", seed=run.recipe.seed)
    for seed in range(run.recipe.seed, run.recipe.seed + arguments.seeds):
        judged = measured(sources, find_variant("no-imitation").apply(run.recipe.model_copy(update={"seed": seed})))
        folder = Path(judged.folder) / BASE / f"seed-{seed}"
        students = (untrained, Student.load(str(folder), device="cpu", dtype="float32"))
        for way in arguments.ways:
            chosen = [only_queries(s, set(choose(s, way, arguments.labelled, seed, students))) for s in sources]
            report = measured(chosen, recipe.model_copy(update={"seed": seed}))
            by_set = dict(report.base.by_set)
            results[way].append({"seed": seed, "mean": report.base.mean, "by_set": by_set})
            figures = "  ".join(f"{name} {value:.4f}" for name, value in by_set.items())
            print(f"seed {seed}  {way:14} {report.base.mean:.4f}  {figures}", flush=True)
    for way, runs in results.items():
        print(f"{way:14} {fmean(each['mean'] for each in runs):.4f}")
    interval = None
    if {"random", "disagreement"} <= results.keys() and arguments.seeds > 1:
        pairs = zip(results["disagreement"], results["random"], strict=True)
        interval = mean_interval([one["mean"] - other["mean"] for one, other in pairs])
        print(f"disagreement - random: {interval}")
    if arguments.json is not None:
        figures = {"labelled": arguments.labelled, "queries": {s.dataset.name: len(s.plan.entries) for s in sources}}
        write_json(
            arguments.json,
            figures | {"measure": "nDCG@10", "runs": results, "difference": asdict(interval) if interval else None},
        )


if __name__ == "__main__":
    main()
