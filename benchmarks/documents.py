"""Documents ranked by their passages, and long texts that are split into passages or truncated.

One run with the student `d2llm-minilm` on dev splits. covidqa (Apache-2.0): find the article that holds the answer
among 98 articles, indexed as 2,612 passages, by the best passage and by the sum of the best 2 to 10. covidqa and
pubmedqa (MIT): each passage of the set treated as a document, truncated at the student's 256 tokens or split into
passages of at most 256 or 128 tokens, ranked by both rules; those of covidqa also as late chunks, each encoded with the
whole document. All results are nDCG@10.

    python benchmarks/documents.py [--only late]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scaling.data_sets import DATA, require

from d2llm import Student
from d2llm.core.types import Passage, Qrels, Query
from d2llm.data.beir import Dataset, read_beir
from d2llm.ops.measures import per_query_measures
from d2llm.retrieval.chunking import Chunker
from d2llm.retrieval.index import Index
from d2llm.store.index_manifest import Chunking

SPLITS = ((256, 0), (128, 0), (128, 32))
LATE = (256, 128)
SUMMED = (2, 3, 5, 10)
RESULT = Path(__file__).parent / "results" / "documents.json"


def ndcg(index: Index, queries: list[Query], qrels: Qrels, **settings: Any) -> dict[str, float]:
    """nDCG@10 of a search for documents, and milliseconds per query."""
    start = time.perf_counter()
    results = index.search(queries, **settings)
    ms = 1e3 * (time.perf_counter() - start) / len(queries)
    rankings = {
        ranking.query.id: [
            result.document.id if result.document else result.passage.document_id or result.passage.id
            for result in ranking.passages
        ]
        for ranking in results
    }
    values = per_query_measures(rankings, qrels)["nDCG@10"].values()
    return {"ndcg_at_10": float(np.mean(list(values))), "ms_per_query": ms}


def articles(student: Student, folder: Path) -> dict[str, dict[str, float]]:
    """covidqa's articles, ranked by their passages."""
    data = read_beir(DATA / "covidqa", splits=["dev"])
    queries = [Query(i, data.queries[i].text) for i in data.qrels["dev"]]
    qrels = {i: {passage.split("-")[0]: 1 for passage in data.qrels["dev"][i]} for i in data.qrels["dev"]}
    index = Index.create(folder / "articles", student)
    index.upsert(_as_parts(data.passages.values()))
    rows = {"best": ndcg(index, queries, qrels, group="best")}
    for count in SUMMED:
        rows[f"sum of {count}"] = ndcg(index, queries, qrels, group="sum", document_passages=count)
    return rows


def _as_parts(passages: Iterable[Passage]) -> Iterable[Passage]:
    for passage in passages:
        article, number = passage.id.split("-")
        yield replace(passage, document_id=article, position=int(number))


def long_texts(student: Student, folder: Path, name: str) -> dict[str, dict[str, float]]:
    """The passages of a set, truncated or split."""
    data = read_beir(DATA / name, splits=["dev"])
    queries, qrels = [Query(i, data.queries[i].text) for i in data.qrels["dev"]], data.qrels["dev"]
    whole = Index.create(folder / name, student)
    report = whole.upsert(data.passages.values())
    rows = {"cut at 256": ndcg(whole, queries, qrels) | _cost(report.num_passages, report.num_truncated)}
    for tokens, overlap in SPLITS:
        chunker = Chunker(student, Chunking(tokens, overlap))
        rows |= _split(student, folder, data, f"split at {tokens}, overlap {overlap}", chunker)
    return rows


def late_chunks(student: Student, folder: Path, name: str) -> dict[str, dict[str, float]]:
    """The passages of a set split, with each piece encoded together with the whole passage."""
    data = read_beir(DATA / name, splits=["dev"])
    rows: dict[str, dict[str, float]] = {}
    for tokens in LATE:
        chunker = Chunker(student, Chunking(tokens, late=True))
        rows |= _split(student, folder, data, f"late chunks of {tokens}", chunker)
    return rows


def _split(student: Student, folder: Path, data: Dataset, row: str, chunker: Chunker) -> dict[str, dict[str, float]]:
    queries, qrels = [Query(i, data.queries[i].text) for i in data.qrels["dev"]], data.qrels["dev"]
    index = Index.create(Path(tempfile.mkdtemp(dir=folder)) / "index", student)
    made = index.upsert_documents(data.passages.values(), chunker)
    cost = _cost(made.num_passages, made.num_truncated) | {"tokens_read": made.num_tokens}
    return {f"{row}, {group}": ndcg(index, queries, qrels, group=group) | cost for group in ("best", "sum")}


def _cost(num_passages: int, num_truncated: int) -> dict[str, float]:
    return {"passages": num_passages, "truncated": num_truncated}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["late"], help="measure late chunks only, and keep the other rows")
    only_late = parser.parse_args().only == "late"
    require(*(DATA / name for name in ("covidqa", "pubmedqa")))
    torch.set_num_threads(1)
    student = Student.load("d2llm-minilm")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if only_late:
            result = json.loads(RESULT.read_text())["sets"]
        else:
            result = {"covidqa articles": articles(student, folder)}
            for name in ("covidqa", "pubmedqa"):
                result[name] = long_texts(student, folder, name)
        result["covidqa"] |= late_chunks(student, folder, "covidqa")
    for name, rows in result.items():
        print(name)
        for row, values in rows.items():
            cost = f"{values['ms_per_query']:.1f} ms   {values.get('passages', '')}"
            print(f"  {row:32} {values['ndcg_at_10']:.4f}   {cost}")
    RESULT.write_text(json.dumps({"student": "d2llm-minilm", "split": "dev", "sets": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
