"""Makes training plans and labels of recorded lists, so that a recipe can be distilled from them or ablated on them.

For each data set of the recipe that `judgements/SET.jsonl` has lists of: the plan is the 600 train lists, its positives
are those that the data set judges relevant, and the rest of a list are hard negatives; the labels are what the graded
teacher makes of the recorded grades (`recorded_judge.py`), asked through its endpoint. Then

    d2llm distill RECIPE --out RUN --data DATA
    d2llm ablate RECIPE --out RUN --data DATA

    python benchmarks/recorded_lists.py RECIPE DATA RUN [--queries N] [--candidates N]

`--queries` and `--candidates` take a random part of the lists, of which a larger one contains a smaller one, for
learning curves; a list keeps at least one positive.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from recorded_judge import GradedList, read_graded_lists, recorded_judge, recorded_teacher

from d2llm.core.recipe import DataConfig
from d2llm.core.recipe_file import load_recipe
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.plan import PlanEntry, read_plan, write_plan
from d2llm.data.run_folder import RunFolder, training_source
from d2llm.training.label import label
from d2llm.training.mining.choose import key_of


@dataclass(frozen=True, slots=True)
class Part:
    """How much of the lists to take: so many queries, and so many candidates of each; None means all."""

    queries: int | None = None
    candidates: int | None = None


def plan_of_lists(dataset: Dataset, lists: list[GradedList], part: Part) -> list[PlanEntry]:
    """The plan's entries of the train lists, in the order of their query ids."""
    train = sorted((each for each in lists if each.split == "train"), key=lambda each: key_of(1, each.query_id))
    positives = dataset.positives("train")
    entries: list[PlanEntry] = []
    for each in train[: part.queries]:
        own = set(positives[each.query_id])
        order = list(each.passages)
        random.Random(f"part {each.query_id}").shuffle(order)
        first = next(passage for passage in order if passage in own)
        order.remove(first)
        kept = {first, *order[: None if part.candidates is None else part.candidates - 1]}
        listed = [passage for passage in each.passages if passage in kept]
        relevant = tuple(passage for passage in listed if passage in own)
        entries.append(PlanEntry(each.query_id, relevant, tuple(each for each in listed if each not in own), ()))
    return sorted(entries, key=lambda entry: entry.query_id)


def make_run(data: DataConfig, folder: Path, run: RunFolder, part: Part) -> str:
    """Write the plan and the labels of one data set; returns what was done."""
    dataset = read_beir(folder, splits=["train", "dev"])
    entries = plan_of_lists(dataset, read_graded_lists(folder.name), part)
    write_plan(run.plan(data), entries, {"dataset": dataset.name, "split": "train", "report": {"recorded": True}})
    source = training_source(data.model_copy(update={"path": str(folder)}), read_plan(run.plan(data)))
    with recorded_judge(folder) as url:
        report = label([source], run.labels, teacher=recorded_teacher(url))
    if report.num_undecided:
        raise ValueError(f"{folder.name}: {report.num_undecided} pairs of the lists were not recorded")
    return f"{folder.name}: {len(entries)} lists, {report.pairs} pairs labelled"


def main() -> None:
    """Make the run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("run", type=Path)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--candidates", type=int)
    given = parser.parse_args()
    for data in load_recipe(given.recipe).data:
        print(make_run(data, given.data / data.path, RunFolder(given.run), Part(given.queries, given.candidates)))


if __name__ == "__main__":
    main()
