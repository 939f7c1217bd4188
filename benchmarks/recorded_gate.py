"""Is the recorded teacher better than its student? All systems on the same dev lists, with intervals.

The lists are those of `judgements/SET.jsonl`: 100 dev queries with 20 passages each. Every system orders the 20
passages of a list; the measure is nDCG@10 by the data set's judgements of the whole corpus, so the best order of the
same 20 is the ceiling. The teacher is the graded teacher that repeats the recorded grades: the mean of two judgings.
The others come from the runs of an evaluation on dev,

    d2llm evaluate DATA/SET --split dev --no-teacher --save-runs RUNS/SET

whose rankings are restricted to the list; passages that a run does not have come last, in the order of their ids.

    python benchmarks/recorded_gate.py DATA RUNS [SET ...] --json benchmarks/results/recorded-gate.json

`--teacher NAME FOLDER`, of a folder that `d2llm tune-teacher` wrote (`graded_lists/cross-encoder.toml`,
`graded_lists/graded-cross-encoder.toml`), lets that teacher order the lists first, as the run RUNS/SET/NAME.run; it may
be repeated.
Sets and systems of an existing JSON file that have no run here stay in it, and in the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from recorded_judge import GradedList, read_graded_lists, recorded_teacher, sets_with_dev

from d2llm.data.beir import Dataset, read_beir
from d2llm.data.trec import read_run, write_run
from d2llm.models.teachers.pair_teacher import PairTeacher, load_teacher
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import bootstrap_interval, paired_randomisation
from d2llm.recipe import TeacherConfig

MEASURE = "nDCG@10"
CROSS_ENCODER = "cross-encoder"
_SHOWN = (
    "teacher",
    "D2LLM",
    "cosine-D2LLM-vectors",
    CROSS_ENCODER,
    "graded-cross-encoder",
    "fitted-sum-BM25-cosine-tuned",
    "cosine-untuned",
    "BM25",
    "ceiling",
)


def rows(data: Path, runs: Path, name: str) -> dict[str, dict[str, float]]:
    """The measure of each query (system -> query id -> value) for one data set."""
    dataset, lists = _dev_lists(data / name)
    qrels = {query: dataset.qrels["dev"][query] for query in lists}
    scored = {
        "teacher": _judged(load_teacher(recorded_teacher(data / name)), dataset, lists),
        "ceiling": {
            query: {passage: float(qrels[query].get(passage, 0)) for passage in each.passages}
            for query, each in lists.items()
        },
    }
    for path in sorted((runs / name).glob("*")):
        run = read_run(path)
        scored[run.name] = {
            query: {passage: run.scores.get(query, {}).get(passage, -np.inf) for passage in each.passages}
            for query, each in lists.items()
        }
    return {system: per_query_measures(_ranked(own), qrels)[MEASURE] for system, own in scored.items()}


def write_teacher_run(system: str, teacher: PairTeacher, data: Path, runs: Path, name: str) -> None:
    """Write how a teacher orders the dev lists of a data set, as one of the set's runs, called ``system``."""
    judged = _judged(teacher, *_dev_lists(data / name))
    ranked = {query: [(each, judged[query][each]) for each in order] for query, order in _ranked(judged).items()}
    (runs / name).mkdir(parents=True, exist_ok=True)
    write_run(runs / name / f"{system}.run", system, ranked)


def _dev_lists(folder: Path) -> tuple[Dataset, dict[str, GradedList]]:
    lists = {
        each.query_id: each for each in read_graded_lists(folder.name) if each.split == "dev" and each.judging == 1
    }
    return read_beir(folder, splits=["train", "dev"]), lists


def _judged(teacher: PairTeacher, dataset: Dataset, lists: Mapping[str, GradedList]) -> dict[str, dict[str, float]]:
    """A judge's log-odds of the passages of each list."""
    pairs = [(query, passage) for query, each in lists.items() for passage in each.passages]
    texts = [(dataset.queries[query].text, dataset.passages[passage].full_text) for query, passage in pairs]
    task = next(iter(lists.values())).task
    scored: dict[str, dict[str, float]] = {query: {} for query in lists}
    for (query, passage), value in zip(pairs, teacher.score_pairs(texts, task).log_odds.tolist(), strict=True):
        scored[query][passage] = value
    return scored


def _ranked(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Sequence[str]]:
    return {query: sorted(own, key=lambda name: (-own[name], name)) for query, own in scores.items()}


def compared(values: Mapping[str, Mapping[str, float]], system: str) -> dict[str, float]:
    """A system's mean, and the teacher's difference from it with its 95 % interval and p."""
    queries = list(values["teacher"])
    own = [values[system][query] for query in queries]
    differences = [values["teacher"][query] - value for query, value in zip(queries, own, strict=True)]
    interval = bootstrap_interval(differences)
    return {
        "mean": fmean(own),
        "teacher_minus": fmean(differences),
        "low": interval.low,
        "high": interval.high,
        "p": paired_randomisation([values["teacher"][query] for query in queries], own),
    }


def merged(path: Path | None, measured: Mapping[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """What was measured now, and what an earlier result has of other sets and systems; the earlier sets come first."""
    earlier: dict[str, Any] = {}
    if path is not None and path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))["sets"]
    names = dict.fromkeys([*earlier, *measured])
    return {name: {**earlier.get(name, {}), **measured.get(name, {})} for name in names}


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The lines of the table: means, and how far the teacher is ahead of the student and the cross-encoder."""
    systems = [name for name in _SHOWN if any(name in own for own in results.values())]
    others = [name for name in ("D2LLM", CROSS_ENCODER) if name in systems]
    heads = [*systems, *(head for name in others for head in (f"teacher - {name}", "95 %", "p"))]
    lines = [f"| set | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, own in results.items():
        cells = [f"{own[system]['mean']:.3f}" if system in own else "-" for system in systems]
        for other in others:
            values = own.get(other)
            if values is None:
                cells += ["-", "-", "-"]
                continue
            interval = f"{values['low']:+.3f} to {values['high']:+.3f}"
            cells += [f"{values['teacher_minus']:+.3f}", interval, f"{values['p']:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("runs", type=Path, help="folder with a folder of runs for each data set")
    parser.add_argument("sets", nargs="*", default=sets_with_dev())
    parser.add_argument("--teacher", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"))
    parser.add_argument("--device", help="where these teachers compute; by default the best device")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for system, folder in given.teacher:
        teacher = load_teacher(TeacherConfig(model=folder), device=given.device, dtype="float32")  # bfloat16 makes ties
        for name in given.sets:
            write_teacher_run(system, teacher, given.data, given.runs, name)
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for name in given.sets:
        values = rows(given.data, given.runs, name)
        measured[name] = {system: compared(values, system) for system in values}
    results = merged(given.json, measured)
    print("\n".join(table(results)))
    if given.json is not None:
        given.json.write_text(json.dumps({"measure": MEASURE, "sets": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
