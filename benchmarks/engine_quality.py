"""Effect of an engine on rankings: nDCG@10 on dev queries, with each engine encoding both queries and passages.

For each data set: the first dev queries, with all their relevant passages and a number of others, sampled with a
fixed seed. Using fewer passages than the whole corpus raises every figure, so only differences between rows count.
Every passage gets the full score. With --only-queries, an index has vectors and token embeddings in float32, each
engine encodes queries alone, and rankings are those of its searches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from d2llm import Index, Student
from d2llm.core.manifest import package_versions
from d2llm.core.types import EngineName
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data
from d2llm.models.device import cpu_has_fast_bfloat16
from d2llm.ops.measures import per_query_measures

DATA = Path(__file__).parents[2] / "shared" / "data"
RESULT = Path(__file__).parent / "results" / "engine-quality.json"
QUERIES_RESULT = RESULT.with_name("engine-quality-queries.json")
ENGINES: tuple[EngineName, ...] = ("torch", "onnx", "openvino", "onnx-int8", "openvino-int8")
IN_BFLOAT16: tuple[EngineName, ...] = ("openvino", "openvino-int8")


def sample(dataset: Dataset, num_queries: int, num_passages: int) -> tuple[list[str], list[str]]:
    """Ids of the queries, and of the passages to rank for each of them."""
    positives = {query: relevant for query, relevant in dataset.positives("dev").items() if relevant}
    queries = list(positives)[:num_queries]
    relevant = dict.fromkeys(passage for query in queries for passage in positives[query])
    others = [passage for passage in dataset.passages if passage not in relevant]
    drawn = np.random.default_rng(0).permutation(len(others))[:num_passages]
    return queries, [*relevant, *(others[index] for index in drawn)]


def quality(student: Student, dataset: Dataset, queries: list[str], passages: list[str]) -> float:
    """nDCG@10 of the full score, mean over the queries."""
    texts = [f"{dataset.passages[name].title} {dataset.passages[name].text}".strip() for name in passages]
    vectors = student.encode_passages(texts).vectors
    query_vectors = student.encode_queries([dataset.queries[name].text for name in queries]).vectors
    scores = [student.score(query, vectors, "asymmetric") for query in query_vectors]
    rankings = {name: [passages[at] for at in np.argsort(-row)] for name, row in zip(queries, scores, strict=True)}
    qrels = {name: dataset.qrels["dev"][name] for name in queries}
    return float(np.mean(list(per_query_measures(rankings, qrels)["nDCG@10"].values())))


def measure(student: Student, dataset: Dataset, num_queries: int, num_passages: int) -> dict[str, float]:
    """nDCG@10 by engine."""
    queries, passages = sample(dataset, num_queries, num_passages)
    values: dict[str, float] = {}
    for engine in ENGINES:
        student.use_engine(engine)
        values[engine] = quality(student, dataset, queries, passages)
    for engine in IN_BFLOAT16 if cpu_has_fast_bfloat16() else ():
        student.use_engine(engine, dtype=torch.bfloat16)
        values[f"{engine} bfloat16"] = quality(student, dataset, queries, passages)
    return values


def measure_queries(student: Student, dataset: Dataset, num_queries: int, num_passages: int) -> dict[str, float]:
    """nDCG@10 of searches by the engine that encodes queries, and how many first passages are other ones than torch's.

    The index has what the student's score counts, in float32.
    """
    queries, passages = sample(dataset, num_queries, num_passages)
    qrels = {name: dataset.qrels["dev"][name] for name in queries}
    values: dict[str, float] = {}
    student.use_engine("torch")
    with TemporaryDirectory() as folder, Index.create(Path(folder) / "index", student, task="asymmetric") as index:
        index.upsert(dataset.passages[name] for name in passages)
        firsts: list[str] = []
        for engine in ENGINES:
            student.use_engine(engine)
            results = index.search([dataset.queries[name] for name in queries], top_k=10)
            rankings = {name: [each.passage.id for each in row] for name, row in zip(queries, results, strict=True)}
            values[engine] = float(np.mean(list(per_query_measures(rankings, qrels)["nDCG@10"].values())))
            first = [ranking[0] for ranking in rankings.values()]
            firsts = firsts or first
            values[f"{engine} other first"] = float(np.mean([a != b for a, b in zip(first, firsts, strict=True)]))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--data", type=Path, nargs="*", default=[DATA / n for n in ("wikiqa", "nfcorpus", "stackfaq")])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--only-queries", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or (QUERIES_RESULT if arguments.only_queries else RESULT)
    student = Student.load(arguments.student, device="cpu", dtype="float32")
    rows: dict[str, dict[str, float]] = {}
    for folder in arguments.data:
        dataset = open_data(folder, splits=["dev"])
        assert isinstance(dataset, Dataset)
        measured = measure_queries if arguments.only_queries else measure
        rows[folder.name] = measured(student, dataset, arguments.queries, arguments.passages)
        print(folder.name, {name: round(value, 4) for name, value in rows[folder.name].items()})
    result = {"student": arguments.student, "queries": arguments.queries, "passages": arguments.passages}
    out.write_text(
        json.dumps({**result, "packages": package_versions(), "nDCG@10": rows}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
