"""Are the sentences that answer a question found, and none where none does (`answering` of a context, after RECOMP)?

    python benchmarks/answering.py --json benchmarks/results/answering.json

`d2llm-minilm` gives each sentence of wikiqa-pairs and qnli-pairs (of the article, or paragraph, that a question is
about) the probability that it answers the question. The least probability that counts is chosen on 300 train
questions of each set, as the one with the best F1 of pairs there, and for both sets together. On all dev questions:
how many of those with an answer get a right sentence, how many of those without get none, and which part of the
sentences is kept. `without words` is what `answering` does; `with words` counts words too (`Student.predict`).

Licences: wikiqa-pairs Microsoft Research Data License (research only), qnli-pairs CC BY-SA 4.0.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.data_sets import DATA, require

from d2llm import Student
from d2llm.data.pairs import PairDataset, read_pairs

SETS = ("wikiqa-pairs", "qnli-pairs")
NUM_TRAIN = 300
GRID = np.arange(0.02, 0.99, 0.01)

Lists = dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]
"""For each question, the probabilities of its sentences, and which of them answer it."""


def lists_of(student: Student, dataset: PairDataset, split: str, number: int | None, *, words: bool) -> Lists:
    sentences: defaultdict[str, list[tuple[str, bool]]] = defaultdict(list)
    for pair in dataset.pairs(split):
        sentences[pair.query].append((pair.passage, PairDataset.is_yes(pair)))
    chosen = [*sentences] if number is None else random.Random(0).sample([*sentences], number)
    pairs = [(query, sentence) for query in chosen for sentence, _ in sentences[query]]
    scores = student.predict(pairs, task="asymmetric", with_features=words)
    queries = [query for query, _ in pairs] if words else None
    values = student.calibration.probabilities(scores, "asymmetric", queries=queries)
    ends = np.cumsum([len(sentences[query]) for query in chosen])[:-1]
    return {
        query: (part, np.array([is_answer for _, is_answer in sentences[query]]))
        for query, part in zip(chosen, np.split(values, ends), strict=True)
    }


def f1(lists: Lists, least: float) -> float:
    values, answers = (np.concatenate(column) for column in zip(*lists.values(), strict=True))
    right = (answers & (values >= least)).sum()
    return float(2 * right / max(1, answers.sum() + (values >= least).sum()))


def row_of(lists: Lists, least: float) -> dict[str, Any]:
    answered = [(values >= least, answers) for values, answers in lists.values() if answers.any()]
    others = [values >= least for values, answers in lists.values() if not answers.any()]
    kept = [keeps for keeps, _ in answered] + others
    return {
        "least": round(least, 2),
        "f1": round(f1(lists, least), 4),
        "answered": len(answered),
        "with_right_sentence": round(float(np.mean([(keeps & answers).any() for keeps, answers in answered])), 4),
        "unanswered": len(others),
        "empty": round(float(np.mean([not keeps.any() for keeps in others])), 4),
        "sentences_kept": round(float(np.concatenate(kept).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    require(*(DATA / name for name in SETS))
    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    rows: list[dict[str, Any]] = []
    for words in (False, True):
        data = {name: read_pairs(DATA / name) for name in SETS}
        train = {name: lists_of(student, each, "train", NUM_TRAIN, words=words) for name, each in data.items()}
        dev = {name: lists_of(student, each, "dev", None, words=words) for name, each in data.items()}
        both = max(GRID, key=lambda least: sum(f1(lists, least) for lists in train.values()))
        for name, lists in dev.items():
            for chosen_on, least in ((name, max(GRID, key=lambda one: f1(train[name], one))), ("both", both)):
                row = {"set": name, "words": words, "chosen_on": chosen_on} | row_of(lists, float(least))
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
