"""What words that a student has learnt add to the whole score of another one: vectors, words, windows and tokens.

    d2llm run benchmarks/graded_lists/splade-seen.toml --out RUN --data DATA_SETS
    python benchmarks/learned_words_score.py RUN/student... --json benchmarks/results/learned-words-score.json

nDCG@10 of `d2llm-minilm` on dev: at most 200 queries of a set among their relevant passages and random ones, 600 in
all, each with the full score. Weights are fitted as `d2llm fit-scores` fits them, on lists of the 20 best by words and
by vectors, for all seen sets of a task together: each half of the queries with weights of the other half. Unseen sets
have the weights of all queries of the seen ones. Then each set has weights of its own, by halves. Rows: the weights
that ship; fitted anew without learnt words; and with them, all or of 768 slices (the largest of each), in BM25's sum as
fit-scores has them, there but with the limits and statistics of a query's text, and as a term with its own weight.
First, what vectors, BM25, learnt words and the sum of both are alone. Students are named by the folder of their run.

p: paired randomisation against the row without learnt words, by Holm's correction over all sets.

Licences: of banking77, medquad, covidqa, qnli, squad-sent see the recipe; the unseen sets are only measured on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scaling.data_sets import DATA, require

from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import ScoreFeature, Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.document_expansion import LearnedWords
from d2llm.models.row_features import scored_list
from d2llm.models.score_features import TaskFeatureWeights
from d2llm.models.student import Student
from d2llm.ops.bm25_words import terms as words_of
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import holm, paired_randomisation
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import WordSegment, learned_term
from d2llm.training.dev_sets import dev_queries
from d2llm.training.fit_score_features import LISTED_DEPTH, FeatureLists, fit_all_terms, make_feature_lists

SEEN: dict[str, Task] = {
    "squad-sent": "asymmetric",
    "medquad": "asymmetric",
    "qnli": "asymmetric",
    "covidqa": "asymmetric",
    "banking77": "symmetric",
}
UNSEEN: dict[str, Task] = {
    "wikiqa": "asymmetric",
    "stackfaq": "asymmetric",
    "trecqa": "asymmetric",
    "checkthat2020": "asymmetric",
    "quora": "symmetric",
}
SETS = SEEN | UNSEEN
TERMS: tuple[ScoreFeature, ...] = ("bm25", "bm25_fraction", "window_bm25", "window_bm25_fraction", "maxsim")
WITH_COLUMN: tuple[ScoreFeature, ...] = (*TERMS, "window_vectors")
"""The last one is the column of learnt words here: as windows, it has a weight that no factor of the query scales."""
IN_BM25, BY_TEXTS, ITS_OWN = "in BM25", "in BM25, limits of texts", "weight of its own"
SLICES = 768


class Values(NamedTuple):
    """nDCG@10 of the queries of each set by weights of the seen sets, these weights by task, and by its own weights."""

    together: dict[str, list[float]]
    weights: dict[str, Any]
    alone: dict[str, list[float]]


def sample(dataset: Dataset, num_queries: int, num_passages: int) -> Dataset:
    """A part of a data set: dev queries until their relevant passages are enough, and random passages."""
    relevant: dict[str, None] = {}
    qrels: dict[str, dict[str, int]] = {}
    for query in dev_queries(dataset, num_queries=num_queries, seed=0):
        if len(relevant) > num_passages - 100:
            break
        qrels[query.id] = dataset.qrels["dev"][query.id]
        relevant |= dict.fromkeys(dataset.positives("dev")[query.id])
    others = [passage_id for passage_id in dataset.passages if passage_id not in relevant]
    drawn = np.random.default_rng(0).permutation(len(others))[: max(0, num_passages - len(relevant))]
    kept = relevant.keys() | {others[index] for index in drawn.tolist()}
    passages = {passage_id: passage for passage_id, passage in dataset.passages.items() if passage_id in kept}
    return replace(dataset, passages=passages, qrels={"dev": qrels})


def plain_lists(student: Student, dataset: Dataset, task: Task) -> FeatureLists:
    """All passages of a sample for each query, without learnt words."""
    count = len(dataset.passages)
    return make_feature_lists(
        student, dataset, task, terms=TERMS, num_queries=count, depth=count, num_passages=count, seed=0
    )


@dataclass(frozen=True, slots=True)
class Learned:
    """The words that a student has for the passages and the queries of a sample."""

    dataset: Dataset
    added: list[dict[str, float]]
    asked: list[dict[str, float]]

    @classmethod
    def read(cls, words: LearnedWords, dataset: Dataset) -> Learned:
        texts = [query.text for query in dev_queries(dataset, num_queries=len(dataset.passages), seed=0)]
        passages = [passage.full_text for passage in dataset.passages.values()]
        return cls(dataset, words.words(np.zeros(0, np.float32), passages), words.of_queries(texts))

    def sliced(self, vocabulary: int) -> Learned:
        """The largest weight in each of so many slices, as `methods.poolings.splade.best_of_slices` has them."""
        slice_of = {learned_term(index): index // -(-vocabulary // SLICES) for index in range(vocabulary)}
        kept = [
            [{slice_of[term]: (term, weight) for term, weight in reversed(words.items())} for words in side]
            for side in (self.added, self.asked)
        ]
        added, asked = ([dict(words.values()) for words in side] for side in kept)
        return Learned(self.dataset, added, asked)

    @property
    def counts(self) -> list[float]:
        """How many words a passage and a query have."""
        return [round(fmean(map(len, words))) for words in (self.added, self.asked)]

    def lists(self, plain: FeatureLists) -> dict[str, FeatureLists]:
        """The lists with these words, by row of the table."""
        ids = [*self.dataset.passages]
        queries = dev_queries(self.dataset, num_queries=len(ids), seed=0)
        segment = WordSegment.from_texts(passage.full_text for passage in self.dataset.passages.values())
        words, alone = WordIndex([segment.with_added(self.added)]), WordIndex([segment])
        result: dict[str, list[Any]] = {IN_BM25: [], BY_TEXTS: [], ITS_OWN: []}
        statistics: list[NDArray[np.float32]] = []
        for query, asked, (scores, grades) in zip(queries, self.asked, plain.lists, strict=True):
            own = self.dataset.own_passages.of(query.id)
            rows = np.array([row for row, name in enumerate(ids) if name not in own], np.int64)
            weighted = words.query(query.text, dict.fromkeys(words_of(query.text), 1.0) | asked)
            summed = scored_list(scores[:, 0], words, weighted, rows, {}, TERMS, None, scores[:, -1])[0]
            gained = summed[:, 1] - scores[:, 1]
            by_texts = scores.copy()
            by_texts[:, 1] = summed[:, 1]
            by_texts[:, 2] = summed[:, 1] / (alone.query(query.text).limit or 1.0)
            result[IN_BM25].append((summed, grades))
            result[BY_TEXTS].append((by_texts, grades))
            result[ITS_OWN].append((np.column_stack([scores, gained]), grades))
            statistics.append(weighted.statistics)
        found = {name: replace(plain, lists=lists) for name, lists in result.items()}
        found[IN_BM25] = replace(found[IN_BM25], statistics=np.array(statistics, np.float32))
        return found


def listed(lists: FeatureLists, plain: FeatureLists) -> FeatureLists:
    """The passages of a query that weights are fitted on, of queries that have a relevant one among them."""
    kept: list[int] = []
    chosen: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = []
    for index, ((scores, grades), (before, _)) in enumerate(zip(lists.lists, plain.lists, strict=True)):
        best = [np.argsort(-before[:, column], kind="stable")[:LISTED_DEPTH] for column in (0, 1)]
        rows = np.union1d(*best)
        if grades[rows].any():
            kept.append(index)
            chosen.append((scores[rows], grades[rows]))
    nearest = None if lists.nearest is None else lists.nearest[kept]
    return FeatureLists(lists.name, chosen, lists.statistics[kept], nearest)


def ndcg_of(sums: Sequence[NDArray[np.floating[Any]]], lists: FeatureLists) -> list[float]:
    """nDCG@10 of each query by the scores of its passages."""
    rankings: dict[str, list[str]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for index, (summed, (_, grades)) in enumerate(zip(sums, lists.lists, strict=True)):
        rankings[str(index)] = [str(row) for row in np.argsort(-summed, kind="stable")[:10].tolist()]
        qrels[str(index)] = {str(row): int(grades[row]) for row in np.flatnonzero(grades).tolist()}
    values = per_query_measures(rankings, qrels)["nDCG@10"]
    return [values[str(index)] for index in range(len(lists.lists))]


def ndcg(fitted: TaskFeatureWeights, lists: FeatureLists, terms: Sequence[ScoreFeature]) -> list[float]:
    """nDCG@10 of each query among all passages of its sample."""
    weights = np.array([fitted.weights.get(term, 0.0) for term in terms])
    is_words = np.array([term not in ("maxsim", "window_vectors") for term in terms])
    sums: list[NDArray[np.floating[Any]]] = []
    for index, (scores, _) in enumerate(lists.lists):
        nearest = None if lists.nearest is None else float(lists.nearest[index])
        scale = 1.0 if fitted.words_factor is None else fitted.words_factor(lists.statistics[index], nearest)
        sums.append(scores[:, 0] + scores[:, 1:] @ np.where(is_words, scale * weights, weights))
    return ndcg_of(sums, lists)


def on_halves(
    lists: dict[str, FeatureLists], plain: dict[str, FeatureLists], terms: Sequence[ScoreFeature]
) -> dict[str, list[float]]:
    """nDCG@10 of the queries of some sets, each half of them with weights fitted to the other halves of all these."""
    values: dict[str, list[float]] = {name: [] for name in lists}
    for first in (0, 1):
        others = [listed(each.half(1 - first), plain[name].half(1 - first)) for name, each in lists.items()]
        fitted = fit_all_terms(others, terms)
        for name, each in lists.items():
            values[name] += ndcg(fitted, each.half(first), terms)
    return values


def by_halves(fitted: TaskFeatureWeights, lists: FeatureLists, terms: Sequence[ScoreFeature]) -> list[float]:
    """`ndcg` in the order of `on_halves`."""
    return [value for first in (0, 1) for value in ndcg(fitted, lists.half(first), terms)]


def measured(lists: dict[str, FeatureLists], plain: dict[str, FeatureLists], terms: Sequence[ScoreFeature]) -> Values:
    """nDCG@10 of the queries of each set with the weights of the seen sets, those weights, and with its own weights."""
    together: dict[str, list[float]] = {}
    weights: dict[str, Any] = {}
    for task in dict.fromkeys(SETS[name] for name in lists):
        seen = {name: lists[name] for name, set_task in SEEN.items() if set_task == task and name in lists}
        fitted = fit_all_terms([listed(each, plain[name]) for name, each in seen.items()], terms)
        weights[task] = {term: round(weight, 3) for term, weight in fitted.weights.items()}
        together |= on_halves(seen, plain, terms)
        unseen = [name for name, set_task in UNSEEN.items() if set_task == task and name in lists]
        together |= {name: by_halves(fitted, lists[name], terms) for name in unseen}
    alone = {name: on_halves({name: lists[name]}, plain, terms)[name] for name in together}
    return Values(together, weights, alone)


def row_of(title: str, values: Values, before: Values) -> dict[str, Any]:
    """nDCG@10 of each set, and its gain and p against the score without learnt words."""
    row: dict[str, Any] = {"score": title, "weights": values.weights}
    cases = (
        ("weights of the seen sets", values.together, before.together),
        ("weights of the set", values.alone, before.alone),
    )
    for case, by_set, others in cases:
        row[case] = {name: round(fmean(each), 4) for name, each in by_set.items()}
        for kind, names in (("seen", SEEN), ("unseen", UNSEEN)):
            row[case][f"mean, {kind}"] = round(fmean(fmean(by_set[name]) for name in names if name in by_set), 4)
        if values is not before:
            p = holm([paired_randomisation(each, others[name]) for name, each in by_set.items()])
            row[f"{case}, gain and p"] = {
                name: [round(fmean(each) - fmean(others[name]), 4), round(value, 4)]
                for (name, each), value in zip(by_set.items(), p, strict=True)
            }
    return row


def column_alone(lists: dict[str, FeatureLists], column: int) -> dict[str, float]:
    """nDCG@10 of each set by one column."""
    return {
        name: round(fmean(ndcg_of([scores[:, column] for scores, _ in each.lists], each)), 4)
        for name, each in lists.items()
    }


def rows_of(plain: dict[str, FeatureLists], student: Student, learned: dict[str, dict[str, Learned]]) -> list[Any]:
    """The table; ``learned`` are the words by name of their kind and by data set."""
    before = measured(plain, plain, TERMS)
    tasks = student.score_features.tasks
    shipped = {name: by_halves(tasks[SETS[name]], plain[name], TERMS) for name in before.together}
    rows: list[dict[str, Any]] = [{"score": "vectors alone"} | column_alone(plain, 0)]
    rows += [{"score": "BM25 alone"} | column_alone(plain, 1)]
    rows += [row_of("weights that ship", Values(shipped, {}, shipped), before), row_of("without", before, before)]
    for words, by_set in learned.items():
        lists = {name: each.lists(plain[name]) for name, each in by_set.items()}
        own, summed = ({name: each[title] for name, each in lists.items()} for title in (ITS_OWN, IN_BM25))
        rows += [{"score": f"{words} alone"} | column_alone(own, -1)]
        rows += [{"score": f"{words}, BM25 and they alone"} | column_alone(summed, 1)]
        for title in (IN_BM25, BY_TEXTS, ITS_OWN):
            terms = WITH_COLUMN if title == ITS_OWN else TERMS
            values = measured({name: each[title] for name, each in lists.items()}, plain, terms)
            row = row_of(f"{words}, {title}", values, before)
            rows.append(row | {"words": {name: each.counts for name, each in by_set.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", type=Path, help="folders RUN/student with the pooling splade")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--passages", type=int, default=600)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    require(*(DATA / name for name in SETS))
    samples = {
        name: sample(read_beir(DATA / name, splits=["dev"]), arguments.queries, arguments.passages) for name in SETS
    }
    student = Student.load(DEFAULT_STUDENT, device="cpu", dtype="float32")
    plain = {name: plain_lists(student, each, SETS[name]) for name, each in samples.items()}
    learned: dict[str, dict[str, Learned]] = {}
    for folder in arguments.words:
        words, run = Student.load(folder, device="cpu", dtype="float32"), folder.resolve().parent.name
        learned[run] = {name: Learned.read(LearnedWords(words), each) for name, each in samples.items()}
        learned[f"{run}, {SLICES} slices"] = {
            name: each.sliced(words.pooling.dim) for name, each in learned[run].items()
        }
    rows = rows_of(plain, student, learned)
    print("\n".join(map(str, rows)))
    if arguments.json:
        sizes = {name: [len(plain[name].lists), len(each.passages)] for name, each in samples.items()}
        result = {"queries and passages": sizes, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
