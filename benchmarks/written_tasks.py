"""Does a task that was written with each query help a student that learns from written queries (Gecko's first step)?

A large language model read 100 passages of wikiqa that no dev or test query is about, and wrote for each a task and a
query (`written_queries/tasks/wikiqa.jsonl`). Static vectors learn from these queries alone, each against the other
passages of its batch, with the task as each query's instruction and without. They are measured on the dev queries that
people asked, after the one task of them all and without it.

    d2llm distill-static DATA/wikiqa/corpus.jsonl.gz --out runs/static --dim 256
    python benchmarks/written_tasks.py DATA RUN --json benchmarks/results/written-tasks.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from recorded_writer import written_queries

from d2llm import Run, Student
from d2llm.data.beir import read_beir
from d2llm.data.plan import PlanEntry, TrainingPlan, write_plan
from d2llm.data.run_folder import training_source
from d2llm.models.writers.answers import split_task
from d2llm.recipe import DataConfig
from d2llm.recipe.recipe import load_recipe
from d2llm.training.ablate import MEASURING_SEED
from d2llm.training.dev_sets import evaluate_dev, make_dev_set
from d2llm.training.settings import DEV_QUERIES

RECIPE = Path(__file__).parent / "graded_lists" / "tasks.toml"
DEV_TASK = "task: Given a question, find a sentence that answers it | query: "
"""What is read before the queries that people asked; it was not written for them, but says what the set's card says."""
NAME, SET = "wikiqa", "wikiqa-written"


def write_set(data: Path, folder: Path, *, with_tasks: bool) -> None:
    """Write the written queries as train queries, each with the passage it was written for, and the set's own dev."""
    own = read_beir(data / NAME, splits=["dev"])
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / NAME / "corpus.jsonl.gz", folder / "corpus.jsonl.gz")
    records: list[dict[str, str]] = []
    rows: dict[str, list[str]] = {"train": [], "dev": []}
    for query_id, (text, passage_id) in written_queries(f"tasks/{NAME}").items():
        instruction, query = split_task(text)
        records.append({"_id": query_id, "text": query})
        if with_tasks and instruction is not None:
            records[-1]["instruction"] = instruction
        rows["train"].append(f"{query_id}\t{passage_id}\t1")
    for query_id, grades in own.qrels["dev"].items():
        records.append({"_id": query_id, "text": own.queries[query_id].text})
        if with_tasks:
            records[-1]["instruction"] = DEV_TASK
        rows["dev"] += [f"{query_id}\t{passage_id}\t{grade}" for passage_id, grade in grades.items()]
    with gzip.open(folder / "queries.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for split, lines in rows.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")


def train(out: Path, name: str, seed: int) -> Student:
    """A student that was trained on one form of the set."""
    recipe = load_recipe(RECIPE).model_copy(update={"seed": seed})
    run = Run(recipe, out / f"run-{name}-{seed}", data=str(out / name), device="cpu")
    sources = written_queries(f"tasks/{NAME}").items()
    plan = [PlanEntry(query_id, (passage_id,), (), ()) for query_id, (_, passage_id) in sources]
    write_plan(run.folder.plan(run.recipe.data[0]), plan, {"dataset": SET, "split": "train", "report": {}})
    run.distill()
    return Student.load(run.folder.student, device="cpu", dtype="float32")


def measured(student: Student, out: Path) -> dict[str, float]:
    """nDCG@10 of the dev queries, after their task and alone."""
    found: dict[str, float] = {}
    for name, label in (("tasks", "after a task"), ("plain", "alone")):
        source = training_source(DataConfig(path=str(out / name / SET)), TrainingPlan((), {"dataset": SET}))
        dev = make_dev_set(source, num_queries=DEV_QUERIES, num_passages=600, seed=MEASURING_SEED)
        (result,) = evaluate_dev(student, [dev]).values()
        found[label] = result.values[1.0]
    return found


def main() -> None:
    """Train with and without tasks, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for name in ("tasks", "plain"):
        write_set(given.data, given.out / name / SET, with_tasks=name == "tasks")
    start = Student.create(load_recipe(RECIPE).student, device="cpu", dtype="float32")
    results: dict[str, Any] = {"queries": len(written_queries(f"tasks/{NAME}")), "start": measured(start, given.out)}
    for name in ("tasks", "plain"):
        results[name] = [measured(train(given.out, name, seed), given.out) for seed in range(given.seeds)]
    print("| trained on queries | dev queries after a task | alone |\n|---|---|---|")
    rows = {"not": [results["start"]], "after tasks": results["tasks"], "alone": results["plain"]}
    for title, found in rows.items():
        print(f"| {title} | " + " | ".join(f"{fmean(each[label] for each in found):.4f}" for label in found[0]) + " |")
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
