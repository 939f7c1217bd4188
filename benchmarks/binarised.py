"""What a bit a dimension costs students whose vectors are trained for it (BEBR), and others.

    python benchmarks/binarised.py minilm STUDENT... --json benchmarks/results/binarised.json

The students are those of `graded_lists/binarised.toml`, for instance; `minilm` is the backbone before training.

nDCG@10 on dev by inner products of queries with the passages' vectors as each format of an index stores them, 200
queries among at most 1,000 passages. A student with the pooling `binarised` makes codes of its queries too.
`binary, then int8`: the first 50 by one bit, ranked anew by the vectors that the bits were made of (of the inner
pooling), as an index with both could do it.

Licences: wikiqa Microsoft Research Data License (research only), banking77 CC BY 4.0; nothing that was trained on them
is shipped.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scaling.data_sets import DATA, require
from smaller import SETS
from untrained import make_student, ndcg, ndcg_of_scores, sample, unit

from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.store.vector_formats import make_format

DEPTH = 50


def rows_of(folder: str, samples: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each format."""
    student = Student.load(folder, device="cpu") if Path(folder).is_dir() else make_student(folder)
    rows: list[dict[str, Any]] = [
        {"student": Path(folder).name, "format": name} for name in ("float32", "int3", "binary")
    ]
    rescored: dict[str, Any] = {"student": Path(folder).name, "format": "binary, then int8"}
    for name, (queries, passages, qrels) in samples.items():
        vectors = student.encode_passages([*passages.values()]).vectors
        mapped = student.query_vectors(student.encode_queries([*queries.values()]).vectors, SETS[name])
        for row in rows:
            stored = make_format(row["format"], student.vector_dim)
            decoded = stored.decode(stored.encode(vectors, [*passages]))
            row[name] = round(ndcg([*passages], decoded, [*queries], mapped, qrels), 4)
        stored = make_format("binary", student.vector_dim)
        by_bits = unit(mapped) @ unit(stored.decode(stored.encode(vectors, [*passages]))).T
        is_out = by_bits < -np.sort(-by_bits, axis=1)[:, DEPTH - 1 : DEPTH]
        inner = inner_of(student)
        stored = make_format("int8", inner.vector_dim)
        decoded = stored.decode(stored.encode(inner.encode_passages([*passages.values()]).vectors, [*passages]))
        scores = unit(inner.encode_queries([*queries.values()]).vectors) @ unit(decoded).T
        scores[is_out] = -np.inf
        rescored[name] = round(ndcg_of_scores([*passages], [*queries], scores, qrels), 4)
    return [*rows, rescored]


def inner_of(student: Student) -> Student:
    """The student with the vectors that its bits were made of; itself if it makes none."""
    inner = copy.deepcopy(student)
    inner.pooling = student.pooling.inner or student.pooling
    return inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", help="folders of students")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ("wikiqa", "banking77")
    require(*(DATA / name for name in names))
    samples = {name: sample(read_beir(DATA / name, splits=["dev"]), 200, 1_000) for name in names}
    rows = [row for folder in arguments.students for row in rows_of(folder, samples)]
    print("\n".join(map(str, rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
