"""Does a language model that reads the first 20 passages as vectors rank them better than the student?

    python benchmarks/listwise_reader.py --rows text text+lora    two rows, half an hour of a core after the lists
    python benchmarks/listwise_reader.py --rows text text+lora --lists 600 800    the same after a short training
    python benchmarks/listwise_reader.py --recorded --rows text+lora aligned+lora --lists 200 200 --train 200 --dev 50

The reader is that of `d2llm tune-reader` (PE-Rank: Liu et al. 2024, arXiv 2406.14848), trained on train queries of
three sets, the network alone (text) and then with LoRA (text+lora); with all layers of the model (deep, deep+lora).
In the rows called aligned, the network first learns to let the model repeat --alignment passages from their vectors;
in those called texts, the model learns from the passages' texts too, as in the paper.
With --recorded, the order to learn is that of recorded grades (`judgements`) instead of judgements, on two sets, and a
search ranks the passages of the recorded lists alone.

Measured on dev: nDCG@10 of the student's full score (as a search ranks: interaction, words, tokens), of the first
step's scores, of the decoded order, and of the student's score plus the first step's, whose weight is chosen on one
half of the queries and measured on the other, both ways.

Lists and checkpoints are kept in the folder --work and rows in the JSON file, so that a run that was interrupted
continues. Licences: qnli and squad-sent CC BY-SA 4.0, banking77 CC BY 4.0; nothing that was trained here is shipped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from recorded_judge import read_graded_lists
from scaling.corpus import write_json
from scaling.data_sets import DATA, require

from d2llm import Student
from d2llm.core.types import Qrels, Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.models.backbone import Backbone
from d2llm.models.listwise_reader import ListwiseReader
from d2llm.ops.significance import holm, paired_randomisation
from d2llm.recipe import BackboneConfig, Lora, ReaderTuningConfig
from d2llm.training.tune_reader import (
    RankedLists,
    Repeated,
    collect_lists,
    dev_queries,
    ndcg,
    passages_to_repeat,
    train_queries,
    train_reader,
    with_texts,
)

SETS: dict[str, Task] = {"qnli": "asymmetric", "squad-sent": "asymmetric", "banking77": "symmetric"}
STUDENT = "d2llm-minilm"
GRADED = ("squad-sent", "banking77")
"""Those of which there are recorded lists."""
LAYERS = {"text": 8, "aligned": 8, "texts": 8, "deep": None}
WEIGHTS = (0.0, *(round(float(weight), 4) for weight in np.geomspace(0.01, 10, 25)))


def settings_of(row: str, number: tuple[int, int], train: int, dev: int) -> ReaderTuningConfig:
    """The settings of a row; all rows read the same lists."""
    lists = number if row.endswith("+lora") else (number[0], 0)
    layers = LAYERS[row.removesuffix("+lora")]
    texts = row.startswith("texts")
    return ReaderTuningConfig(layers=layers, lists=lists, max_queries=train, dev_queries=dev, texts=texts)


def graded(name: str, num_train: int, num_dev: int, labels: Path) -> Dataset:
    """The queries and passages of some recorded lists; the grades of train go into the folder ``labels``."""
    data = read_beir(DATA / name)
    unshared = data.unshared_positives("train", ["dev", "test"] if SETS[name] == "asymmetric" else [])
    lists = [one for one in read_graded_lists(name) if one.judging == 1]
    train = [one for one in lists if one.split == "train" and one.query_id in unshared][:num_train]
    dev = [one for one in lists if one.split == "dev"][:num_dev]
    store = LabelStore(labels, teacher="recorded", prompt=SETS[name], dataset=name)
    if not len(store):
        store.write([QueryLabels(one.query_id, one.passages, np.array(one.grades, np.float32)) for one in train])
    passages = {key: data.passages[key] for one in (*train, *dev) for key in one.passages}
    splits = {"train": train, "dev": dev}
    qrels = {
        split: {one.query_id: data.qrels[split][one.query_id] for one in splits[split]} for split in ("train", "dev")
    }
    return replace(data, passages=passages, qrels=qrels)


def collect(
    student: Student, sets: dict[str, Dataset], config: ReaderTuningConfig, work: Path
) -> tuple[dict[str, dict[str, RankedLists]], dict[str, Qrels]]:
    """The lists of all sets, from the folder or made anew, and the judgements of dev."""
    lists: dict[str, dict[str, RankedLists]] = {}
    qrels: dict[str, Qrels] = {}
    for name, data in sets.items():
        own = config.model_copy(update={"exclude_shared_passages": SETS[name] == "asymmetric"})
        chosen = {"train": train_queries(data, own)[0], "dev": dev_queries(data, config.dev_queries, 0)}
        lists[name] = collect_lists(student, data, chosen, task=SETS[name], config=config, folder=work)
        qrels[name] = data.qrels["dev"]
    return lists, qrels


def milliseconds(reader: ListwiseReader, lists: RankedLists) -> dict[str, float]:
    """Median processor time of one query alone: one step, and the whole order."""
    times: dict[str, list[float]] = {"one step": [], "decoded": []}
    steps = reader.steps
    for query, vectors in zip(lists.queries[:20], lists.vectors, strict=False):
        for name, reader.steps in (("one step", 1), ("decoded", steps)):
            started = time.process_time()
            reader.rank([query], [vectors])
            times[name].append(1e3 * (time.process_time() - started))
    reader.steps = steps
    return {name: round(float(np.median(values)), 1) for name, values in times.items()}


def by_scores(scores: Sequence[NDArray[np.floating[Any]]]) -> list[list[int]]:
    return [np.argsort(-row, kind="stable").tolist() for row in scores]


def fitted_sum(
    lists: RankedLists, added: Sequence[NDArray[np.floating[Any]]], qrels: Qrels
) -> tuple[NDArray[np.float64], list[float]]:
    """nDCG@10 of the sum of both scores, with the weight that is best on the other half, and the two weights.

    Added scores are relative to the mean of their list and to their spread within lists, in units of the spread of the
    student's scores. Of equally good weights the smallest is taken.
    """
    student = [each - each.mean() for each in lists.scores]
    other = [scores - scores.mean() for scores in added]
    ratio = float(np.std(np.concatenate(student)) / max(np.std(np.concatenate(other)), 1e-12))
    values = np.array(
        [
            ndcg(lists, by_scores([a + weight * ratio * b for a, b in zip(student, other, strict=True)]), qrels)
            for weight in WEIGHTS
        ]
    )  # [weights, queries]
    halves = (slice(0, None, 2), slice(1, None, 2))
    best = [int(values[:, half].mean(axis=1).round(9).argmax()) for half in halves]
    summed = np.empty(len(lists))
    summed[halves[0]], summed[halves[1]] = values[best[1], halves[0]], values[best[0], halves[1]]
    return summed, [WEIGHTS[index] for index in best]


def compared(values: NDArray[np.float64], student: NDArray[np.float64]) -> dict[str, Any]:
    """The mean, and the difference from the student with its standard error and p."""
    difference = values - student
    return {
        "nDCG@10": round(float(values.mean()), 4),
        "difference": round(float(difference.mean()), 4),
        "standard_error": round(float(difference.std(ddof=1) / len(values) ** 0.5), 4),
        "p": round(paired_randomisation(values, student), 4),
    }


def measure(
    reader: ListwiseReader, lists: dict[str, dict[str, RankedLists]], qrels: dict[str, Qrels]
) -> dict[str, Any]:
    """All figures of a reader on dev."""
    figures: dict[str, Any] = {}
    for name, own in lists.items():
        dev, judged = own["dev"], qrels[name]
        student = ndcg(dev, in_order(dev), judged)
        read = reader.rank(dev.queries, list(dev.vectors))
        first = [each.logits for each in read]
        summed, weights = fitted_sum(dev, first, judged)
        figures[name] = {
            "queries": len(dev),
            "student": round(float(student.mean()), 4),
            "standard_error": round(float(student.std(ddof=1) / len(student) ** 0.5), 4),
            "one step": compared(ndcg(dev, by_scores(first), judged), student),
            "decoded": compared(ndcg(dev, [each.order.tolist() for each in read], judged), student),
            "sum": compared(summed, student) | {"weights": weights},
        }
    for name, p in zip(figures, holm([each["sum"]["p"] for each in figures.values()]), strict=True):
        figures[name]["sum"]["p_holm"] = round(p, 4)
    return figures


def in_order(lists: RankedLists) -> list[list[int]]:
    return [[*range(lists.grades.shape[1])]] * len(lists)


def describe(lists: dict[str, RankedLists], qrels: Qrels) -> dict[str, Any]:
    """What the lists of a set hold; the student's nDCG@10 on train lists says how much better it knows those."""
    train, dev = lists["train"], lists["dev"]
    within = {
        query_id: dict(zip(ids, grades, strict=True))
        for query_id, ids, grades in zip(train.query_ids, train.ids, train.grades.tolist(), strict=True)
    }
    rng, depth = random.Random(0), dev.grades.shape[1]
    mixed = [ndcg(dev, [rng.sample(range(depth), depth) for _ in dev.ids], qrels).mean() for _ in range(5)]
    return {
        "train lists": len(train),
        "train lists with a relevant passage": int(train.grades.any(axis=1).sum()),
        "train nDCG@10 of the student, within lists": round(float(ndcg(train, in_order(train), within).mean()), 4),
        "dev nDCG@10 of the best order": round(float(ndcg(dev, by_scores([*dev.grades]), qrels).mean()), 4),
        "dev nDCG@10 of a random order": round(float(np.mean(mixed)), 4),
    }


def trained_reader(
    row: str,
    config: ReaderTuningConfig,
    lists: Sequence[RankedLists],
    work: Path,
    repeated: Sequence[Repeated] = (),
) -> tuple[ListwiseReader, dict[str, Any]]:
    """The reader of a row, trained from its last checkpoint on, and the figures of its training."""
    backbone_config = BackboneConfig(model=config.model, layers=config.layers, tuning=Lora(**config.lora.model_dump()))
    backbone = Backbone.load(backbone_config, device="cpu", dtype="float32")
    reader = ListwiseReader(backbone, lists[0].vectors.shape[2], STUDENT)
    folder = work / row
    folder.mkdir(exist_ok=True)
    started = time.process_time()
    settings = {"row": row, "lists": config.lists}
    stages = train_reader(reader, lists, config, folder, settings, seed=0, repeated=repeated)
    losses = [[round(mean, 3) for mean in stage.mean_losses] for stage in stages]
    seconds = round(time.process_time() - started)
    return reader.eval(), {"lists": sum(config.lists), "loss": losses, "processor_seconds": seconds}


def kept_rows(file: Path | None) -> dict[str, Any]:
    """The rows that are in the file already."""
    return {} if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name + stage for name in LAYERS for stage in ("", "+lora")]
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--train", type=int, default=1_500, help="train queries of each set")
    parser.add_argument("--dev", type=int, default=300, help="dev queries of each set")
    parser.add_argument("--lists", type=int, nargs=2, default=(2_000, 4_000), metavar="N", help="of the two stages")
    parser.add_argument("--alignment", type=int, default=400, help="passages to repeat first, in the rows aligned")
    parser.add_argument("--recorded", action="store_true", help="learn the order of recorded grades")
    parser.add_argument("--work", type=Path, default=Path("listwise-reader"), help="folder for lists and checkpoints")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    names_of_sets = GRADED if arguments.recorded else tuple(SETS)
    require(*(DATA / name for name in names_of_sets))
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    number, labels = (arguments.lists[0], arguments.lists[1]), arguments.work / "labels"
    configs = {name: settings_of(name, number, arguments.train, arguments.dev) for name in names}
    student = Student.load(STUDENT, device="cpu", dtype="float32")
    if arguments.recorded:
        configs = {name: config.model_copy(update={"labels": str(labels)}) for name, config in configs.items()}
        sets = {name: graded(name, arguments.train, arguments.dev, labels) for name in GRADED}
    else:
        sets = {name: read_beir(DATA / name) for name in SETS}
    lists, qrels = collect(student, sets, configs["text"], arguments.work)
    rates = {"network": configs["text"].network_rate, "lora": configs["text"].lora_rate}
    content: dict[str, Any] = {
        "settings": {"student": STUDENT, "model": "smollm2", "depth": 20, "steps": 10, "rates": rates},
        "lists": {name: describe(own, qrels[name]) for name, own in lists.items()},
        "rows": {},
    }
    print(json.dumps(content["lists"], indent=1), flush=True)
    train = [with_texts(own["train"], sets[name]) for name, own in lists.items()]
    without = [own["train"] for own in lists.values()]
    for name in [name for name in arguments.rows if name not in kept_rows(arguments.json)]:
        print(name, flush=True)
        count = arguments.alignment if name.startswith("aligned") else 0
        repeated = passages_to_repeat(student, [*sets.values()], count, 0)
        used = train if configs[name].texts else without
        reader, trained = trained_reader(name, configs[name], used, arguments.work, repeated)
        figures = {
            "layers": reader.backbone.num_layers,
            "training": {"repeated": len(repeated), **trained},
            "ms": milliseconds(reader, next(iter(lists.values()))["dev"]),
            "dev": measure(reader, lists, qrels),
        }
        print(json.dumps(figures, indent=1), flush=True)
        if arguments.json is not None:
            content["rows"] = kept_rows(arguments.json) | {name: figures}  # another process may have added some
            write_json(arguments.json, content)


if __name__ == "__main__":
    main()
