"""Words that a passage lacks, added by what a student knows of it: do they help BM25, alone and beside vectors?

    python benchmarks/passage_expansion.py                        qnli alone
    python benchmarks/passage_expansion.py --sets covidqa squad-sent qnli
        --json benchmarks/results/passage-expansion.json          everything in docs/log

SPLADE (Formal et al. 2021, arXiv 2107.05720) and doc2query (Nogueira et al. 2019, arXiv 1904.08375) add to a passage
words that queries may have for it. Here two ways that need no training of the backbone say how often a passage would
have a word that it lacks:

    queries      y, how likely it is that a query to which the passage is relevant has the word: a linear function of
                 the passage's vector, fitted by ridge regression to the fraction of its relevant train queries that
                 have it; as a count, y divided by its mean over the words that the passage has. Words of at least two
                 train queries; passages that dev queries judge are not in the fit.
    neighbours   the mean count of the word in the ten passages with the nearest vectors (Tao et al. 2006)

Each passage gets the k words with the highest count times idf, with a times this count; BM25 stays as it is otherwise
(the idf counts passages that have the word, lengths include what is added). nDCG@10 on dev queries, systems, halves of
dev queries, "chosen" (among all k and a, and BM25 as it is) and "error" are those of passage_term_weights.py. Without
saturation, and for words that the passage has too, the first way is an inner product of the passage's vector with a
vector of the query's words, which needs no index of its own: "as an inner product" adds to the sum the sum over the
query's words of idf times y, and one in which each word counts alike.

Licences: covidqa Apache 2.0, squad-sent and qnli CC BY-SA 4.0; they are only measured on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from passage_term_weights import (
    STUDENT,
    SYSTEMS,
    Floats,
    Measured,
    Result,
    beside,
    bm25,
    chosen,
    compared,
    fractions,
    idf_of,
    keep_row,
    prepare,
    sizes_of,
    with_windows,
)
from scaling.data_sets import DATA, require
from scipy.sparse import csr_array

from d2llm import Student
from d2llm.data.beir import read_beir
from d2llm.ops.ridge import NUM_FOLDS, PENALTIES, RidgeSet, ridge_weights

NUM_NEIGHBOURS = 10
MIN_QUERIES = 2
BLOCK = 512
NUM_WORDS = (5, 20, 100)
AMOUNTS = (0.1, 0.25, 0.5, 1.0)

Added = tuple[NDArray[np.int64], NDArray[np.int64], Floats]
"""Rows, terms and counts [a] of the words that are added, best first in each passage."""


def counts_of(measured: Measured) -> csr_array:
    """[passages, terms], how often each passage has each term."""
    words = measured.words
    return csr_array((words.counts, (words.rows, words.terms)), shape=(len(words.vectors), len(words.columns)))


def best_lacking(measured: Measured, block_of: Callable[[int, int], Floats], terms: NDArray[np.int64]) -> Added:
    """The words with the highest count times idf that each passage lacks, by blocks of counts [rows, terms]."""
    present, idf = counts_of(measured)[:, terms], idf_of(measured.words)[terms]
    most = min(max(NUM_WORDS), len(terms))
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    counts: list[Floats] = []
    for start in range(0, len(measured.ids), BLOCK):
        end = min(start + BLOCK, len(measured.ids))
        values = np.where(present[start:end].toarray() > 0, 0, block_of(start, end))
        order = np.argsort(-values * idf, axis=1, kind="stable")[:, :most]
        rows.append(np.repeat(np.arange(start, end), most))
        columns.append(terms[order].ravel())
        counts.append(np.take_along_axis(values, order, axis=1).ravel())
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(counts)


class Likely(NamedTuple):
    """How likely a relevant query has each of some ``terms`` [t]: y = ``usual`` + (vector - ``middle``) ``weights``."""

    terms: NDArray[np.int64]
    usual: Floats
    middle: Floats
    weights: NDArray[np.float32]
    figures: dict[str, float]

    def of(self, vectors: NDArray[np.float32]) -> Floats:
        """y [passages, t], at least 0."""
        return np.maximum(self.usual + (vectors - self.middle) @ self.weights, 0)


def fit_likely(measured: Measured) -> Likely:
    """Fit y to the train queries, with the penalty that predicts passages best which were left out."""
    names = [*measured.words.columns]
    fitted = sorted(measured.train_terms)
    fraction: dict[tuple[int, str], float] = {}
    num_queries: dict[str, int] = {}
    for index, row in enumerate(fitted):
        queries = measured.train_terms[row]
        for own in queries:
            for term in own:
                fraction[index, term] = fraction.get((index, term), 0) + 1 / len(queries)
                num_queries[term] = num_queries.get(term, 0) + 1
    columns = measured.words.columns
    terms = np.array(
        sorted(columns[term] for term, number in num_queries.items() if number >= MIN_QUERIES and term in columns)
    )
    column_of = {names[term]: column for column, term in enumerate(terms.tolist())}
    targets = np.zeros((len(fitted), len(terms)))
    for (index, term), value in fraction.items():
        if term in column_of:
            targets[index, column_of[term]] = value
    features = measured.words.vectors[fitted].astype(np.float64)
    usual, middle = targets.mean(axis=0), features.mean(axis=0)
    whole = RidgeSet(features, targets, np.random.default_rng(0).permutation(len(fitted)) % NUM_FOLDS)
    explained: dict[float, float] = {}
    for penalty in PENALTIES:
        error = 0.0
        for fold in range(NUM_FOLDS):
            known, rest = whole.only(whole.folds != fold), whole.only(whole.folds == fold)
            own_usual, own_middle = known.targets.mean(axis=0), known.features.mean(axis=0)
            weights = ridge_weights([known], penalty)
            error += float(((own_usual + (rest.features - own_middle) @ weights - rest.targets) ** 2).sum())
        explained[penalty] = 1 - error / float(((targets - usual) ** 2).sum())
    penalty = max(PENALTIES, key=lambda each: explained[each])
    weights = ridge_weights([whole], penalty).astype(np.float32)
    figures = {"terms": float(len(terms)), "penalty": penalty, "explained": round(explained[penalty], 4)}
    return Likely(terms, usual, middle, weights, figures)


def by_queries(measured: Measured, likely: Likely) -> Added:
    """Words that queries have for passages with such vectors."""
    present = counts_of(measured)[:, likely.terms]

    def block_of(start: int, end: int) -> Floats:
        y = likely.of(measured.words.vectors[start:end])
        has = present[start:end].toarray() > 0
        means = (y * has).sum(axis=1) / np.maximum(has.sum(axis=1), 1)
        return y / np.maximum(means, 0.01)[:, None]

    return best_lacking(measured, block_of, likely.terms)


def by_neighbours(measured: Measured) -> Added:
    """Words of the passages with the nearest vectors."""
    vectors = measured.words.vectors / np.linalg.norm(measured.words.vectors, axis=1, keepdims=True)
    counts = counts_of(measured)

    def block_of(start: int, end: int) -> Floats:
        similar = vectors[start:end] @ vectors.T
        similar[np.arange(end - start), np.arange(start, end)] = -np.inf
        nearest = np.argpartition(-similar, NUM_NEIGHBOURS, axis=1)[:, :NUM_NEIGHBOURS]
        rows = np.repeat(np.arange(end - start), NUM_NEIGHBOURS)
        fraction = np.full(nearest.size, 1 / NUM_NEIGHBOURS)
        mean = csr_array((fraction, (rows, nearest.ravel())), shape=(end - start, len(vectors)))
        found: Any = mean @ counts
        return np.asarray(found.toarray())

    return best_lacking(measured, block_of, np.arange(len(measured.words.columns)))


def with_added(measured: Measured, added: Added, number: int, amount: float) -> Floats:
    """BM25 [queries, passages] with the first ``number`` words of each passage and ``amount`` times their counts."""
    words = measured.words
    most = len(added[0]) // len(measured.ids)  # of each passage
    known = (np.arange(len(added[0])) % most < number) & (added[2] > 0)
    rows, terms, counts = (each[known] for each in added)
    longer = replace(
        words,
        rows=np.concatenate([words.rows, rows]),
        terms=np.concatenate([words.terms, terms]),
        counts=np.concatenate([words.counts, amount * counts]),
    )
    return bm25(longer, measured.times, fractions(longer, longer.counts), idf_of(words))


def measure(measured: Measured, added: Added) -> dict[str, Any]:
    """nDCG@10 of every number of words and amount, in each system."""
    words = measured.words
    plain = bm25(words, measured.times, fractions(words, words.counts))
    settings = [(number, amount) for number in NUM_WORDS for amount in AMOUNTS]
    scores = {setting: with_added(measured, added, *setting) for setting in settings}
    content: dict[str, Any] = {}
    for name, system in SYSTEMS.items():
        base = system(measured, plain)
        results: list[Result] = [system(measured, scores[setting]) for setting in settings]
        content[name] = {"as it is": round(float(base.values.mean()), 4)}
        content[name] |= {
            f"{number} words, {amount:g}": compared(result.values, base.values)
            for (number, amount), result in zip(settings, results, strict=True)
        }
        content[name]["chosen"] = compared(chosen([base, *results]), base.values)
    return content


def measure_linear(measured: Measured, likely: Likely) -> dict[str, Any]:
    """nDCG@10 of sums with the two inner products of passages with the words of queries."""
    words = measured.words
    times, idf = measured.times[:, likely.terms], idf_of(words)[likely.terms]
    plain = bm25(words, measured.times, fractions(words, words.counts))
    columns = likely.weights @ (times * idf[None]).T.toarray(), likely.weights @ times.T.toarray()
    more = [(words.vectors @ each).T.astype(np.float64) for each in columns]
    content: dict[str, Any] = {}
    for name, windows in (("inner product + BM25", False), ("inner product + BM25 + best window", True)):
        base = beside(measured, plain, windows=windows)
        result = beside(measured, plain, windows=windows, more=more)
        content[name] = {
            "as it is": round(float(base.values.mean()), 4),
            "as an inner product": compared(result.values, base.values),
        }
    return content


def show(content: dict[str, Any]) -> None:
    for system in SYSTEMS:
        if cells := content.get(system):
            print(f"  {system}: as it is {cells['as it is']:.4f}")
            for setting, cell in cells.items():
                if setting != "as it is":
                    print(f"    {setting:<20} {cell['gain']:+.4f} ({cell['error']:.4f})", flush=True)


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["qnli"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, help="a folder for what is read of passages, as passage_term_weights.py")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    require(*(args.data / name for name in args.sets))
    student = Student.load(STUDENT, device="cpu")
    for name in args.sets:
        data = read_beir(args.data / name, splits=["train", "dev"])
        measured = with_windows(data, prepare(student, data, args.cache))
        likely = fit_likely(measured)
        row: dict[str, Any] = sizes_of(measured) | {
            "fit": likely.figures,
            "linear": measure_linear(measured, likely),
            "queries": measure(measured, by_queries(measured, likely)),
            "neighbours": measure(measured, by_neighbours(measured)),
        }
        for way in ("linear", "queries", "neighbours"):
            print(name, way, likely.figures, flush=True)
            show(row[way])
        if args.json:
            keep_row(args.json, name, row)


if __name__ == "__main__":
    main()
