"""Does a student learn more from queries that are written where it fails, round after round (PGKD's loop)?

    python benchmarks/written_rounds.py RECIPE DATA_SET WORK [--queries 120] [--held-out 240] [--added 30] [--rounds 2]
        [--writer WRITER.toml] [--json PATH]

A student learns from `--queries` of the queries that a large language model wrote for passages of a data set
(`written_queries`). In each round it ranks `--held-out` others. A writer is shown those that it gets wrong most surely
(`labelling.mistaken_student`), each with its passage, a passage only once, and writes two more for each; a student then
learns from all so far. It ends with the first round that gains nothing on dev. The second row has as many rounds with
as many queries, for passages of the held-out queries drawn at random, by a writer who saw these alone.

Without `--writer`, `written_queries/rounds/SET.jsonl` is repeated. If it lacks a passage, what a writer would be shown
is in WORK/packet.jsonl, and the same command continues when the queries are there.

Source: Di Palo et al., "Performance-Guided LLM Knowledge Distillation", EMNLP 2024 (arXiv 2411.05045), which trains
classifiers: samples that the student gets wrong although it is sure are shown with measures of each class. Here the
measure is how far another passage is ahead. The student starts anew in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from recorded_writer import RECORDED, read_recorded

from d2llm.core.errors import InputError
from d2llm.core.files import write_bytes, write_json
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
from d2llm.data.run_folder import is_finished, manifest_of
from d2llm.models.student import Student
from d2llm.models.writers.writer import Assignment, Writer, kind_of_query, load_writer
from d2llm.recipe import Recipe
from d2llm.recipe.recipe import load_recipe, named_writer
from d2llm.recipe.variants import find_variant
from d2llm.training.distill import distill

NUM_HARD = 8
QUERIES_EACH = 2
Written = tuple[str, str]
"""The text of a query, and the id of the passage that it was written for."""


@dataclass(frozen=True)
class Missed:
    """A query that a student gets wrong: another passage is ahead of its own by so much."""

    query: str
    passage_id: str
    taken_id: str
    margin: float


class Learner:
    """Trains students on written queries of a data set, whose passages are a sample with those of dev."""

    def __init__(self, dataset: Dataset, recipe: Recipe, work: Path) -> None:
        self.dataset, self.work = dataset, work
        self.recipe = find_variant("no-imitation").apply(recipe)
        named: list[Task] = [data.task for data in recipe.data if Path(data.path).name == dataset.name]
        self.task: Task = named[0] if named else "asymmetric"

    def untrained(self) -> Student:
        """The student before training."""
        return Student.create(self.recipe.student, device="cpu", dtype="float32", seed=self.recipe.seed)

    def train(self, queries: Sequence[Written], ranked_by: Student) -> tuple[Student, float]:
        """A student that learnt from these queries, with the passages that another student ranks first as hard
        negatives, and its nDCG@10 on dev.
        """
        folder = self.work / fingerprint_json([list(queries), ranked_by.fingerprint])
        if not is_finished(folder):
            ids = {f"w{number}": query for number, query in enumerate(queries)}
            texts = self.dataset.queries | {name: Query(name, text) for name, (text, _) in ids.items()}
            rankings = self.rankings(ranked_by, [text for text, _ in queries])
            entries: list[PlanEntry] = []
            for (name, (_, positive)), ranking in zip(ids.items(), rankings, strict=True):
                others = tuple(islice((other for other, _ in ranking if other != positive), NUM_HARD))
                entries.append(PlanEntry(name, (positive,), others, ()))
            plan = TrainingPlan(tuple(entries), {"content_hash": fingerprint_json(list(queries))})
            source = TrainingSource(replace(self.dataset, queries=texts), plan, self.task)
            settings: dict[str, Any] = {"labels": self.work / "labels", "teacher": self.recipe.teacher}
            distill([source], folder, recipe=self.recipe, device="cpu", dtype="float32", **settings)
        (dev,) = manifest_of(folder)["dev"].values()
        return Student.load(folder, device="cpu", dtype="float32"), float(dev["kept"])

    def rankings(self, student: Student, queries: Sequence[str]) -> list[list[tuple[str, float]]]:
        """All passages with their scores for each query, best first."""
        ids = sorted(self.dataset.passages)
        vectors = student.encode_passages([self.dataset.passages[name].full_text for name in ids]).vectors
        rankings: list[list[tuple[str, float]]] = []
        for query in student.encode_queries(list(queries)).vectors:
            scores = student.score(query, vectors, self.task)
            rankings.append([(ids[row], float(scores[row])) for row in np.argsort(-scores, kind="stable")])
        return rankings

    def missed(self, student: Student, queries: Sequence[Written]) -> list[Missed]:
        """The queries that a student gets wrong, one for each passage, the most surely wrong first."""
        found: dict[str, Missed] = {}
        for (query, own), ranking in zip(queries, self.rankings(student, [text for text, _ in queries]), strict=True):
            (best, score), scores = ranking[0], dict(ranking)
            margin = score - scores[own]
            if best != own and (own not in found or margin > found[own].margin):
                found[own] = Missed(query, own, best, margin)
        return sorted(found.values(), key=lambda missed: (-missed.margin, missed.passage_id))


Write = Callable[[Sequence[Missed]], list[Written]]


def written_by(writer: Writer, dataset: Dataset) -> Write:
    """Has queries written for passages, each after an example: the query that the student gets wrong."""

    def write(missed: Sequence[Missed]) -> list[Written]:
        texts = [dataset.passages[each.passage_id].full_text for each in missed]
        answers = writer.write(
            [
                Assignment(text, kind_of_query(each.query), QUERIES_EACH, examples=((text, each.query),))
                for each, text in zip(missed, texts, strict=True)
            ]
        )
        pairs = zip(missed, answers, strict=True)
        return [(query, each.passage_id) for each, answer in pairs for query in answer.queries]

    return write


def recorded(path: Path, dataset: Dataset, packet: Path) -> Write:
    """Repeats what was written for passages of a data set; a packet of those without ends the run."""

    def write(missed: Sequence[Missed]) -> list[Written]:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known: dict[str, list[str]] = {line["id"]: line["queries"] for line in map(json.loads, lines)}
        new = [each for each in missed if each.passage_id not in known]
        if new:
            texts = {name: passage.full_text for name, passage in dataset.passages.items()}
            shown = [
                {"id": e.passage_id, "passage": texts[e.passage_id], "missed": e.query, "taken": texts[e.taken_id]}
                for e in new
            ]
            write_bytes(packet, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in shown).encode())
            raise InputError(f"{path} has no queries for {len(new)} passages: write {QUERIES_EACH} each, see {packet}")
        return [(query, each.passage_id) for each in missed for query in known[each.passage_id]]

    return write


def rounds(
    learner: Learner,
    start: Sequence[Written],
    held_out: Sequence[Written],
    write: Write,
    *,
    added: int,
    number: int,
    until_no_gain: bool = True,
) -> list[dict[str, Any]]:
    """The measures of a loop: dev, queries, and how many passages had a held-out query that was wrong before."""
    queries = list(start)
    student, dev = learner.train(queries, learner.untrained())
    results: list[dict[str, Any]] = [{"dev": dev, "queries": len(queries), "missed": None}]
    shown: set[str] = set()
    for _ in range(number):
        missed = learner.missed(student, held_out)
        chosen = [each for each in missed if each.passage_id not in shown][:added]
        shown.update(each.passage_id for each in chosen)
        queries += write(chosen)
        student, dev = learner.train(queries, student)
        results.append({"dev": dev, "queries": len(queries), "missed": len(missed)})
        if until_no_gain and dev <= results[-2]["dev"]:
            break
    return results


def sampled(data: Path, passage_ids: Mapping[str, Any], num_passages: int) -> Dataset:
    """A data set with dev alone, and of its passages those of dev, those named, and a random sample."""
    whole = read_beir(data, splits=["dev"])
    names = {*passage_ids, *(name for ids in whole.positives("dev").values() for name in ids)}
    others = sorted(set(whole.passages) - names)
    names.update(random.Random(0).sample(others, max(0, min(len(others), num_passages - len(names)))))
    return replace(whole, passages={name: whole.passages[name] for name in sorted(names)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--queries", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=240)
    parser.add_argument("--added", type=int, default=30, help="passages for which queries are written in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passages", type=int, default=800)
    parser.add_argument("--writer", help="a TOML file, or a model")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    known = {name: queries for (name, _), queries in read_recorded(options.data.name).items()}
    written: list[Written] = [(query, name) for name, queries in known.items() for query in queries]
    start, held_out = written[: options.queries], written[options.queries :][: options.held_out]
    dataset = sampled(options.data, {name: None for _, name in start + held_out}, options.passages)
    learner = Learner(dataset, load_recipe(options.recipe), options.work)
    shuffled = sorted({name for _, name in held_out})
    random.Random(0).shuffle(shuffled)
    drawn = iter(shuffled)

    if options.writer:
        write = written_by(load_writer(named_writer(options.writer)), dataset)
    else:
        write = recorded(RECORDED / "rounds" / f"{options.data.name}.jsonl", dataset, options.work / "packet.jsonl")
    guided = rounds(learner, start, held_out, write, added=options.added, number=options.rounds)
    sizes = (after["queries"] - before["queries"] for before, after in pairwise(guided))

    def at_random(_: Sequence[Missed]) -> list[Written]:
        return [(query, name) for name in islice(drawn, next(sizes) // QUERIES_EACH) for query in known[name]]

    plain = rounds(
        learner, start, held_out, at_random, added=options.added, number=len(guided) - 1, until_no_gain=False
    )
    results = {"where it fails": guided, "random": plain}
    for name, measured in results.items():
        print(name, *(f"{each['dev']:.4f} ({each['queries']} queries)" for each in measured))
    if options.json is not None:
        write_json(options.json, {"set": options.data.name, "measure": "nDCG@10", "rounds": results})


if __name__ == "__main__":
    main()
