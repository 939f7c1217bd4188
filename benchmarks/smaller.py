"""What smaller students are worth, and how much faster they are: fewer layers, neurons or dimensions.

    python benchmarks/smaller.py                                  minilm before training, a few minutes
    python benchmarks/smaller.py --students RECIPE NESTED         students that were trained without and with
                                                                  losses.nested_cross_entropy (runs of `d2llm ablate`)
    python benchmarks/smaller.py --neurons FOLDER --sets squad-sent banking77     minilm with fewer neurons, kept there
    python benchmarks/smaller.py --distilled STUDENT ... --sets wikiqa banking77  and students made of these
    python benchmarks/smaller.py --json benchmarks/results/smaller.json

Depths: the cosine of a query's vector, as the head maps it, with those of passages, after the first layers of the
backbone, and texts per second of processor time of one core, on the same passages. A student that was not trained for
these depths is cut all the same. Neurons: the same of minilm whose feed-forward layers keep a fraction of their neurons
(``models.neurons``), and with four of six layers; passages that are not ranked say which go. Widths: the first
components of minilm's vectors, and their projection on principal components of the passages (the pooling ``projection``
before the first step). nDCG@10 on dev queries, among their relevant passages and random ones.

Licences: QNLI and squad-sent CC BY-SA 4.0, banking77 CC BY 4.0, wikiqa for research only; they are only measured on.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scaling.data_sets import DATA, require
from untrained import make_student, ndcg, sample, sample_parser

from d2llm.core.types import Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.layer_choice import choose_layers, layer_distances
from d2llm.models.neurons import prune_neurons
from d2llm.models.student import Student
from d2llm.recipe import Pooling
from d2llm.recipe.recipe import load_recipe

SETS: dict[str, Task] = {
    **dict.fromkeys(("qnli", "wikiqa", "squad-sent"), "asymmetric"),
    "banking77": "symmetric",
}
DEPTHS, WIDTHS, KEPT_NEURONS = (2, 4), (64, 128, 256), (0.75, 0.5, 0.25)
NUM_TEXTS = 1_000
RECIPE = Path(__file__).parent / "graded_lists" / "methods.toml"
Samples = dict[str, tuple[dict[str, str], dict[str, str], Any]]


def cut_anyway(folder: str) -> dict[int, Student]:
    """The student at each depth and whole, by number of layers, whether or not it was trained to be cut."""
    student = Student.load(folder, device="cpu")
    with TemporaryDirectory() as copy:
        student.save(Path(copy) / "student", content={"nested_depths": DEPTHS})
        marked = Student.load(Path(copy) / "student", device="cpu")
    return {depth: marked.cut(depth) for depth in DEPTHS} | {student.backbone.num_layers: student}


def measure(student: Student, samples: Samples) -> dict[str, float]:
    """nDCG@10 by set, and passages of all that are encoded a second."""
    row: dict[str, float] = {}
    num_texts, seconds = 0, 0.0
    for name, (queries, passages, qrels) in samples.items():
        student.encode_passages([*passages.values()][:8])
        started = time.process_time()
        found = student.encode_passages([*passages.values()]).vectors
        seconds += time.process_time() - started
        num_texts += len(passages)
        mapped = student.query_vectors(student.encode_queries([*queries.values()]).vectors, SETS[name])
        row[name] = round(ndcg([*passages], found, [*queries], mapped, qrels), 4)
    return row | {"texts_per_s": round(num_texts / seconds, 1)}


def rows_by_depth(folder: str, samples: Samples) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for depth, student in cut_anyway(folder).items():
        rows.append({"student": Path(folder).parent.name or folder, "layers": depth, **measure(student, samples)})
        print(rows[-1], flush=True)
    return rows


def rows_by_neurons(folder: Path, data: dict[str, Dataset], samples: Samples) -> list[dict[str, Any]]:
    """minilm with fewer neurons, saved under ``folder``, and with fewer layers."""
    texts: list[str] = []
    for name, each in data.items():
        unranked = [passage.full_text for key, passage in each.passages.items() if key not in samples[name][1]]
        texts += random.Random(0).sample(unranked, min(len(unranked), NUM_TEXTS // len(data)))
    config = load_recipe(RECIPE).student
    whole = Student.create(config, device="cpu", dtype="float32")
    students = {"all": whole} | {f"neurons {keep}": prune_neurons(whole, texts, keep) for keep in KEPT_NEURONS}
    chosen = choose_layers(layer_distances(whole.backbone, texts[:100]), DEPTHS[-1])
    fewer = config.model_copy(update={"backbone": config.backbone.model_copy(update={"layers": chosen})})
    students[f"layers {' '.join(map(str, chosen))}"] = Student.create(fewer, device="cpu", dtype="float32")
    rows: list[dict[str, Any]] = []
    for name, student in students.items():
        student.save(folder / name.replace(" ", "-"), merge=True)
        rows.append({"student": name, **measure(student, samples)})
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
    parser = sample_parser(__doc__)
    parser.add_argument("--students", nargs="*", default=[], help="folders of trained students to cut")
    parser.add_argument("--neurons", type=Path, help="measure minilm with fewer neurons, and keep it in this folder")
    parser.add_argument("--distilled", nargs="*", default=[], help="folders of trained students to measure as they are")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=("qnli", "banking77"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    require(*(DATA / name for name in arguments.sets))
    data = {name: read_beir(DATA / name, splits=["dev"]) for name in arguments.sets}
    samples = {name: sample(each, arguments.queries, arguments.passages) for name, each in data.items()}
    figures: dict[str, Any] = {"queries": arguments.queries, "passages": arguments.passages}
    figures["depths"] = [row for folder in arguments.students for row in rows_by_depth(folder, samples)]
    if arguments.neurons:
        figures["neurons"] = rows_by_neurons(arguments.neurons, data, samples)
    for folder in arguments.distilled:
        student = Student.load(folder, device="cpu", dtype="float32")
        row = {"student": Path(folder).parent.name, **measure(student, samples)}
        figures.setdefault("distilled", []).append(row)
        print(row, flush=True)
    if not arguments.students and not arguments.neurons and not arguments.distilled:
        figures["widths"] = rows_by_width(samples)
    if arguments.json:
        before = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
        figures = before | {name: rows for name, rows in figures.items() if rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
