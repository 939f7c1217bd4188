"""Makes training plans and labels of recorded lists, so that a recipe can be distilled from them or ablated on them.

For each data set of the recipe that `judgements/SET.jsonl` has lists of: the plan is the 600 train lists, its positives
are those that the data set judges relevant, and the rest of a list are hard negatives; of labelled pairs, the plan is
the train pairs that were graded. The labels are what a graded teacher makes of the recorded grades: the recipe's, or
beside a teacher that is to learn from them (`teacher_tuning.labels`) one with the defaults. Then

    d2llm distill RECIPE --out RUN --data DATA --recorded benchmarks/judgements
    d2llm ablate RECIPE --out RUN --data DATA --recorded benchmarks/judgements

    python benchmarks/recorded_lists.py RECIPE DATA RUN [--queries N] [--candidates N] [--easy N] [--judged N]
        [--beside]

`--queries` and `--candidates` take a random part of the lists, of which a larger one contains a smaller one, for
learning curves; a list keeps at least one positive. `--easy` adds random passages of the corpus as easy negatives,
which the recipe's `[teacher.recorded] unlisted` grades. `--judged N` takes the positives of all but N queries from the
grades, as for queries that nobody judged. `--beside` keeps what `d2llm mine RECIPE --out RUN` planned for queries and
data sets without a list, to be trained on judgements (`training.unlabelled = "own_labels"`).
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from judged_sets import RELEVANT
from recorded_judge import RECORDED, GradedList, read_graded_lists

from d2llm import Run
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data
from d2llm.data.pair_training import plan_of_pairs, read_pair_training_set
from d2llm.data.pairs import PairDataset
from d2llm.data.plan import PlanEntry, read_plan, write_plan
from d2llm.recipe import DataConfig, TeacherConfig
from d2llm.training.label import LabelReport
from d2llm.training.mining.choose import key_of

GRADED = {"model": "recorded", "kind": "graded"}


@dataclass(frozen=True, slots=True)
class Part:
    """So many queries, so many candidates of each (None: all), and so many random passages beside them.

    Of ``judged`` queries (None: all) the positives are those that the data set judges relevant; of the others, those
    with a grade of ``RELEVANT`` or more, or else the best, as if nobody had judged them.
    """

    queries: int | None = None
    candidates: int | None = None
    easy: int = 0
    judged: int | None = None


def plan_of_lists(dataset: Dataset, lists: list[GradedList], part: Part) -> list[PlanEntry]:
    """The plan's entries of the train lists, in the order of their query ids."""
    positives = dataset.positives("train")  # of lists of written queries, `judged_sets.py` makes some a dev split
    judged = [each for each in lists if each.split == "train" and each.query_id in positives]
    train = sorted(judged, key=lambda each: key_of(1, each.query_id))
    entries: list[PlanEntry] = []
    corpus = sorted(dataset.passages) if part.easy else []
    for index, each in enumerate(train[: part.queries]):
        is_scored = part.judged is None or index < part.judged
        own = set(positives[each.query_id]) if is_scored else _graded_relevant(each)
        order = list(each.passages)
        random.Random(f"part {each.query_id}").shuffle(order)
        first = next(passage for passage in order if passage in own)
        order.remove(first)
        kept = {first, *order[: None if part.candidates is None else part.candidates - 1]}
        listed = [passage for passage in each.passages if passage in kept]
        relevant = tuple(passage for passage in listed if passage in own)
        hard = tuple(passage for passage in listed if passage not in own)
        entries.append(PlanEntry(each.query_id, relevant, hard, _easy(each, own, corpus, part.easy)))
    return sorted(entries, key=lambda entry: entry.query_id)


def _graded_relevant(graded: GradedList) -> set[str]:
    best = max(graded.grades)
    return {name for name, grade in zip(graded.passages, graded.grades, strict=True) if grade >= min(RELEVANT, best)}


def plan_of_graded_pairs(dataset: PairDataset, lists: list[GradedList], part: Part) -> list[PlanEntry]:
    """The plan's entries of the train pairs that were graded."""
    graded = {(each.query_id, passage) for each in lists if each.split == "train" for passage in each.passages}
    pairs = read_pair_training_set(dataset)
    own = {(query, passage) for query, judged in pairs.targets["train"].items() for passage in judged}
    entries = plan_of_pairs(pairs, "train", leave_out=own - graded, seed=0)
    chosen = sorted(entries, key=lambda entry: key_of(1, entry.query_id))[: part.queries]
    return sorted(chosen, key=lambda entry: entry.query_id)


def _easy(judged: GradedList, own: set[str], corpus: list[str], number: int) -> tuple[str, ...]:
    """Random passages outside the list that the data set does not judge relevant; ``judged.query_id`` decides which."""
    draw = random.Random(f"easy {judged.query_id}")
    unseen = {*own, *judged.passages}
    chosen: list[str] = []
    while len(chosen) < number:
        if (passage := draw.choice(corpus)) not in unseen:
            chosen.append(passage)
            unseen.add(passage)
    return tuple(chosen)


def make_run(run: Run, part: Part, *, beside: bool = False) -> LabelReport:
    """Write the plans of a run's data sets, and the labels of the lists; with ``beside``, keep what else was mined.

    Plans are last, and one of them has all that the mined one had: who is interrupted repeats the call.
    """
    lists_alone = Run(run.recipe, run.folder.path / "lists") if beside else run
    listed: list[DataConfig] = []
    plans: list[tuple[Path, str, list[PlanEntry]]] = []
    for data in run.recipe.data:
        dataset = open_data(data.path, splits=["train", "dev"])
        name = dataset.name
        if beside and not (RECORDED / f"{name}.jsonl").is_file():
            continue
        lists = read_graded_lists(name)
        is_retrieval = isinstance(dataset, Dataset)
        entries = plan_of_lists(dataset, lists, part) if is_retrieval else plan_of_graded_pairs(dataset, lists, part)
        listed.append(data)
        _write(lists_alone.folder.plan(data), name, entries)
        if beside:
            own = {entry.query_id for entry in entries}
            mined = [entry for entry in read_plan(run.folder.plan(data)).entries if entry.query_id not in own]
            plans.append((run.folder.plan(data), name, sorted([*entries, *mined], key=lambda entry: entry.query_id)))
    teacher = TeacherConfig.model_validate(GRADED) if run.recipe.teacher_tuning.labels else run.recipe.teacher
    recipe = run.recipe.model_copy(update={"data": tuple(listed), "teacher": teacher})
    report = Run(recipe, lists_alone.folder.path, recorded=RECORDED).label()
    if report.num_undecided:
        raise ValueError(f"{report.num_undecided} pairs of the lists were not recorded")
    for plan in plans:
        _write(*plan)
    if beside:
        shutil.copytree(lists_alone.folder.labels, run.folder.labels, dirs_exist_ok=True)
        shutil.rmtree(lists_alone.folder.path)
    return report


def _write(folder: Path, name: str, entries: list[PlanEntry]) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    write_plan(folder, entries, {"dataset": name, "split": "train", "report": {"recorded": True}})


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that name a run: a recipe, the folder of its data sets, and the run's folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("run", type=Path, help="folder of the plans and labels")
    return parser


def main() -> None:
    """Make the run folder."""
    parser = run_parser(__doc__)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--easy", type=int, default=0)
    parser.add_argument("--judged", type=int, metavar="N", help="use the judgements of N queries only, then grades")
    parser.add_argument("--beside", action="store_true", help="keep the mined queries that have no list")
    given = parser.parse_args()
    run = Run(given.recipe, given.run, data=str(given.data))
    report = make_run(run, Part(given.queries, given.candidates, given.easy, given.judged), beside=given.beside)
    print(f"{given.run}: {report.queries + report.finished_queries} lists, {report.pairs} pairs labelled now")


if __name__ == "__main__":
    main()
