"""What an index takes on disk with smaller numbers, and what its searches lose: dev queries of four sets, full score.

    python benchmarks/index_formats.py [SET ...]

Each set is indexed as `d2llm index` does it, with all of its passages, in four ways: as it is by default, with int8
vectors that are stored once, and with token embeddings of fewer bits besides. Bytes are those of the folder, texts
included, after compaction. Queries are the first 300 of the dev split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from scaling.data_sets import DATA, require

from d2llm import Index, Student
from d2llm.core.files import folder_bytes
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.tokens import EncodedTexts, TextKind
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import paired_randomisation

SETS = ("covidqa", "nfcorpus", "squad-sent", "stackfaq")
WAYS: dict[str, dict[str, Any]] = {
    "by default": {},
    "int8 vectors once": {"vector_format": "int8", "vector_copies": 1},
    "int8 vectors once, int3 tokens": {"vector_format": "int8", "vector_copies": 1, "token_vectors": "int3"},
    "int8 vectors once, binary tokens": {"vector_format": "int8", "vector_copies": 1, "token_vectors": "binary"},
}
MAX_QUERIES = 300
RESULT = Path(__file__).parent / "results" / "index-formats.json"


def searched(index: Index, dataset: Dataset) -> list[float]:
    """nDCG@10 of each query."""
    qrels = dict(islice(((query, judged) for query, judged in dataset.qrels["dev"].items() if judged), MAX_QUERIES))
    rankings = index.search([dataset.queries[query].text for query in qrels], top_k=10)
    ranked = {
        query: [result.passage.id for result in ranking.passages]
        for query, ranking in zip(qrels, rankings, strict=True)
    }
    values = per_query_measures(ranked, qrels)["nDCG@10"]
    return [values[query] for query in qrels]


def read_once(student: Student) -> None:
    """Let a student remember what it read, as four indexes are made of the same texts."""
    read, known = student.encode_with_tokens, dict[Any, Any]()

    def remembered(texts: Sequence[str], kind: TextKind, **options: Any) -> EncodedTexts:
        key = kind, tuple(texts)
        if key not in known:
            known[key] = read(texts, kind, **options)
        return known[key]

    student.encode_with_tokens = remembered


def measure(student: Student, dataset: Dataset) -> dict[str, Any]:
    """Bytes a passage and nDCG@10 in each way, and the difference from the default."""
    rows: dict[str, Any] = {}
    default: list[float] = []
    for way, spec in WAYS.items():
        with TemporaryDirectory() as folder, Index.create(Path(folder) / "index", student, **spec) as index:
            index.upsert(dataset.passages.values())
            index.compact(timedelta(0))
            values = searched(index, dataset)
            default = default or values
            rows[way] = {
                "bytes a passage": folder_bytes(index.store.folder) / len(index),
                "nDCG@10": fmean(values),
                "difference": fmean(values) - fmean(default),
                "p": paired_randomisation(values, default),
            }
        print(f"{dataset.name:12} {way:34} {rows[way]}", flush=True)
    return {"passages": len(dataset.passages), "queries": len(default), "ways": rows}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--json", type=Path, default=RESULT)
    given = parser.parse_args()
    require(*(DATA / name for name in given.sets))
    student = Student.load("d2llm-minilm")
    read_once(student)
    results: dict[str, Any] = {"student": student.fingerprint, "sets": {}}
    for name in given.sets:
        results["sets"][name] = measure(student, read_beir(DATA / name, splits=["dev"]))
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
