"""Reranking texts without an index: the whole score beside that of the vectors alone, on dev queries of six sets.

For each query, the first 50 passages of BM25, and of the cosine of the untuned backbone, are ranked again by

- `vectors`: the student's score of the vectors, all that a text without an index had before;
- `whole`: the score of `Student.rank`, with words as rare as in the tables that ship;
- `whole, set`: the same with the words of the set's own passages, as with an index of them.

nDCG@10 by the data set's judgements. A large language model is the teacher: it has graded 20 passages of each query
(`judgements/SET.jsonl`, which are ranked, too), and of some queries all passages of both lists
(`judgements/long/SET.jsonl`). The queries are those of its lists, of dev splits. The time of reranking 50 passages is
measured for single queries, from texts to a ranking.

    python benchmarks/reranking.py DATA [SET ...] --work VECTORS --json benchmarks/results/reranking.json
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
from recorded_judge import RECORDED, mean_grades, read_graded_lists

from d2llm import Student
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.text_scores import Background, TextQuery, TextScorer
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import bootstrap_interval, paired_randomisation
from d2llm.recipe import StudentConfig
from d2llm.store.bm25 import WordIndex, rank_passages
from d2llm.store.word_segment import CountedTerms, QueryWords, WordStatistics

MEASURE = "nDCG@10"
DEPTH = 50
ENGINE = "openvino-int8"
"""Reads the corpora for the untuned backbone's lists; with torch, it takes three times as long."""
SETS = ("covidqa", "medquad", "squad-sent", "nfcorpus", "stackfaq", "wikiqa")
COUNTED = ("covidqa", "medquad", "squad-sent")
"""Sets of whose texts, or of texts from the same articles, some are counted in the tables that ship."""
LONG = {path.stem for path in RECORDED.glob("long/*.jsonl")}
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
    parser.add_argument("--work", type=Path, required=True, help="where the backbone's vectors are kept")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    student = Student.load(arguments.student, device="cpu")
    untuned = Student.create(StudentConfig(), device="cpu")
    untuned.use_engine(ENGINE)
    results: dict[str, Any] = {"measure": MEASURE, "depth": DEPTH, "sets": {}}
    if arguments.json is not None and arguments.json.exists():  # other sets stay as they were measured
        results["sets"] = json.loads(arguments.json.read_text(encoding="utf-8"))["sets"]
    for name in arguments.sets:
        results["sets"][name] = measured(student, untuned, arguments.data / name, arguments.work)
        print(name, json.dumps(results["sets"][name]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(student: Student, untuned: Student, folder: Path, work: Path) -> dict[str, Any]:
    """What was measured on a set."""
    recorded = [one for one in read_graded_lists(folder.name) if one.split == "dev"]
    long = read_graded_lists(f"long/{folder.name}") if folder.name in LONG else []
    graded = [one for one in recorded if one.judging == 1]
    dataset = read_beir(folder, splits=["train", "dev"])
    qrels = {one.query_id: dataset.qrels["dev"][one.query_id] for one in graded}
    texts = {name: passage.full_text for name, passage in dataset.passages.items()}
    words = WordIndex.from_texts(texts.values())
    lists = {
        "BM25": bm25_lists(dataset, words, texts, [*qrels]),
        "cosine": cosine_lists(untuned, dataset, texts, [*qrels], work),
        "graded": {one.query_id: list(one.passages) for one in graded},
        **(orders_all_graded(folder.name) if long else {}),
    }
    systems = scored(student, words, dataset, texts, lists)
    systems["best"] = {query: {name: float(judged.get(name, 0)) for name in texts} for query, judged in qrels.items()}
    grades = mean_grades([*recorded, *long])
    result: dict[str, Any] = {"student": student.fingerprint, "counted": folder.name in COUNTED, "lists": {}}
    for kind, candidates in lists.items():
        has_grades = {"grades": grades} if "graded" in kind else {}
        values = ranked_again(candidates, systems | has_grades, qrels, ordered=kind != "graded")
        result["lists"][kind] = compared(values)
    result["milliseconds"] = timed(student, dataset, texts, lists["BM25"])
    return result


def orders_all_graded(name: str) -> dict[str, dict[str, list[str]]]:
    """The lists of BM25 and of the cosine whose passages were all graded, in their order."""
    lines = [
        json.loads(line) for line in (RECORDED / "long" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {
        f"{kind}, all graded": {line["query_id"]: line[kind.lower()] for line in lines} for kind in ("BM25", "cosine")
    }


def ranked_again(
    candidates: Mapping[str, Sequence[str]],
    systems: Mapping[str, Scores],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ordered: bool,
) -> dict[str, list[float]]:
    """The measure of each query's candidates by each system, and, if their order says something, in that order."""
    judged = {query: qrels[query] for query in candidates}
    values = {
        system: measure({query: {name: of[query][name] for name in ids} for query, ids in candidates.items()}, judged)
        for system, of in systems.items()
    }
    if ordered:
        order = {query: {name: -float(rank) for rank, name in enumerate(ids)} for query, ids in candidates.items()}
        values["first"] = measure(order, judged)
    return values


def bm25_lists(
    dataset: Dataset, words: WordIndex, texts: Mapping[str, str], queries: Sequence[str]
) -> dict[str, list[str]]:
    """The first passages of BM25 for each query."""
    ranked = rank_passages(words, [*texts], (dataset.queries[query].text for query in queries), DEPTH)
    return {query: [one.passage_id for one in found] for query, found in zip(queries, ranked, strict=True)}


def cosine_lists(
    untuned: Student, dataset: Dataset, texts: Mapping[str, str], queries: Sequence[str], work: Path
) -> dict[str, list[str]]:
    """The passages with the highest cosines for each query, by the untuned backbone; their vectors are kept."""
    names = np.array([*texts])
    if not (known := work / f"{dataset.name}.npy").exists():
        work.mkdir(parents=True, exist_ok=True)
        np.save(known, unit(untuned.encode_passages([*texts.values()]).vectors))
    passages = np.load(known, allow_pickle=False)
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
        query: [*dict.fromkeys(name for of in lists.values() for name in of.get(query, ()))]
        for query in lists["graded"]
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


def measure(scores: Scores, qrels: Mapping[str, Mapping[str, int]]) -> list[float]:
    """The measure of each query's ranking; ties by passage id."""
    ranked = {query: sorted(of, key=lambda name: (-of[name], name)) for query, of in scores.items()}
    values = per_query_measures(ranked, qrels)[MEASURE]
    return [values[query] for query in qrels]


def compared(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The means, and how much the whole score is above that of the vectors."""
    result: dict[str, Any] = {"queries": len(values["whole"])}
    result |= {system: statistics.fmean(of) for system, of in values.items()}
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
