"""Another student for an index without encoding its passages again: a linear map of their vectors, and what it loses.

    python benchmarks/mapped_vectors.py --json benchmarks/results/mapped-vectors.json

A sample of passages is encoded by both students. A map from the old vectors to the new ones is fitted on it: by ridge
regression, or as a rotation (Procrustes). The other passages keep the old student's vectors, which are mapped, and are
searched with the new student's queries. nDCG@10 of the cosine on dev queries, among their relevant passages and random
ones, none of which is in the sample.

Sources: Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966; Smith et al., ICLR 2017 (arXiv
1702.03859), for vectors of words of two languages.

Licences: squad-sent CC BY-SA 4.0, wikiqa as Microsoft's research data; they are only measured on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scaling.data_sets import DATA, require
from untrained import make_student, ndcg, sample, unit

from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.ops.ridge import RidgeSet, folds_of, ridge_weights

SETS = ("squad-sent", "wikiqa")
CHANGES = (("minilm", "d2llm-minilm-cosine"), ("d2llm-multilingual", "d2llm-minilm-cosine"))
SAMPLES = (250, 1_000)
PENALTY = 0.03
NUM_QUERIES, NUM_PASSAGES = 200, 600

Vectors = NDArray[np.float64]


def ridge_map(old: Vectors, new: Vectors) -> tuple[Vectors, Vectors]:
    """W [old dim, new dim] and b with the least |old W + b - new|^2, with a penalty on W."""
    weights = ridge_weights([RidgeSet(old, new, folds_of(len(old)))], PENALTY)
    return weights, new.mean(axis=0) - old.mean(axis=0) @ weights


def rotation(old: Vectors, new: Vectors) -> tuple[Vectors, Vectors]:
    """The same, but W keeps lengths and angles: U V^T, from the singular vectors of the centred old^T new."""
    left, _, right = np.linalg.svd((old - old.mean(axis=0)).T @ (new - new.mean(axis=0)), full_matrices=False)
    weights = left @ right
    return weights, new.mean(axis=0) - old.mean(axis=0) @ weights


MAPS = {"ridge": ridge_map, "rotation": rotation}


def load(name: str) -> Student:
    """A shipped student, or an untrained backbone by its cosine."""
    return Student.load(name, device="cpu") if name.startswith("d2llm") else make_student(name)


def encoded(students: dict[str, Student], texts: list[str], *, queries: bool = False) -> dict[str, Vectors]:
    """The unit vectors of texts, by student."""
    vectors: dict[str, Vectors] = {}
    for name, student in students.items():
        read = student.encode_queries if queries else student.encode_passages
        vectors[name] = unit(read(texts).vectors).astype(np.float64)
    return vectors


def rows_of(name: str, students: dict[str, Student]) -> list[dict[str, Any]]:
    """A row for each change of student on one data set."""
    data = read_beir(DATA / name, splits=["dev"])
    queries, passages, qrels = sample(data, NUM_QUERIES, NUM_PASSAGES)
    others = sorted(data.passages.keys() - passages.keys())
    chosen = random.Random(2).sample(others, max(SAMPLES))
    by_query = encoded(students, [*queries.values()], queries=True)
    by_passage = encoded(students, [*passages.values()])
    fitted_on = encoded(students, [data.passages[passage_id].full_text for passage_id in chosen])
    rows: list[dict[str, Any]] = []
    for old, new in CHANGES:
        measured = {
            student: round(ndcg([*passages], by_passage[student], [*queries], by_query[student], qrels), 4)
            for student in (old, new)
        }
        row: dict[str, Any] = {
            "set": name,
            "from": old,
            "to": new,
            "old": measured[old],
            "encoded again": measured[new],
        }
        for size in SAMPLES:
            for kind, fit in MAPS.items():
                weights, shift = fit(fitted_on[old][:size], fitted_on[new][:size])
                mapped = by_passage[old] @ weights + shift
                row[f"{kind}, {size}"] = round(ndcg([*passages], mapped, [*queries], by_query[new], qrels), 4)
        rows.append(row)
        print(" | ".join(f"{value}" for value in row.values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    students = {name: load(name) for name in dict.fromkeys(name for change in CHANGES for name in change)}
    print("set | from | to | old | encoded again |", " | ".join(f"{kind}, {n}" for n in SAMPLES for kind in MAPS))
    rows = [row for name in SETS for row in rows_of(name, students)]
    if arguments.json is not None:
        settings = {"queries": NUM_QUERIES, "passages": NUM_PASSAGES, "penalty": PENALTY}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
