"""What the average of several students' weights is worth beside each of them (training.soup).

    python benchmarks/recorded_lists.py benchmarks/graded_lists/methods.toml DATA_SETS RUN --queries 240
    d2llm ablate benchmarks/graded_lists/methods.toml --out RUN --data DATA_SETS --recorded benchmarks/judgements \\
        --seeds 3 --variants no-imitation
    python benchmarks/soup.py DATA_SETS RUN/ablation/*/*/* --json benchmarks/results/soup.json

The students of the ablation have the same recipe but for seed and loss. nDCG@10 on dev: one half of the dev queries
chooses the greedy soup, the other half, among the same passages, measures everything. A start is the student before
training, of which the soup with a trained one keeps half of the change.

Licences: wikiqa as released by Microsoft Research for research, banking77 CC BY 4.0; nothing that was trained on them
here is shipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from d2llm.data.plan import TrainingPlan, TrainingSource
from d2llm.data.run_folder import training_source
from d2llm.models.student import Student
from d2llm.recipe import DataConfig
from d2llm.training.dev_sets import DevSet, evaluate_dev, make_dev_set
from d2llm.training.soup import greedy_soup, soup

SETS = {"wikiqa": "asymmetric", "banking77": "symmetric"}


def halves_of(source: TrainingSource, max_queries: int, num_passages: int) -> tuple[int, DevSet, set[str]]:
    """How many dev queries choose, the dev set of all, and the queries of it that do not choose."""
    options: Any = {"num_passages": num_passages, "seed": 0}
    everything = make_dev_set(source, num_queries=max_queries, **options)
    half = len(everything.queries) // 2
    chosen = make_dev_set(source, num_queries=half, **options).queries
    return half, everything, {*everything.queries} - {*chosen}


def measure(student: Student, halves: dict[str, tuple[int, DevSet, set[str]]]) -> dict[str, float]:
    """nDCG@10 of the measured half of each set, and their mean."""
    row: dict[str, float] = {}
    for name, (_, dev, measured) in halves.items():
        result = evaluate_dev(student, [dev])[dev.name]
        values = next(iter(result.by_item.values()))
        row[name] = float(np.mean([value for key, value in zip(dev.item_ids, values, strict=True) if key in measured]))
    return {name: round(value, 4) for name, value in {"mean": float(np.mean([*row.values()])), **row}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with the data sets")
    parser.add_argument("students", type=Path, nargs="+", help="folders; others among them are left out")
    parser.add_argument("--queries", type=int, default=200, help="dev queries of each set, half of which choose")
    parser.add_argument("--passages", type=int, default=600)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    folders = [folder for folder in sorted(arguments.students) if (folder / "head.safetensors").is_file()]
    students = [Student.load(folder, device=arguments.device, dtype="float32") for folder in folders]
    sources = [
        training_source(
            DataConfig.model_validate({"path": str(arguments.data / name), "task": task}), TrainingPlan((), {})
        )
        for name, task in SETS.items()
    ]
    halves = {source.dataset.name: halves_of(source, arguments.queries, arguments.passages) for source in sources}
    start = Student.create(students[0].config, device=arguments.device, dtype="float32")
    num_queries = min(half for half, _, _ in halves.values())
    greedy = greedy_soup(students, sources, num_queries=num_queries, num_passages=arguments.passages)
    names = ["/".join(folder.parts[-2:]) for folder in folders]
    models = {"start": start, **dict(zip(names, students, strict=True))}
    models |= {
        "average of all": soup(students),
        "greedy: " + ", ".join(names[index] for index in greedy.kept): greedy.student,
    }
    models |= {f"half of the change of {names[0]}": soup([start, students[0]])}
    rows: list[dict[str, Any]] = []
    for name, student in models.items():
        rows.append({"student": name, **measure(student, halves)})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json is not None:
        settings = {"choosing": num_queries, "measured": {name: len(ids) for name, (_, _, ids) in halves.items()}}
        report = {"settings": settings | {"passages": arguments.passages}, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
