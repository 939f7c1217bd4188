"""What static vectors save and lose: encoding speed and nDCG@10 beside the transformer that they come from.

    python benchmarks/static.py
    python benchmarks/static.py --json benchmarks/results/static.json

`d2llm distill-static` reads minilm's vocabulary, weighted by the passages of both sets. Then, before any training: the
cosine of 200 dev queries of each set among at most 500 passages, and texts a second in one thread, from text to
vector, tokenizing included; the two models take turns on the same passages, and each has its fastest number format.
Students have PMA and the default head; their speed is measured too, since PMA is then most of the work.

Licences: squad-sent, covidqa CC BY-SA 4.0 and Apache-2.0, banking77 CC BY 4.0; they are only measured on.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from scaling.data_sets import DATA, require
from untrained import make_student, ndcg, sample, sample_parser

from d2llm.data.beir import read_beir
from d2llm.models.backbone import Backbone
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Frozen, StudentConfig
from d2llm.training.distill_static import distill_static

SETS = ("squad-sent", "banking77", "covidqa")
REPEATS = 3


def seconds_to_encode(student: Student, texts: list[str]) -> float:
    begin = time.process_time()
    student.encode_passages(texts)
    return time.process_time() - begin


def main() -> None:
    parser = sample_parser(__doc__, num_passages=500)
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    data = {name: read_beir(DATA / name, splits=["dev"]) for name in SETS}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        folder = str(Path(work) / "static")
        backbone = Backbone.load(BackboneConfig(model="minilm"), device="cpu")
        begin = time.process_time()
        passages = (passage.full_text for each in data.values() for passage in each.passages.values())
        made = distill_static(backbone, passages, folder)
        seconds = time.process_time() - begin
        print(f"{made.num_vectors:,} vectors from {made.num_passages:,} passages: {seconds:.0f} s of the processor")
        plain = {"minilm": make_student("minilm"), "static": make_student(folder)}
        configs = {
            "minilm": StudentConfig(),
            "static": StudentConfig(backbone=BackboneConfig(model=folder, tuning=Frozen())),
        }
        students = {name: Student.create(config, device="cpu") for name, config in configs.items()}
        for name, each in data.items():
            queries, texts, qrels = sample(each, arguments.queries, arguments.passages)
            row: dict[str, Any] = {"set": name, "passages": len(texts)}
            for model, student in plain.items():
                vectors = [student.encode_passages([*texts.values()]), student.encode_queries([*queries.values()])]
                row["tokens a passage"] = round(vectors[0].num_tokens / len(texts), 1)
                found = ndcg([*texts], vectors[0].vectors, [*queries], vectors[1].vectors, qrels)
                row[f"nDCG@10, {model}"] = round(found, 4)
            for kind, group in (("vectors alone", plain), ("with PMA", students)):
                times = {model: [seconds_to_encode(group[model], [*texts.values()])] for model in group}
                for _ in range(REPEATS):
                    for model in group:
                        times[model].append(seconds_to_encode(group[model], [*texts.values()]))
                speeds = {model: len(texts) / min(each[1:]) for model, each in times.items()}
                row |= {f"texts/s, {model}, {kind}": round(speed, 1) for model, speed in speeds.items()}
                row[f"times as fast, {kind}"] = round(speeds["static"] / speeds["minilm"], 1)
            rows.append(row)
            for key, value in row.items():
                print(f"{key:36} {value}", flush=True)
    if arguments.json is not None:
        settings = {
            "queries": arguments.queries,
            "seconds to make": round(seconds, 1),
            "dtype": str(backbone.compute_dtype).removeprefix("torch."),
        }
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
