"""What training on texts without labels does to a backbone, before any distillation.

    python benchmarks/pretraining.py --json benchmarks/results/pretraining.json    all rows, some 25 minutes of a core
    python benchmarks/pretraining.py --rows full+simcse --rate 1e-5                some of them, with another rate

nDCG@10 of the plain cosine on dev queries, as in benchmarks/untrained.py, after ``training.pretrain``: minilm with all
its layers (full), by itself, and without two of six (cut), by itself, taught by all six, or taught by e5, which has
another tokenizer (by-e5); the same with vectors of 128 dimensions (full-narrow, narrow), principal components of the
vectors of the same texts unless ``components`` trains the projection; and with the first eight layers of smollm2, as
they are (decoder) or with attention in both directions (two-way), both pooled by the mean. The texts are passages of
squad-sent that no query of dev or test is about and that are not ranked here, and train queries of squad-sent and
banking77. Rows that are in the JSON file already are kept.

Licences: squad-sent CC BY-SA 4.0, banking77 CC BY 4.0; nothing that was trained on them here is shipped.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scaling.data_sets import DATA, require
from untrained import SETS, ndcg, sample, sample_parser

from d2llm.data.beir import Dataset, read_beir
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, InteractionConfig, Pooling, Pretraining, StudentConfig
from d2llm.training.pretrain import pretrain_backbone

BACKBONES: dict[str, dict[str, Any]] = {
    "full": {"model": "minilm", "layers": None},
    "cut": {"model": "minilm", "layers": (0, 1, 4, 5)},
    "full-narrow": {"model": "minilm", "layers": None},
    "narrow": {"model": "minilm", "layers": (0, 1, 4, 5)},
    "by-e5": {"model": "minilm", "layers": (0, 1, 4, 5)},
    "decoder": {"model": "smollm2", "layers": 8},
    "two-way": {"model": "smollm2", "layers": 8, "bidirectional": True},
}
STAGES: dict[str, dict[str, Any]] = {"attention": {"kind": "relations", "version": 1}}
"""Stages of which the objective is not the kind."""
ROWS = (
    *("full", "full+simcse", "full+mirror", "full+retromae", "full+condenser"),
    *("full+cocondenser", "full+cot_mae", "full+declutr"),
    *(
        "cut",
        "cut+vectors",
        "cut+relations",
        "cut+attention",
        "cut+hidden_states",
        "cut+simcse",
        "cut+mutual_information",
    ),
    *("full-narrow", "narrow", "narrow+vectors", "narrow+components"),
    *("by-e5+vectors", "by-e5+hidden_states", "by-e5+mutual_information"),
    *("decoder", "decoder+words", "decoder+simcse", "two-way", "two-way+masked_next_token", "two-way+words"),
    "two-way+masked_next_token+simcse",
)


def texts_of(data: dict[str, Dataset], ranked: set[str], number: int) -> tuple[list[str], list[str]]:
    """Passages and train queries, ``number`` of each kind and data set."""
    squad = data["squad-sent"]
    held_out = squad.relevant_passages(["dev", "test"]) | ranked
    passages = [passage.full_text for key, passage in squad.passages.items() if key not in held_out]
    queries = [[each.queries[key].text for key in each.qrels["train"]] for each in data.values()]
    rng = random.Random(0)
    return rng.sample(passages, number), [text for each in queries for text in rng.sample(each, number)]


def row_of(name: str, samples: dict[str, Any], texts: tuple[list[str], list[str]], arguments: Any) -> dict[str, Any]:
    backbone, *objectives = name.split("+")
    config = StudentConfig(
        backbone=BackboneConfig.model_validate(BACKBONES[backbone] | {"tuning": "full"}),
        pooling=Pooling.of({"kind": "projection", "dim": 128} if "narrow" in backbone else "mean"),
        interaction=InteractionConfig(head="cosine"),
    )
    student = Student.create(config, device="cpu", dtype="float32", seed=0)
    row: dict[str, Any] = {
        "row": name,
        "kept": BACKBONES[backbone]["layers"],
        "objective": ", ".join(objectives) or None,
    }
    started = time.process_time()
    for objective in objectives:  # one stage after the other
        pretraining = Pretraining.of(
            {"kind": objective, "epochs": arguments.epochs, "learning_rate": arguments.rate}
            | STAGES.get(objective, {})
            | ({"teacher": "e5"} if backbone == "by-e5" else {})
        )
        with TemporaryDirectory() as folder:
            passages, queries = texts
            report = pretrain_backbone(student, passages, Path(folder), pretraining, queries=queries)
        row |= {"steps": row.get("steps", 0) + report.steps, "texts": report.texts, "rate": arguments.rate}
        row |= {"loss": [round(report.first_loss, 4), round(report.last_loss, 4)]}
        row["processor_seconds"] = round(time.process_time() - started)
    student.fit_pooling([*texts[0], *texts[1]])  # unless the stage has trained its projection
    for set_name, (queries, passages, qrels) in samples.items():
        passage_vectors = student.encode_passages([*passages.values()]).vectors
        query_vectors = student.encode_queries([*queries.values()]).vectors
        row[set_name] = round(ndcg([*passages], passage_vectors, [*queries], query_vectors, qrels), 4)
    return row


def main() -> None:
    parser = sample_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--texts", type=int, default=1_000, help="passages of squad-sent, and queries of each set")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    data = {name: read_beir(DATA / name) for name in SETS}
    samples = {name: sample(each, arguments.queries, arguments.passages) for name, each in data.items()}
    texts = texts_of(data, {*samples["squad-sent"][1]}, arguments.texts)
    settings = {name: getattr(arguments, name) for name in ("texts", "epochs", "queries", "passages")}
    for name in arguments.rows:
        row = row_of(name, samples, texts, arguments)
        print(json.dumps(row), flush=True)
        if arguments.json is not None:
            rows: list[dict[str, Any]] = []
            if arguments.json.is_file():
                rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
            kept = {(ROWS.index(each["row"]), each.get("rate", 0.0)): each for each in (*rows, row)}
            ordered = [kept[index] for index in sorted(kept)]
            text = json.dumps({"settings": settings, "rows": ordered}, indent=1) + "\n"
            arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
