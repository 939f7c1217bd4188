"""Intents from few examples: `d2llm classify` beside logistic regression on the same student's vectors.

    python benchmarks/classify.py ../shared/data/banking77 --split test

Accuracy is over all classes, without "none of these". ECE is the expected calibration error of the most probable class
in ten bins. For "none of these", every fourth class has no examples, and AUROC tells how well its probability tells
their messages from the others; logistic regression is given one minus its largest probability.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from d2llm import Index, Passage, Student
from d2llm.data.beir import read_beir
from d2llm.retrieval.classify import Classifier

_STRENGTHS = (1.0, 10.0, 100.0)  # C of logistic regression; 10 is best on dev with 5 and with 10 examples
_BEST = 10.0


def calibration_error(confidence: Any, is_right: Any) -> float:
    """The expected calibration error in ten bins of equal width."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    used = [bins == number for number in np.unique(bins)]
    return float(sum(abs(confidence[one].mean() - is_right[one].mean()) * one.mean() for one in used))


def measure(student: Student, examples: list[Any], asked: list[Any], folder: Path) -> dict[str, float]:
    """Measures of both for (query, class) examples and messages; classes without examples are "none"."""
    index = Index.create(folder, student, task="symmetric")
    index.upsert([Passage(query.id, query.text, metadata={"label": label}) for query, label in examples])
    results = Classifier(index).classify([query for query, _ in asked])
    known = {label for _, label in examples}
    truth = np.array([label for _, label in asked])
    is_known = np.isin(truth, sorted(known))
    best = np.array([max(one.probabilities, key=one.probabilities.__getitem__) for one in results])
    chance = np.array([max(one.probabilities.values()) / (1 - one.none_probability) for one in results])
    none = np.array([one.none_probability for one in results])
    encode = student.encode_queries
    read, messages = encode([query.text for query, _ in examples]), encode([query.text for query, _ in asked])
    normed = [one.vectors / np.linalg.norm(one.vectors, axis=1, keepdims=True) for one in (read, messages)]
    regression = LogisticRegression(C=_BEST, max_iter=500).fit(normed[0], [label for _, label in examples])
    predicted = regression.predict_proba(normed[1])
    other = regression.classes_[predicted.argmax(1)]
    if is_known.all():
        return {
            "accuracy": float((best == truth).mean()),
            "ece": calibration_error(chance, best == truth),
            "said none": float(np.mean([one.label is None for one in results])),
            "regression accuracy": float((other == truth).mean()),
            "regression ece": calibration_error(predicted.max(1), other == truth),
        }
    said_none = np.array([one.label is None for one in results])
    return {
        "none auroc": float(roc_auc_score(~is_known, none)),
        "none found": float(said_none[~is_known].mean()),
        "none said of known": float(said_none[is_known].mean()),
        "regression none auroc": float(roc_auc_score(~is_known, -predicted.max(1))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--examples", type=int, nargs="+", default=[5, 10, 20, 50])
    arguments = parser.parse_args()
    dataset, student = read_beir(arguments.data), Student.load(arguments.student)
    labels = {
        split: {query: next(iter(grades)).rsplit("-", 1)[0] for query, grades in dataset.qrels[split].items()}
        for split in ("train", arguments.split)
    }
    by_label: dict[str, list[Any]] = defaultdict(list)
    for query, label in labels["train"].items():
        by_label[label].append((dataset.queries[query], label))
    chosen = list(labels[arguments.split].items())
    chosen = random.Random(0).sample(chosen, min(arguments.messages, len(chosen)))
    asked = [(dataset.queries[query], label) for query, label in chosen]
    for size in arguments.examples:
        chance = random.Random(size)
        examples = [
            one for label in sorted(by_label) for one in chance.sample(by_label[label], min(size, len(by_label[label])))
        ]
        some = set(sorted(by_label)[::4])
        with tempfile.TemporaryDirectory() as folder:
            values = measure(student, examples, asked, Path(folder) / "all")
            values |= measure(student, [one for one in examples if one[1] not in some], asked, Path(folder) / "some")
        print(json.dumps({"examples": size, **{name: round(value, 4) for name, value in values.items()}}), flush=True)


if __name__ == "__main__":
    main()
