"""How many candidates a search needs: nDCG@10 on dev queries by the number of passages that get the full score.

    python benchmarks/candidate_depth.py --work INDICES --json benchmarks/results/candidate-depth.json

Every data set with a dev split is indexed whole, as ``d2llm index`` does by default, and searched with its dev queries
(at most 300), by the shipped student of its language. Half of the candidates are the highest inner products, half the
best by BM25; beside nDCG@10, how many of the first ten are those of a search that scores every passage (recall), and
the processor time of a search without reading the query. The indices in INDICES are used again.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported

import numpy as np
import torch
from scaling.corpus import write_json
from scaling.data_sets import DATA, require

from d2llm import Index, Student
from d2llm.core.types import Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.ops.measures import per_query_measures
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings

CHINESE = ("cmrc2018", "drcd")
SYMMETRIC = ("banking77", "quora")
DEPTHS = (1_000, 500, 300, 200, 100, 50, 20)
QUERIES = 300


def dev_sets() -> list[str]:
    """The data sets with dev judgements."""
    tables = sorted(DATA.glob("*/qrels/dev.tsv"))
    return [path.parts[-3] for path in tables if len(path.read_text(encoding="utf-8").splitlines()) > 1]


def indexed(student: Student, dataset: Dataset, task: Task, folder: Path) -> Index:
    """The data set's index, made unless it is there; an unfinished one is continued."""
    index = Index.open(folder, student) if folder.exists() else Index.create(folder, student, task=task)
    if len(index) < len(dataset.passages):
        index.upsert(dataset.passages.values())
    return index


def measure(index: Index, student: Student, dataset: Dataset, task: Task) -> dict[str, Any]:
    """nDCG@10, recall against a search with all candidates, and time, by the number of candidates."""
    queries = [query for query in dataset.queries.values() if query.id in dataset.qrels["dev"]][:QUERIES]
    qrels = {query.id: dataset.qrels["dev"][query.id] for query in queries}
    texts = [query.text for query in queries]
    has_tokens = student.token_fingerprint is not None
    encoded = student.encode_with_tokens(texts, "query") if has_tokens else student.encode_queries(texts)
    first_ten: dict[str, set[str]] = {}
    rows: dict[str, Any] = {}
    for depth in (2 * len(index), *DEPTHS):
        searcher = Searcher(index.view, student, SearchSettings(task=task, num_candidates=depth, top_k=10))
        begin = time.process_time()
        rankings = {
            each.query.id: [passage for passage, _ in each.passages]
            for each in searcher.rank_ids(queries, encoded=encoded)
        }
        seconds = time.process_time() - begin
        first_ten = first_ten or {query: set(ranking) for query, ranking in rankings.items()}
        found = [len(first_ten[query] & set(ranking)) / len(first_ten[query]) for query, ranking in rankings.items()]
        rows["all" if depth == 2 * len(index) else str(depth)] = {
            "ndcg": float(np.mean(list(per_query_measures(rankings, qrels)["nDCG@10"].values()))),
            "recall": float(np.mean(found)),
            "ms": 1e3 * seconds / len(queries),
        }
    return {"passages": len(index), "queries": len(queries), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", help="names of data sets; by default all with a dev split")
    parser.add_argument("--work", type=Path, required=True, help="folder of the indices")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    require(DATA)
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for name in options.sets or dev_sets():
        student = Student.load("d2llm-multilingual" if name in CHINESE else "d2llm-minilm")
        dataset = read_beir(DATA / name, splits=["dev"])
        task: Task = "symmetric" if name in SYMMETRIC else "asymmetric"
        result[name] = measure(indexed(student, dataset, task, options.work / name), student, dataset, task)
        rows = result[name]["rows"]
        figures = "  ".join(f"{depth} {row['ndcg']:.4f} ({row['recall']:.3f})" for depth, row in rows.items())
        print(f"{name:14} {result[name]['passages']:7,} passages  {figures}", flush=True)
        if options.json:
            write_json(options.json, result)
    means = {each: np.mean([of["rows"][each]["ndcg"] for of in result.values()]) for each in ("all", *map(str, DEPTHS))}
    losses = {
        each: max(of["rows"]["all"]["ndcg"] - of["rows"][each]["ndcg"] for of in result.values()) for each in means
    }
    for each, mean in means.items():
        print(f"{each:>6} candidates: mean nDCG@10 {mean:.4f}, largest loss {losses[each]:+.4f}")


if __name__ == "__main__":
    main()
