"""What smaller students are worth, and how much faster they are: fewer layers, and fewer dimensions.

    python benchmarks/smaller.py                                  minilm before training, a few minutes
    python benchmarks/smaller.py --students RECIPE NESTED         students that were trained without and with
                                                                  losses.nested_cross_entropy (runs of `d2llm ablate`)
    python benchmarks/smaller.py --json benchmarks/results/smaller.json

Depths: the cosine of a query's vector, as the head maps it, with those of passages, after the first layers of the
backbone, and texts per second of processor time of one core, on the same passages. A student that was not trained for
these depths is cut all the same. Widths: the first components of minilm's vectors, and their projection on principal
components of the passages (the pooling ``projection`` before the first step). nDCG@10 on dev queries, among their
relevant passages and random ones.

Licences: QNLI CC BY-SA 4.0, banking77 CC BY 4.0; they are only measured on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scaling.data_sets import DATA, require
from untrained import make_student, ndcg, sample

from d2llm.core.types import Task
from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.recipe import Pooling

SETS: dict[str, Task] = {"qnli": "asymmetric", "wikiqa": "asymmetric", "banking77": "symmetric"}
DEPTHS, WIDTHS = (2, 4), (64, 128, 256)
Samples = dict[str, tuple[dict[str, str], dict[str, str], Any]]


def cut_anyway(folder: str) -> dict[int, Student]:
    """The student at each depth and whole, by number of layers, whether or not it was trained to be cut."""
    student = Student.load(folder, device="cpu")
    with TemporaryDirectory() as copy:
        student.save(Path(copy) / "student", content={"nested_depths": DEPTHS})
        marked = Student.load(Path(copy) / "student", device="cpu")
    return {depth: marked.cut(depth) for depth in DEPTHS} | {student.backbone.num_layers: student}


def rows_by_depth(folder: str, samples: Samples) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for depth, student in cut_anyway(folder).items():
        row: dict[str, Any] = {"student": Path(folder).parent.name or folder, "layers": depth}
        num_texts, seconds = 0, 0.0
        for name, (queries, passages, qrels) in samples.items():
            student.encode_passages([*passages.values()][:8])
            started = time.process_time()
            found = student.encode_passages([*passages.values()]).vectors
            seconds += time.process_time() - started
            num_texts += len(passages)
            mapped = student.query_vectors(student.encode_queries([*queries.values()]).vectors, SETS[name])
            row[name] = round(ndcg([*passages], found, [*queries], mapped, qrels), 4)
        rows.append(row | {"texts_per_s": round(num_texts / seconds, 1)})
        print(rows[-1], flush=True)
    return rows


def rows_by_width(samples: Samples) -> list[dict[str, Any]]:
    whole = make_student("minilm")
    rows: list[dict[str, Any]] = []
    for name, (queries, passages, qrels) in samples.items():
        texts, ids, query_ids = [*passages.values()], [*passages], [*queries]
        found, asked = whole.encode_passages(texts).vectors, whole.encode_queries([*queries.values()]).vectors
        for width in (*WIDTHS, whole.vector_dim):
            row: dict[str, Any] = {"set": name, "width": width}
            row["first components"] = round(ndcg(ids, found[:, :width], query_ids, asked[:, :width], qrels), 4)
            if width < whole.vector_dim:
                pooling = Pooling.of({"kind": "projection", "dim": width})
                student = Student.create(whole.config.model_copy(update={"pooling": pooling}), device="cpu")
                student.fit_pooling(texts)
                p, q = student.encode_passages(texts).vectors, student.encode_queries([*queries.values()]).vectors
                row["projection_dim"] = round(ndcg(ids, p, query_ids, q, qrels), 4)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="*", default=[], help="folders of trained students to cut")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=("qnli", "banking77"))
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--passages", type=int, default=1_000)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    require(*(DATA / name for name in arguments.sets))
    data = {name: read_beir(DATA / name, splits=["dev"]) for name in arguments.sets}
    samples = {name: sample(each, arguments.queries, arguments.passages) for name, each in data.items()}
    figures: dict[str, Any] = {"queries": arguments.queries, "passages": arguments.passages}
    figures["depths"] = [row for folder in arguments.students for row in rows_by_depth(folder, samples)]
    if not arguments.students:
        figures["widths"] = rows_by_width(samples)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
