"""Is the recorded teacher better than its student? All systems on the same dev lists, with intervals.

The lists are those of `judgements/SET.jsonl`: 100 dev queries with 20 passages each. Every system orders the 20
passages of a list; the measure is nDCG@10 by the data set's judgements of the whole corpus, so the best order of the
same 20 is the ceiling. The teacher is the graded teacher that repeats the recorded grades: the mean of two judgings.
The others come from the runs of an evaluation on dev,

    d2llm evaluate DATA/SET --split dev --no-teacher --save-runs RUNS/SET

whose rankings are restricted to the list; passages that a run does not have come last, in the order of their ids.

    python benchmarks/recorded_gate.py DATA RUNS [SET ...] --json benchmarks/results/recorded-gate.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from recorded_judge import read_graded_lists, recorded_teacher, sets_with_dev

from d2llm.data.beir import read_beir
from d2llm.data.trec import read_run
from d2llm.models.teachers.judge import load_judge
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import bootstrap_interval, paired_randomisation

MEASURE = "nDCG@10"
_SHOWN = (
    "teacher",
    "D2LLM",
    "cosine-D2LLM-vectors",
    "fitted-sum-BM25-cosine-tuned",
    "cosine-untuned",
    "BM25",
    "ceiling",
)


def rows(data: Path, runs: Path, name: str) -> dict[str, dict[str, float]]:
    """The measure of each query (system -> query id -> value) for one data set."""
    dataset = read_beir(data / name, splits=["train", "dev"])
    lists = {each.query_id: each for each in read_graded_lists(name) if each.split == "dev" and each.judging == 1}
    qrels = {query: dataset.qrels["dev"][query] for query in lists}
    judge = load_judge(recorded_teacher(data / name))
    scored: dict[str, dict[str, dict[str, float]]] = {"teacher": {}}
    for query, each in lists.items():
        texts = [(dataset.queries[query].text, dataset.passages[passage].full_text) for passage in each.passages]
        values = judge.judge(texts, each.task).log_odds.tolist()
        scored["teacher"][query] = dict(zip(each.passages, values, strict=True))
    scored["ceiling"] = {
        query: {passage: float(qrels[query].get(passage, 0)) for passage in each.passages}
        for query, each in lists.items()
    }
    for path in sorted((runs / name).glob("*")):
        run = read_run(path)
        scored[run.name] = {
            query: {passage: run.scores.get(query, {}).get(passage, -np.inf) for passage in each.passages}
            for query, each in lists.items()
        }
    return {system: per_query_measures(_ranked(own), qrels)[MEASURE] for system, own in scored.items()}


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


def main() -> None:
    """Print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("sets", nargs="*", default=sets_with_dev())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in given.sets:
        values = rows(given.data, given.runs, name)
        results[name] = {system: compared(values, system) for system in values}
    systems = [name for name in _SHOWN if any(name in own for own in results.values())]
    print("| set | " + " | ".join(systems) + " | teacher - D2LLM | 95 % | p |")
    print("|---|" + "---|" * (len(systems) + 3))
    for name, own in results.items():
        cells = [f"{own[system]['mean']:.3f}" if system in own else "-" for system in systems]
        student = own.get("D2LLM")
        if student is not None:
            interval = f"{student['low']:+.3f} to {student['high']:+.3f}"
            cells += [f"{student['teacher_minus']:+.3f}", interval, f"{student['p']:.4f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if given.json is not None:
        given.json.write_text(json.dumps({"measure": MEASURE, "sets": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
