"""What each step of a recipe with a chain of stages brings: dev before the first, after each, and after distillation.

    python benchmarks/stages.py RECIPE DATA RUN --json benchmarks/results/ernie-tiny.json

RUN has the plans of the recipe's data sets (`recorded_lists.py`), and their labels if a loss needs some. The last row
is the distillation without the stages before it, which has fewer steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recorded_lists import run_parser

from d2llm import Run
from d2llm.core.files import write_json
from d2llm.data.plan import TrainingSource
from d2llm.data.run_folder import working_folder
from d2llm.models.student import Student
from d2llm.recipe import Recipe
from d2llm.training.dev_sets import DevSet, evaluate_dev, make_dev_set
from d2llm.training.distill import distill, pretrain_in_stages

HERE: Any = {"device": "cpu", "dtype": "float32"}


def measure(student: Student, dev_sets: Sequence[DevSet]) -> dict[str, float]:
    """The dev measure of each set, of an inner product without an interaction."""
    results = evaluate_dev(student, dev_sets)
    return {name: round(next(iter(result.values.values())), 4) for name, result in results.items()}


def stage_rows(sources: Sequence[TrainingSource], recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """The student before the first stage and after each; the distillation takes up what the stages have trained."""
    training = recipe.training
    dev_sets = [
        make_dev_set(source, num_queries=training.dev_queries, num_passages=training.dev_passages, seed=recipe.seed)
        for source in sources
    ]
    student = Student.create(recipe.student, seed=recipe.seed, **HERE)
    rows: list[dict[str, Any]] = [{"trained": "nothing", **measure(student, dev_sets)}]
    stages = zip(training.pretraining, pretrain_in_stages(student, sources, recipe, folder), strict=True)
    started = time.process_time()
    for stage, report in stages:
        seconds = time.process_time() - started
        loss = [round(report.first_loss, 4), round(report.last_loss, 4)]
        trained = {
            "trained": stage.kind,
            "teacher": getattr(stage, "teacher", None),
            "corpus": stage.corpus is not None,
        }
        counts = {"texts": report.texts, "steps": report.steps, "loss": loss, "processor_seconds": round(seconds)}
        rows.append({**trained, **counts, **measure(student, dev_sets)})
        print(json.dumps(rows[-1]), flush=True)
        started = time.process_time()
    return rows


def main() -> None:
    """Print the rows, and write them."""
    parser = run_parser(__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    run = Run(given.recipe, given.run, data=str(given.data), **HERE)
    recipe, sources = run.recipe, run.folder.sources(run.recipe)
    rows = stage_rows(sources, recipe, working_folder(run.folder.student))
    alone = recipe.model_copy(update={"training": recipe.training.model_copy(update={"pretraining": ()})})
    folders = {"distillation": run.folder.student, "distillation alone": given.run / "alone"}
    for name, trained in zip(folders, (recipe, alone), strict=True):
        started = time.process_time()
        report = distill(sources, folders[name], recipe=trained, labels=run.folder.labels, teacher=run.teacher, **HERE)
        seconds = round(time.process_time() - started)
        dev = {name: round(values["last"], 4) for name, values in report.dev.items()}
        rows.append({"trained": name, "steps": report.steps, "processor_seconds": seconds, **dev})
        print(json.dumps(rows[-1]), flush=True)
    if given.json is not None:
        queries = {source.dataset.name: len(source.plan.entries) for source in sources}
        write_json(given.json, {"recipe": given.recipe.stem, "queries": queries, "measure": "nDCG@10", "rows": rows})


if __name__ == "__main__":
    main()
