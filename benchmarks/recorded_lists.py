"""Makes training plans and labels of recorded lists, so that a recipe can be distilled from them or ablated on them.

For each data set of the recipe that `judgements/SET.jsonl` has lists of: the plan is the 600 train lists, its positives
are those that the data set judges relevant, and the rest of a list are hard negatives; the labels are what the recipe's
graded teacher makes of the recorded grades. Then

    d2llm distill RECIPE --out RUN --data DATA --recorded benchmarks/judgements
    d2llm ablate RECIPE --out RUN --data DATA --recorded benchmarks/judgements

    python benchmarks/recorded_lists.py RECIPE DATA RUN [--queries N] [--candidates N]

`--queries` and `--candidates` take a random part of the lists, of which a larger one contains a smaller one, for
learning curves; a list keeps at least one positive.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from recorded_judge import RECORDED, GradedList, read_graded_lists

from d2llm import Run
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.plan import PlanEntry, write_plan
from d2llm.training.label import LabelReport
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


def make_run(run: Run, part: Part) -> LabelReport:
    """Write the plans of a run's data sets, and their labels."""
    for data in run.recipe.data:
        dataset = read_beir(data.path, splits=["train", "dev"])
        entries = plan_of_lists(dataset, read_graded_lists(dataset.name), part)
        content = {"dataset": dataset.name, "split": "train", "report": {"recorded": True}}
        write_plan(run.parts.plan(data), entries, content)
    report = run.label()
    if report.num_undecided:
        raise ValueError(f"{report.num_undecided} pairs of the lists were not recorded")
    return report


def main() -> None:
    """Make the run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("run", type=Path)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--candidates", type=int)
    given = parser.parse_args()
    run = Run(given.recipe, given.run, data=str(given.data), recorded=RECORDED)
    report = make_run(run, Part(given.queries, given.candidates))
    print(f"{given.run}: {report.queries + report.finished_queries} lists, {report.pairs} pairs labelled now")


if __name__ == "__main__":
    main()
