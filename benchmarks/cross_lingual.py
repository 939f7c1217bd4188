"""What a multilingual backbone, and half of its layers, learn from translated sentences: LEALLA and MEXMA.

    python benchmarks/cross_lingual.py --json benchmarks/results/cross-lingual.json     some 20 minutes of a core

On the dev part of `translations/`: how often a sentence's translation is the nearest of all translations by the
cosine, both ways (as on Tatoeba); Spearman's correlation of the cosine of a Chinese sentence and other English ones
with their grades (`written_pairs`). And that correlation on dev pairs of stsb and stsb-zh, in one language. Students:
e5 (all), six of its twelve layers (six); as they are, after the pretraining `vectors` by all layers, which reads both
sides, after `score_regression` of the teacher's cosines of all pairs of a batch too (LEALLA), or after `mexma`. Rows
that are in the JSON file already are kept.

Licences: texts and translations of `written_pairs` are this project's, banking77 CC BY 4.0; stsb and stsb-zh are only
measured on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from judged_sets import WRITTEN_PAIRS, split_of, write_written_pairs
from scaling.data_sets import DATA, require

from d2llm import Recipe, Run
from d2llm.data.beir import read_beir
from d2llm.data.pairs import LabelledPair, read_pairs
from d2llm.models.student import Student
from d2llm.models.vocabulary import prune_vocabulary
from d2llm.ops.pair_measures import graded_measurer
from d2llm.recipe import BackboneConfig, InteractionConfig, Pooling, Pretraining, StudentConfig
from d2llm.training.pretrain import pretrain_backbone

TRANSLATIONS = Path(__file__).parent / "translations"
LAYERS: dict[str, tuple[int, ...] | None] = {"all": None, "six": (0, 1, 2, 9, 10, 11)}
MEASURED = ("written-natural", "written-contrasts", "stsb", "stsb-zh")
ROWS = ("all", "all+mexma", "six", "six+vectors", "six+vectors+score_regression", "six+mexma")


class Translation(NamedTuple):
    """A sentence in English and in Chinese."""

    text: str
    translation: str


def translations(split: str) -> list[Translation]:
    """The translated sentences of a split; those of banking77 are train."""
    texts: dict[str, str] = {}
    for path in WRITTEN_PAIRS.rglob("*.jsonl"):
        for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            texts[f"{path.parent.name}/{path.stem}/{line_number}"] = json.loads(line)["text"]
    texts = {key: text for key, text in texts.items() if split_of(text) == split}
    if split == "train":
        queries = read_beir(DATA / "banking77", splits=["train"]).queries
        texts |= {key: query.text for key, query in queries.items()}
    lines = [line for path in sorted(TRANSLATIONS.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    return [Translation(texts[record["id"]], record["translation"]) for record in records if record["id"] in texts]


def write_sets(folder: Path) -> None:
    """The translations as labelled pairs, and as a retrieval set, for a recipe."""
    (folder / "parallel" / "qrels").mkdir(parents=True)
    records: dict[str, list[dict[str, str]]] = {"corpus": [], "queries": []}
    for split in ("train", "dev"):
        rows = ["query-id\tcorpus-id\tscore"]
        for line_number, (text, translation) in enumerate(translations(split)):
            key = f"{split}-{line_number}"
            records["queries"].append({"_id": key, "text": text})
            records["corpus"].append({"_id": key, "text": translation})
            rows.append(f"{key}\t{key}\t1")
        (folder / "parallel" / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name, lines in records.items():
        with gzip.open(folder / "parallel" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in lines)
    pairs = [{"query": each.text, "document": each.translation, "score": 1} for each in translations("train")]
    (folder / "pairs").mkdir()
    (folder / "pairs" / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for kind in ("natural", "contrasts"):
        write_written_pairs(folder, kind)


def student_config(model: str, layers: str = "all", tuning: str = "full") -> dict[str, Any]:
    """All texts are read with the prefix that e5 has for texts of one kind."""
    read: dict[str, Any] = {"query_prefix": "query: ", "passage_prefix": "query: "}
    read |= {"max_query_tokens": 64, "max_passage_tokens": 64}
    return {
        "backbone": {"model": model, "layers": LAYERS[layers], "tuning": {"kind": tuning}, **read},
        "pooling": {"kind": "mean"},
        "interaction": {"head": "cosine"},
    }


def new_student(config: dict[str, Any]) -> Student:
    return Student.create(
        StudentConfig(
            backbone=BackboneConfig.model_validate(config["backbone"]),
            pooling=Pooling.of(config["pooling"]),
            interaction=InteractionConfig.model_validate(config["interaction"]),
        ),
        device="cpu",
        dtype="float32",
        seed=0,
    )


def write_teacher(folder: Path, num_pairs: int) -> None:
    """e5 without the tokens that no text here has: the same vectors, in a fraction of the time of 250,000 logits."""
    pairs = [pair for name in MEASURED for pair in graded_pairs(folder, name, num_pairs)]
    texts = [text for split in ("train", "dev") for each in translations(split) for text in each]
    texts += [text for pair in pairs for text in (pair.query, pair.passage)]
    prune_vocabulary(new_student(student_config("e5", tuning="frozen")), texts).save(folder / "e5")


def graded_pairs(folder: Path, name: str, num_pairs: int) -> Sequence[LabelledPair]:
    """Dev pairs of a data set; of sentences that a model wrote, those of which the first is translated."""
    if not name.startswith("written"):
        return read_pairs(DATA / name, splits=["dev"]).pairs("dev")[:num_pairs]
    translated = dict(translations("dev"))
    return [pair for pair in read_pairs(folder / name, splits=["dev"]).pairs("dev") if pair.query in translated]


def lealla(layers: str, folder: Path, run_folder: Path, epochs: int, rate: float) -> Student:
    """Vectors of the teacher, then its cosines of all pairs of a batch."""
    recipe = Recipe.model_validate(
        {
            "name": "lealla",
            "student": student_config(str(folder / "e5" / "backbone"), layers),
            "teacher": {"model": str(folder / "e5"), "kind": "cosine"},
            "data": [{"path": str(folder / "parallel")}],
            "losses": {"score_regression": 1.0},
            "training": {
                "pretraining": [{"kind": "vectors", "epochs": epochs, "learning_rate": rate}],
                "in_batch_labels": True,
                "learning_rate": rate,
                "epochs": epochs,
                "batch_queries": 32,
                "num_hard": 1,
                "unlabelled": "leave_out",
                "eval_every": 1000,
                "residual": {"epochs": 0},
            },
        }
    )
    run = Run(recipe, run_folder, device="cpu", dtype="float32", show_progress=False)
    run.mine()
    run.label()
    run.distill()
    return Student.load(run_folder / "student", device="cpu", dtype="float32")


def student_of(row: str, folder: Path, epochs: int, rate: float) -> tuple[Student, dict[str, Any]]:
    """The student of a row, and what its training was."""
    layers, *stages = row.split("+")
    if stages[-1:] == ["score_regression"]:
        return lealla(layers, folder, folder / row, epochs, rate), {}
    student = new_student(student_config(str(folder / "e5" / "backbone"), layers))
    report: dict[str, Any] = {}
    for kind in stages:
        settings = {"kind": kind, "epochs": epochs, "learning_rate": rate}
        texts: list[str] = []
        if kind == "mexma":
            settings["translations"] = str(folder / "pairs")
        else:
            texts = [text for translation in translations("train") for text in translation]
        trained = pretrain_backbone(student, texts, folder / row, Pretraining.of(settings))
        report = {"steps": trained.steps, "loss": [round(trained.first_loss, 4), round(trained.last_loss, 4)]}
    return student, report


def spearman(student: Student, pairs: Sequence[LabelledPair], translated: dict[str, str] | None = None) -> float:
    """Of the cosines with the grades; the first texts are translated if there are translations."""
    first, second = (
        student.encode_passages(texts).vectors
        for texts in (
            [pair.query if translated is None else translated[pair.query] for pair in pairs],
            [pair.passage for pair in pairs],
        )
    )
    grades = np.array([pair.score for pair in pairs], np.float64)
    return round(graded_measurer((first * second).sum(axis=1), grades)(np.arange(len(pairs)))["Spearman"], 4)


def measures_of(student: Student, folder: Path, num_pairs: int) -> dict[str, float]:
    """All measures, on dev splits."""
    parallel = translations("dev")
    english, chinese = (student.encode_passages([*side]).vectors for side in zip(*parallel, strict=True))
    cosines = english @ chinese.T
    row = {
        name: round(float((values.argmax(axis=1) == np.arange(len(values))).mean()), 4)
        for name, values in (("en-zh", cosines), ("zh-en", cosines.T))
    }
    written = [*graded_pairs(folder, MEASURED[0], num_pairs), *graded_pairs(folder, MEASURED[1], num_pairs)]
    row["similarity zh-en"] = spearman(student, written, dict(parallel))
    row["similarity en"] = spearman(student, written)
    return row | {name: spearman(student, graded_pairs(folder, name, num_pairs)) for name in MEASURED[2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--pairs", type=int, default=200, help="dev pairs of stsb and stsb-zh")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    require(*(DATA / name for name in ("banking77", "stsb", "stsb-zh")))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sets(folder)
        write_teacher(folder, arguments.pairs)
        for name in arguments.rows:
            started = time.process_time()
            student, report = student_of(name, folder, arguments.epochs, arguments.rate)
            row: dict[str, Any] = {"row": name}
            if "+" in name:
                row |= {"epochs": arguments.epochs, "rate": arguments.rate, **report}
                row["processor_seconds"] = round(time.process_time() - started)
            row |= measures_of(student, folder, arguments.pairs)
            print(json.dumps(row), flush=True)
            if arguments.json is not None:
                rows: list[dict[str, Any]] = []
                if arguments.json.is_file():
                    rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
                kept = {(ROWS.index(each["row"]), each.get("rate", 0.0)): each for each in (*rows, row)}
                text = json.dumps({"rows": [kept[index] for index in sorted(kept)]}, indent=1) + "\n"
                arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
