"""BERTScore's precision, recall and F1 of labelled pairs, beside the cosine of their vectors.

    python benchmarks/bertscore.py --json benchmarks/results/bertscore.json

Recall is the mean, over the tokens of the first text, of the highest cosine with a token of the second, as MaxSim has
it; precision is that of the second text's tokens; F1 is their harmonic mean (Zhang et al., "BERTScore", ICLR 2020,
arXiv 1904.09675, without weights of words). By the token embeddings of `d2llm-minilm`, which leave out punctuation, and
by the states of its last layer. Average precision on mrpc, Spearman's correlation on stsb, dev splits.

Licences: mrpc Microsoft Research, stsb CC BY-SA 4.0 and others; they are only measured on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.data_sets import DATA, require
from torch import Tensor

from d2llm.data.pairs import LabelledPair, PairDataset, read_pairs
from d2llm.models.pooling import to_sphere
from d2llm.models.student import Student
from d2llm.ops.pair_measures import binary_measurer, graded_measurer
from d2llm.ops.scoring import mean_best_cosines

SETS = ("mrpc", "stsb")


def states_of(student: Student, texts: list[str]) -> list[Tensor]:
    """The states of each text's tokens, but for the special ones, of norm sqrt(dim)."""
    rows: list[Tensor] = []
    for ids in student.backbone.tokenize(texts, "passage").ids:
        with torch.inference_mode():
            states, _ = student.backbone(*student.backbone.pad([ids]))
        rows.append(to_sphere(states[0, 1:-1].float()))
    return rows


def embeddings_of(student: Student, texts: list[str]) -> list[Tensor]:
    tokens = student.encode_with_tokens(texts, "passage").tokens
    assert tokens is not None
    return [torch.from_numpy(rows) for rows in tokens.split()]


def scores_of(first: list[Tensor], second: list[Tensor]) -> dict[str, NDArray[np.float64]]:
    recall, precision = (
        np.array([float(mean_best_cosines([one], [other])) for one, other in zip(*texts, strict=True)])
        for texts in ((first, second), (second, first))
    )
    return {"recall": recall, "precision": precision, "F1": 2 * precision * recall / (precision + recall)}


def measure_of(pairs: Sequence[LabelledPair]) -> Callable[[NDArray[Any]], float]:
    """Average precision of pairs of yes and no, Spearman's correlation of graded ones."""
    everything = np.arange(len(pairs))
    if pairs[0].score is None:
        labels = [PairDataset.is_yes(pair) for pair in pairs]
        return lambda scores: binary_measurer(scores, labels, thresholds=None)(everything)["AP"]
    grades = np.array([pair.score for pair in pairs], np.float64)
    return lambda scores: graded_measurer(scores, grades)(everything)["Spearman"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400, help="dev pairs of each set")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    rows: list[dict[str, Any]] = []
    for name in SETS:
        pairs = read_pairs(DATA / name, splits=["dev"]).pairs("dev")[: arguments.pairs]
        texts = [[pair.query for pair in pairs], [pair.passage for pair in pairs]]
        measure = measure_of(pairs)
        vectors = [student.encode_passages(side).vectors for side in texts]
        row: dict[str, Any] = {
            "set": name,
            "pairs": len(pairs),
            "cosine": measure(np.sum(vectors[0] * vectors[1], axis=1)),
        }
        for kind, read in (("embeddings", embeddings_of), ("states", states_of)):
            scores = scores_of(*(read(student, side) for side in texts))
            row |= {f"{which} of {kind}": measure(values) for which, values in scores.items()}
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
