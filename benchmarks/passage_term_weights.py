"""Weights of the words of passages, from a student's states: do they help BM25, alone and beside vectors?

    python benchmarks/passage_term_weights.py                     qnli alone, some five minutes
    python benchmarks/passage_term_weights.py --sets covidqa squad-sent qnli
        --json benchmarks/results/passage-term-weights.json       everything in docs/log, 20 minutes of one core

For each word of a passage, y is how likely it is that a query to which the passage is relevant contains the word: a
linear function of the mean of the last layer's states of its tokens, fitted by ridge regression to the fraction of the
passage's relevant train queries that contain it (DeepCT-Index: Dai and Callan 2019, arXiv 1910.10687, which tunes a
BERT for it). Passages that dev queries judge are not in the fit. How y changes the count tf of the word in the passage,
or its gain in BM25:

    deepct   tf' = 100 sqrt(y), lengths are sums of these, k1 as named (the paper's scaling; counts are not used)
    count    tf' = tf (1 - a + a r), where r = y divided by its mean over the words of the passage
    word     tf' = tf (1 - a + a r), where r = y divided by its mean over the passages that have the word
    gain     the gain of the word, tf / (tf + norm), times 1 - a + a r, with r as for "count"

y is fitted on this set, on all sets together, or on this set without words that more than a tenth of the passages have,
whose r is then 1; and once more with the words of queries weighted too (``d2llm fit-scores
--term-weights``), whose own gain is measured beside it.

nDCG@10 on dev queries of BM25 alone, and of sums fitted on half of the dev queries and measured on the other half: the
student's inner product with BM25 and its fraction of the query's limit, and with the same of the best window of two
sentences too, which is not weighted. (The interaction of this student has no weight for questions, so its inner product
is its score.) "chosen": a (for deepct, k1; a = 0, BM25 as it is, is always a choice) by the half on which the sum was
fitted. Differences are paired by query; "error" is their standard error.

Licences: covidqa Apache 2.0, squad-sent and qnli CC BY-SA 4.0; they are only measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from scaling.corpus import write_json
from scaling.data_sets import DATA, require
from scipy.sparse import csr_array

from d2llm import Student
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.device import inference
from d2llm.ops.bm25_words import terms, tokens_of_terms
from d2llm.ops.ridge import RidgeSet, choose_penalty, folds_of, ridge_weights
from d2llm.ops.weighted_sum import sum_weights
from d2llm.store.bm25 import K1, B, WordIndex
from d2llm.training.fit_scores import fit_term_weights
from d2llm.training.mining.choose import key_of

STUDENT = "d2llm-minilm"
NUM_TRAIN_QUERIES = 2_000
BATCH_TOKENS = 8_192
LISTED_DEPTH = 20
FLOOR = 0.01  # of y
DEEPCT_SCALE = 100.0
COMMON = 0.1
MIXED = (0.25, 0.5, 0.75, 1.0)
DEEPCT_K1 = (1.2, 5.0, 20.0, 50.0)

Family = Literal["deepct", "count", "word", "gain"]
FAMILIES: dict[Family, tuple[float, ...]] = {"deepct": DEEPCT_K1, "count": MIXED, "word": MIXED, "gain": MIXED}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PassageWords:
    """The words of some passages, and what the student makes of them.

    ``columns`` has the number of each term. One posting [p] for each term of each passage: ``rows``, ``terms`` and
    ``counts``; ``states`` [p, dim] are 0 where ``is_read`` is false, because the passage was cut before the word.
    """

    columns: dict[str, int]
    rows: NDArray[np.int64]
    terms: NDArray[np.int64]
    counts: Floats
    states: NDArray[np.float16]
    is_read: NDArray[np.bool_]
    vectors: NDArray[np.float32]


def read_passages(student: Student, texts: Sequence[str]) -> PassageWords:
    """Words, states of words and vectors of passages, each read once."""
    tokenized = student.tokenize(texts, "passage").ids
    order = sorted(range(len(texts)), key=lambda row: len(tokenized[row]))
    columns: dict[str, int] = {}
    rows: list[int] = []
    positions: list[int] = []
    counts: list[int] = []
    is_read: list[bool] = []
    states: list[NDArray[np.float16]] = []
    vectors = np.zeros((len(texts), student.vector_dim), np.float32)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(tokenized[order[end]]) <= BATCH_TOKENS:
            end += 1
        batch = order[start:end]
        with inference(student):
            found, mask = student.backbone(*student.backbone.pad([tokenized[row] for row in batch]))
            vectors[batch] = student.pool(found, mask).float().cpu().numpy()
        for row, own in zip(batch, found.float().cpu().numpy(), strict=True):
            spans = student.backbone.token_spans(texts[row], len(tokenized[row]))
            tokens_of = tokens_of_terms(texts[row], spans)
            for term, count in Counter(terms(texts[row])).items():
                tokens = tokens_of.get(term)
                rows.append(row)
                positions.append(columns.setdefault(term, len(columns)))
                counts.append(count)
                is_read.append(bool(tokens))
                states.append((own[tokens].mean(axis=0) if tokens else np.zeros(own.shape[1])).astype(np.float16))
        start = end
    return PassageWords(
        columns,
        np.array(rows, np.int64),
        np.array(positions, np.int64),
        np.array(counts, np.float64),
        np.stack(states),
        np.array(is_read),
        vectors,
    )


class Measured(NamedTuple):
    """A data set, as far as it is used: passages, dev queries with their judgements, train queries by passage."""

    name: str
    ids: list[str]
    words: PassageWords
    qrels: dict[str, dict[str, int]]
    times: csr_array  # [queries, terms], how often a query has each term
    inner: NDArray[np.float32]  # [queries, passages]
    windows: NDArray[np.float32] | None  # [queries, passages], BM25 of the best window
    train_terms: dict[int, list[frozenset[str]]]  # row of a passage -> terms of each of its train queries
    num_train: int  # train queries


def train_queries(data: Dataset, ids: Sequence[str]) -> tuple[dict[int, list[frozenset[str]]], int]:
    """The terms of the relevant train queries of each passage that no dev query judges, and the number of queries."""
    judged = {each for grades in data.qrels["dev"].values() for each in grades}
    row_of = {passage_id: row for row, passage_id in enumerate(ids) if passage_id not in judged}
    positives = {
        query_id: [row_of[each] for each in own if each in row_of] for query_id, own in data.positives("train").items()
    }
    usable = sorted(
        (each for each, own in positives.items() if own), key=lambda each: key_of(0, "passages' words", each)
    )
    by_passage: dict[int, list[frozenset[str]]] = {}
    kept = usable[:NUM_TRAIN_QUERIES]
    for query_id in kept:
        query_terms = frozenset(terms(data.queries[query_id].text))
        for row in positives[query_id]:
            by_passage.setdefault(row, []).append(query_terms)
    return by_passage, len(kept)


def prepare(student: Student, data: Dataset, cache: Path | None) -> Measured:
    """Read passages and dev queries, once if there is a ``cache``."""
    ids = [*data.passages]
    path = None if cache is None else cache / f"{data.name}.npz"
    begin = time.process_time()
    if path is not None and path.exists():
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        names = arrays.pop("names").tolist()
        words = PassageWords({term: column for column, term in enumerate(names)}, **arrays)
    else:
        words = read_passages(student, [data.passages[each].full_text for each in ids])
        if path is not None:
            arrays = {name: getattr(words, name) for name in PassageWords.__dataclass_fields__ if name != "columns"}
            np.savez(path, names=np.array([*words.columns]), **arrays)
    qrels = {
        query_id: {each: grade for each, grade in data.qrels["dev"][query_id].items() if grade > 0}
        for query_id, own in data.positives("dev").items()
        if own
    }
    texts = [data.queries[query_id].text for query_id in qrels]
    found = [
        (row, words.columns[term], count)
        for row, text in enumerate(texts)
        for term, count in Counter(terms(text)).items()
        if term in words.columns
    ]
    query_rows, columns, counts = (np.array(each) for each in zip(*found, strict=True))
    times = csr_array((counts.astype(np.float64), (query_rows, columns)), shape=(len(texts), len(words.columns)))
    inner = student.query_vectors(student.encode_queries(texts).vectors, "asymmetric") @ words.vectors.T
    print(f"{data.name}: read in {time.process_time() - begin:.0f} s of processor time", flush=True)
    return Measured(data.name, ids, words, qrels, times, inner, None, *train_queries(data, ids))


def with_windows(data: Dataset, measured: Measured) -> Measured:
    """The same with BM25 of the best windows; BM25 of passages is compared with that of this script."""
    ids, words = measured.ids, measured.words
    texts = [data.queries[each].text for each in measured.qrels]
    index = WordIndex.from_texts(data.passages[each].full_text for each in ids)
    rows = np.arange(len(ids))
    scores = [index.score(index.query(text), rows) for text in texts]
    own = bm25(words, measured.times, fractions(words, words.counts))
    assert np.allclose(own, [by_passage for by_passage, _ in scores], atol=1e-3), "BM25 is not that of d2llm"
    return measured._replace(windows=np.array([by_window for _, by_window in scores]))


def with_query_weights(student: Student, data: Dataset, measured: Measured) -> Measured:
    """The same with the words of queries weighted too, by a fit on the train queries of this set."""
    student.term_weights = fit_term_weights(student, [data], max_queries=NUM_TRAIN_QUERIES)
    factors = student.term_factors([data.queries[each].text for each in measured.qrels])
    assert factors is not None
    student.term_weights = None
    times = measured.times.tocoo()
    names = [*measured.words.columns]
    rows, columns = times.coords
    values = [
        count * factors[row][names[column]]
        for row, column, count in zip(rows.tolist(), columns.tolist(), times.data.tolist(), strict=True)
    ]
    return measured._replace(times=csr_array((np.array(values), (rows, columns)), shape=times.shape))


# BM25 ----------------------------------------------------------------------------------------------------------------


def idf_of(words: PassageWords) -> Floats:
    rows_with = np.bincount(words.terms, minlength=len(words.columns))
    return np.log1p((len(words.vectors) - rows_with + 0.5) / (rows_with + 0.5))


def fractions(words: PassageWords, counts: Floats, k1: float = K1) -> Floats:
    """The fraction of its weight that each posting gets [p], by counts [p]; lengths are the sums of counts."""
    lengths = np.bincount(words.rows, counts, minlength=len(words.vectors))
    norms = k1 * (1 - B + B * lengths / lengths.mean())
    return counts / (counts + norms[words.rows])


def bm25(words: PassageWords, times: csr_array, gains: Floats, idf: Floats | None = None) -> Floats:
    """[queries, passages]; ``idf`` [terms] is by default that of these words."""
    shape = (len(words.columns), len(words.vectors))
    weights = (idf_of(words) if idf is None else idf)[words.terms]
    matrix = csr_array((gains * weights, (words.terms, words.rows)), shape=shape)
    scores: Any = times @ matrix
    return np.asarray(scores.toarray())


def gains_of(words: PassageWords, y: Floats, family: Family, number: float) -> Floats:
    """The gain [p] of each posting, less its idf; ``number`` is k1 or a."""
    if family == "deepct":
        return fractions(words, DEEPCT_SCALE * np.sqrt(y), number)
    if family == "word":
        means = np.bincount(words.terms, y) / np.bincount(words.terms)
        return fractions(words, words.counts * (1 - number + number * y / means[words.terms]))
    sums, lengths = np.bincount(words.rows, words.counts * y), np.bincount(words.rows, words.counts)
    means = sums / np.maximum(lengths, 1)
    factors = 1 - number + number * y / means[words.rows]
    if family == "count":
        return fractions(words, words.counts * factors)
    return fractions(words, words.counts) * factors


# The fit of y --------------------------------------------------------------------------------------------------------


def is_common(words: PassageWords) -> NDArray[np.bool_]:
    """[p], true for words that more than a tenth of the passages have."""
    return (np.bincount(words.terms) > COMMON * len(words.vectors))[words.terms]


def ridge_set(measured: Measured, *, common: bool = True) -> RidgeSet:
    """The states of the words of passages with train queries, and the fraction of these that have each word."""
    words = measured.words
    names = [*words.columns]
    usable = words.is_read & np.isin(words.rows, [*measured.train_terms])
    fitted = np.flatnonzero(usable if common else usable & ~is_common(words))
    fractions_of = [
        float(np.mean([names[words.terms[at]] in own for own in measured.train_terms[int(words.rows[at])]]))
        for at in fitted
    ]
    _, numbers = np.unique(words.rows[fitted], return_inverse=True)
    random_order = np.random.default_rng(0).permutation(numbers.max() + 1)
    folds = folds_of(len(random_order))[random_order][numbers]
    return RidgeSet(words.states[fitted].astype(np.float64), np.array(fractions_of), folds)


def explained(predictions: Floats, targets: Floats) -> float:
    """The fraction of the targets' variance that predictions of their differences from the mean explain."""
    differences = targets - targets.mean()
    return 1 - float(((predictions - differences) ** 2).mean() / differences.var())


class Fit(NamedTuple):
    """y = max(floor, offset + w . x), and how much of the variance it explains in folds that were left out."""

    weights: Floats
    offset: float
    usual: float
    explained: dict[str, float]

    def of(self, words: PassageWords) -> Floats:
        y = self.offset + words.states.astype(np.float32) @ self.weights.astype(np.float32)
        return np.maximum(np.where(words.is_read, y, self.usual), FLOOR).astype(np.float64)


def with_ones(words: PassageWords, y: Floats) -> Floats:
    """The same y with those of common words replaced by the mean over the other words of the passage."""
    common, num = is_common(words), len(words.vectors)
    weights = np.where(common, 0, words.counts)
    means = np.bincount(words.rows, weights * y, num) / np.maximum(np.bincount(words.rows, weights, num), 1e-9)
    return np.where(common, np.maximum(means, FLOOR)[words.rows], y)


def fit(sets: Mapping[str, RidgeSet]) -> Fit:
    each = [*sets.values()]
    penalty, values = choose_penalty(each, explained)
    weights = ridge_weights(each, penalty)
    usual = float(np.mean([one.targets.mean() for one in each]))
    middle = np.mean([one.features.mean(axis=0) for one in each], axis=0)
    return Fit(weights, usual - float(middle @ weights), usual, dict(zip(sets, values, strict=True)))


# Measures ------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """nDCG@10 of each dev query [n], and its mean over the half on which this query's sum was fitted [n]."""

    values: Floats
    when_fitted: Floats


def best(scores: Floats, num: int) -> NDArray[np.int64]:
    """The rows with the highest scores, best first."""
    rows = np.sort(np.argpartition(-scores, num)[:num])
    return rows[np.argsort(-scores[rows], kind="stable")]


def ndcg(measured: Measured, scores: NDArray[Any]) -> Floats:
    """nDCG@10 of each query, by scores [queries, passages]."""
    discounts = 1 / np.log2(np.arange(2, 12))
    values: list[float] = []
    for grades, own in zip(measured.qrels.values(), scores, strict=True):
        gained = np.array([grades.get(measured.ids[row], 0) for row in best(own, 10).tolist()])
        ideal = np.array(sorted(grades.values(), reverse=True)[:10])
        values.append(float(gained @ discounts) / float(ideal @ discounts[: len(ideal)]))
    return np.array(values)


def halves(num: int) -> list[NDArray[np.bool_]]:
    return [np.arange(num) % 2 == half for half in range(2)]


def alone(measured: Measured, words: Floats) -> Result:
    """BM25 without anything fitted."""
    values = ndcg(measured, words)
    when_fitted = np.zeros(len(values))
    for half in halves(len(values)):
        when_fitted[half] = values[~half].mean()
    return Result(values, when_fitted)


def beside(measured: Measured, words: Floats, *, windows: bool, more: Sequence[Floats] = ()) -> Result:
    """The sum of the inner product, BM25 and its fraction of the query's limit, those of windows, and ``more``."""
    limits = np.maximum(np.asarray(measured.times @ idf_of(measured.words)), 1e-9)[:, None]
    parts = [measured.inner, words, words / limits]
    if windows:
        assert measured.windows is not None
        parts += [measured.windows, measured.windows / limits]
    parts += more
    columns = np.stack(parts, axis=2, dtype=np.float64)
    row_of = {passage_id: row for row, passage_id in enumerate(measured.ids)}
    lists: list[tuple[Floats, Floats]] = []
    for number, grades in enumerate(measured.qrels.values()):
        rows = np.union1d(*(best(scores[number], LISTED_DEPTH) for scores in parts[:2]))
        graded = {row_of[each]: grade for each, grade in grades.items() if each in row_of}
        judged = np.array([graded.get(row, 0) for row in rows.tolist()], np.float64)
        lists.append((columns[number, rows], judged))
    values, when_fitted = np.zeros(len(lists)), np.zeros(len(lists))
    for half in halves(len(lists)):
        weights = sum_weights([each for each, is_in in zip(lists, half, strict=True) if not is_in])
        everywhere = ndcg(measured, columns @ weights)
        values[half], when_fitted[half] = everywhere[half], everywhere[~half].mean()
    return Result(values, when_fitted)


SYSTEMS: dict[str, Callable[[Measured, Floats], Result]] = {
    "BM25": alone,
    "inner product + BM25": partial(beside, windows=False),
    "inner product + BM25 + best window": partial(beside, windows=True),
}


def compared(result: Floats, base: Floats) -> dict[str, float]:
    difference = result - base
    error = float(difference.std(ddof=1)) / np.sqrt(len(difference))
    return {
        "nDCG@10": round(float(result.mean()), 4),
        "gain": round(float(difference.mean()), 4),
        "error": round(float(error), 4),
    }


def chosen(results: Sequence[Result]) -> Floats:
    """For each query, the value of the result with the best mean where its sum was fitted."""
    positions = np.argmax([each.when_fitted for each in results], axis=0)
    return np.array([results[at].values[number] for number, at in enumerate(positions.tolist())])


def measure(
    measured: Measured, y: Floats, families: Sequence[Family], systems: Sequence[str] = tuple(SYSTEMS)[:2]
) -> dict[str, Any]:
    """Some families with these y, in some systems."""
    words = measured.words
    bases = {
        name: SYSTEMS[name](measured, bm25(words, measured.times, fractions(words, words.counts))) for name in systems
    }
    content: dict[str, Any] = {name: {"as it is": round(float(base.values.mean()), 4)} for name, base in bases.items()}
    everything: dict[str, list[Result]] = {name: [base] for name, base in bases.items()}
    for family in families:
        numbers = FAMILIES[family]
        scores = [bm25(words, measured.times, gains_of(words, y, family, number)) for number in numbers]
        for name in systems:
            results = [SYSTEMS[name](measured, each) for each in scores]
            base = bases[name]
            content[name][family] = {
                f"{number:g}": compared(result.values, base.values)
                for number, result in zip(numbers, results, strict=True)
            }
            content[name][family]["chosen"] = compared(chosen([base, *results]), base.values)
            everything[name] += results
    for name, results in everything.items():
        content[name]["chosen of all"] = compared(chosen(results), bases[name].values)
    return content


def measure_queries(measured: Measured, weighted: Measured) -> dict[str, Any]:
    """What the weights of the words of queries gain, with passages as they are."""
    content: dict[str, Any] = {}
    for name in [*SYSTEMS][:2]:
        base, result = (
            SYSTEMS[name](each, bm25(each.words, each.times, fractions(each.words, each.words.counts))).values
            for each in (measured, weighted)
        )
        content[name] = {"as it is": round(float(base.mean()), 4), "weighted": compared(result, base)}
    return content


def show(name: str, fit_name: str, content: Mapping[str, Any]) -> None:
    for system, cells in content.items():
        print(f"{name}, {fit_name}, {system}: as it is {cells['as it is']:.4f}")
        for family, results in cells.items():
            if family in FAMILIES:
                parts = [f"{number} {cell['gain']:+.4f} ({cell['error']:.4f})" for number, cell in results.items()]
                print(f"    {family:<8}", "  ".join(parts), flush=True)
        for last in ("chosen of all", "weighted"):
            if cell := cells.get(last):
                print(f"    {last}  {cell['gain']:+.4f} ({cell['error']:.4f})", flush=True)


def sizes_of(measured: Measured) -> dict[str, int]:
    """How much of a set is used."""
    return {
        "passages": len(measured.ids),
        "dev queries": len(measured.qrels),
        "train queries": measured.num_train,
        "passages with train queries": len(measured.train_terms),
    }


def measure_set(
    student: Student, data: Dataset, measured: Measured, own: Fit, together: Fit | None, kept: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of a set; ``kept`` are those that were measured before."""
    name, words = measured.name, measured.words
    rarer = fit({name: ridge_set(measured, common=False)})
    row: dict[str, Any] = sizes_of(measured) | {
        "explained by the fit on this set": round(own.explained[name], 4),
        "explained without common words": round(rarer.explained[name], 4),
        "inner product alone": round(float(ndcg(measured, measured.inner).mean()), 4),
    }
    if together is not None:
        row["explained by the fit on all sets"] = round(together.explained[name], 4)
    print(name, *(f"{key}: {value}" for key, value in row.items()), sep=" | ", flush=True)
    weighted = cache(lambda: with_query_weights(student, data, measured))
    two: list[Family] = ["count", "gain"]
    conditions: dict[str, Callable[[], dict[str, Any]]] = {
        "fitted on this set": lambda: measure(measured, own.of(words), [*FAMILIES], [*SYSTEMS]),
        "without common words": lambda: measure(measured, with_ones(words, rarer.of(words)), two),
        "words of queries weighted too": lambda: measure(weighted(), own.of(words), two),
        "words of queries weighted alone": lambda: measure_queries(measured, weighted()),
    }
    if together is not None:
        conditions["fitted on all sets"] = lambda: measure(measured, together.of(words), [*FAMILIES])
    for condition, results in conditions.items():
        row[condition] = kept[condition] if condition in kept else results()
        show(name, condition, row[condition])
    return row


def read_report(path: Path | None) -> dict[str, Any]:
    """The report at ``path``, or an empty one."""
    return {"student": STUDENT, "sets": {}} if path is None or not path.exists() else json.loads(path.read_text())


def keep_row(path: Path, name: str, row: Mapping[str, Any]) -> None:
    """Put the figures of a set into the report at ``path``."""
    report = read_report(path)
    report["sets"][name] = row
    write_json(path, report)


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["qnli"])
    parser.add_argument("--measure", nargs="+", help="only these of them; the others are for the fit on all sets")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, help="a folder for the states of words, which are then read only once")
    parser.add_argument("--json", type=Path, help="write the figures there; what it has of a set is kept")
    args = parser.parse_args()
    require(*(args.data / name for name in args.sets))
    student = Student.load(STUDENT, device="cpu")
    data = {name: read_beir(args.data / name, splits=["train", "dev"]) for name in args.sets}
    sets = {name: prepare(student, each, args.cache) for name, each in data.items()}
    ridge_sets = {name: ridge_set(each) for name, each in sets.items()}
    fits = {name: fit({name: each}) for name, each in ridge_sets.items()}
    together = fit(ridge_sets) if len(fits) > 1 else None
    for name in args.measure or args.sets:
        kept = read_report(args.json)["sets"].get(name, {})
        measured = with_windows(data[name], sets[name])
        row = measure_set(student, data[name], measured, fits[name], together, kept)
        if args.json:
            keep_row(args.json, name, row)


if __name__ == "__main__":
    main()
