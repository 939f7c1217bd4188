"""Reranking texts without an index: the whole score beside that of the vectors alone, on dev queries of six sets.

For each query, the first 50 passages of BM25, and of the cosine of the untuned backbone, are ranked again by

- `vectors`: the student's score of the vectors, all that a text without an index had before;
- `whole`: the score of `Student.rank`, with words as rare as in the tables that ship;
- `whole, set`: the same with the words of the set's own passages, as with an index of them.

nDCG@10 by the data set's judgements. The lists of 20 passages that a large language model has graded
(`judgements/SET.jsonl`) are ranked too, beside its grades; the queries are those of these lists, of dev splits. The
time of reranking 50 passages is measured for single queries, from texts to a ranking.

    python benchmarks/reranking.py DATA [SET ...] --json benchmarks/results/reranking.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recorded_judge import read_graded_lists, recorded_teacher

from d2llm import Student
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.teachers.pair_teacher import load_teacher
from d2llm.models.text_scores import Background, TextQuery, TextScorer
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import bootstrap_interval, paired_randomisation
from d2llm.recipe import StudentConfig
from d2llm.store.bm25 import WordIndex, rank_passages
from d2llm.store.word_segment import CountedTerms, QueryWords, WordStatistics

MEASURE = "nDCG@10"
DEPTH = 50
SETS = ("covidqa", "medquad", "squad-sent", "nfcorpus", "stackfaq", "wikiqa")
COUNTED = ("covidqa", "medquad", "squad-sent")
"""Sets of whose texts, or of texts from the same articles, some are counted in the tables that ship."""
_TIMED_QUERIES = 30
Scores = Mapping[str, Mapping[str, float]]
"""By query and passage."""


class SetWords(Background):
    """The background, but for words: they are as rare as in the passages of a set."""

    name = "set"

    def __init__(self, student: Student, words: WordIndex) -> None:
        super().__init__(student, "asymmetric")
        self._words = words

    def words(self, query: TextQuery) -> tuple[QueryWords, WordStatistics]:
        """Weighted by the set."""
        counted = CountedTerms.from_text(query.text, query.factors)
        return counted.weighted(self._words.rows_with(counted.hashes), len(self._words)), self._words.statistics


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    student = Student.load(arguments.student, device="cpu")
    untuned = Student.create(StudentConfig(), device="cpu")
    results: dict[str, Any] = {"measure": MEASURE, "student": student.fingerprint, "depth": DEPTH, "sets": {}}
    for name in arguments.sets:
        results["sets"][name] = measured(student, untuned, arguments.data / name)
        print(name, json.dumps(results["sets"][name]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(student: Student, untuned: Student, folder: Path) -> dict[str, Any]:
    """What was measured on a set."""
    graded = [one for one in read_graded_lists(folder.name) if one.split == "dev" and one.judging == 1]
    dataset = read_beir(folder, splits=["train", "dev"])
    qrels = {one.query_id: dataset.qrels["dev"][one.query_id] for one in graded}
    texts = {name: passage.full_text for name, passage in dataset.passages.items()}
    words = WordIndex.from_texts(texts.values())
    lists = {
        "BM25": bm25_lists(dataset, words, texts, [*qrels]),
        "cosine": cosine_lists(untuned, dataset, texts, [*qrels]),
        "graded": {one.query_id: list(one.passages) for one in graded},
    }
    systems = scored(student, words, dataset, texts, lists)
    systems["grades"] = grades(load_teacher(recorded_teacher(folder)), dataset, texts, lists["graded"])
    result: dict[str, Any] = {"queries": len(qrels), "counted": folder.name in COUNTED, "lists": {}}
    for kind, candidates in lists.items():
        order = {query: {name: -float(rank) for rank, name in enumerate(ids)} for query, ids in candidates.items()}
        best = {query: {name: float(judged.get(name, 0)) for name in texts} for query, judged in qrels.items()}
        values: dict[str, list[float]] = {}
        for system, of in {**systems, "best": best}.items():
            if kind == "graded" or system != "grades":
                listed = {query: {name: of[query][name] for name in ids} for query, ids in candidates.items()}
                values[system] = measure(listed, qrels)
        if kind != "graded":
            values["first"] = measure(order, qrels)
        result["lists"][kind] = compared(values)
    result["milliseconds"] = timed(student, dataset, texts, lists["BM25"])
    return result


def bm25_lists(
    dataset: Dataset, words: WordIndex, texts: Mapping[str, str], queries: Sequence[str]
) -> dict[str, list[str]]:
    """The first passages of BM25 for each query."""
    ranked = rank_passages(words, [*texts], (dataset.queries[query].text for query in queries), DEPTH)
    return {query: [one.passage_id for one in found] for query, found in zip(queries, ranked, strict=True)}


def cosine_lists(
    untuned: Student, dataset: Dataset, texts: Mapping[str, str], queries: Sequence[str]
) -> dict[str, list[str]]:
    """The passages with the highest cosines for each query, by the untuned backbone."""
    names = np.array([*texts])
    passages = unit(untuned.encode_passages([*texts.values()]).vectors)
    vectors = unit(untuned.encode_queries([dataset.queries[query].text for query in queries]).vectors)
    best = np.argsort(-(vectors @ passages.T), axis=1, kind="stable")[:, :DEPTH]
    return {query: names[row].tolist() for query, row in zip(queries, best, strict=True)}


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors with length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def scored(
    student: Student,
    words: WordIndex,
    dataset: Dataset,
    texts: Mapping[str, str],
    lists: Mapping[str, Mapping[str, Sequence[str]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """The scores of each system for the candidates of all lists; each passage is read once."""
    candidates = {
        query: [*dict.fromkeys(name for of in lists.values() for name in of[query])] for query in lists["graded"]
    }
    row_of: dict[str, int] = {}
    for name in (name for names in candidates.values() for name in names):
        row_of.setdefault(name, len(row_of))
    whole, of_set = TextScorer(student, task="asymmetric"), TextScorer(student, SetWords(student, words))
    queries, _ = whole.read_queries([dataset.queries[query].text for query in candidates])
    rows = whole.read_texts([texts[name] for name in row_of])
    systems: dict[str, dict[str, dict[str, float]]] = {"vectors": {}, "whole": {}, "whole, set": {}}
    for (query, names), read in zip(candidates.items(), queries, strict=True):
        at = np.array([row_of[name] for name in names], np.int64)
        for system, scorer, with_features in (
            ("vectors", whole, False),
            ("whole", whole, True),
            ("whole, set", of_set, True),
        ):
            scores = scorer.score(read, rows, at, with_features=with_features)
            systems[system][query] = dict(zip(names, scores.tolist(), strict=True))
    return systems


def grades(
    teacher: Any, dataset: Dataset, texts: Mapping[str, str], lists: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """The recorded grades of the graded lists, as log-odds."""
    pairs = [(query, name) for query, names in lists.items() for name in names]
    read = teacher.score_pairs([(dataset.queries[query].text, texts[name]) for query, name in pairs], "asymmetric")
    scores: dict[str, dict[str, float]] = {query: {} for query in lists}
    for (query, name), value in zip(pairs, read.log_odds.tolist(), strict=True):
        scores[query][name] = value
    return scores


def measure(scores: Scores, qrels: Mapping[str, Mapping[str, int]]) -> list[float]:
    """The measure of each query's ranking; ties by passage id."""
    ranked = {query: sorted(of, key=lambda name: (-of[name], name)) for query, of in scores.items()}
    values = per_query_measures(ranked, qrels)[MEASURE]
    return [values[query] for query in qrels]


def compared(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The means, and how much the whole score is above that of the vectors."""
    result: dict[str, Any] = {system: statistics.fmean(of) for system, of in values.items()}
    for system in ("whole", "whole, set"):
        differences = [one - other for one, other in zip(values[system], values["vectors"], strict=True)]
        interval = bootstrap_interval(differences)
        result[f"{system} - vectors"] = {
            "mean": statistics.fmean(differences),
            "low": interval.low,
            "high": interval.high,
            "p": paired_randomisation(values[system], values["vectors"]),
        }
    return result


def timed(
    student: Student, dataset: Dataset, texts: Mapping[str, str], lists: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Median milliseconds of reranking 50 passages, by the vectors and by the whole score, in turn."""

    def by_vectors(query: str, passages: Sequence[str]) -> None:
        vector = student.encode_queries([query]).vectors[0]
        student.score(vector, student.encode_passages(passages).vectors, "asymmetric")

    def by_all(query: str, passages: Sequence[str]) -> None:
        student.rank(query, passages, task="asymmetric")

    systems: dict[str, Callable[[str, Sequence[str]], None]] = {"vectors": by_vectors, "whole": by_all}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for query in [query for query, names in lists.items() if len(names) == DEPTH][: _TIMED_QUERIES + 2]:
        for name, rank in systems.items():
            begin = time.perf_counter()
            rank(dataset.queries[query].text, [texts[passage] for passage in lists[query]])
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(of[2:]) for name, of in seconds.items()}  # the first two warm up


if __name__ == "__main__":
    main()
