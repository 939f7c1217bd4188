"""Labelled pairs as training data: each distinct text gets an id, each judged pair a probability of a yes."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.names import counted
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.data.plan import PlanEntry

NLI_SYNONYMS = {
    "entailment": "entailment",
    "entails": "entailment",
    "supports": "entailment",
    "neutral": "neutral",
    "not_enough_info": "neutral",
    "contradiction": "contradiction",
    "contradicts": "contradiction",
    "refutes": "contradiction",
}
"""Class names of natural language inference and of claim checking -> their canonical class."""

_NLI_TARGETS = {"entailment": 1.0, "neutral": 0.5, "contradiction": 0.0}
_YES = 0.5  # a pair whose target is above this counts as a positive


@dataclass(frozen=True)
class PairTrainingSet:
    """A pair set in the form that training reads.

    ``dataset`` has the distinct texts of each split as queries and passages, and the pairs as judgements (1 above a
    target of 0.5, else 0). ``targets`` maps split -> query_id -> passage_id -> probability of a yes: 1 or 0 for binary
    sets; 1 for entailment, 0.5 for neutral and 0 for contradiction in natural language inference; for scores, the
    position between the lowest and the highest score of the training split. If a pair occurs more than once, the mean
    target is used; ``num_repeated`` counts the repetitions.
    """

    dataset: Dataset
    targets: Mapping[str, Mapping[str, Mapping[str, float]]]
    num_repeated: int


def read_pair_training_set(pairs: PairDataset) -> PairTrainingSet:
    """A pair set in the form that training reads.

    There is a ``DataFormatError`` if the classes are neither yes/no nor those of inference, or all scores are equal.
    """
    queries: dict[str, Query] = {}
    passages: dict[str, Passage] = {}
    targets: dict[str, dict[str, dict[str, float]]] = {}
    num_repeated = 0
    lowest, highest = _range(pairs)
    for split in pairs.splits:
        query_of: dict[str, str] = {}
        passage_of: dict[str, str] = {}
        values: dict[tuple[str, str], list[float]] = {}
        for pair in pairs.pairs(split):
            query_id = query_of.setdefault(pair.query, f"{split}/{pair.id}")
            passage_id = passage_of.setdefault(pair.passage, f"{split}/{pair.id}")
            values.setdefault((query_id, passage_id), []).append(_target(pairs, pair, lowest, highest))
        queries |= {query_id: Query(query_id, text) for text, query_id in query_of.items()}
        passages |= {passage_id: Passage(passage_id, text) for text, passage_id in passage_of.items()}
        num_repeated += sum(len(repeats) - 1 for repeats in values.values())
        split_targets = targets.setdefault(split, {})
        for (query_id, passage_id), repeats in values.items():
            split_targets.setdefault(query_id, {})[passage_id] = sum(repeats) / len(repeats)
    qrels = {
        split: {
            query_id: {passage_id: int(target > _YES) for passage_id, target in judged.items()}
            for query_id, judged in split_targets.items()
        }
        for split, split_targets in targets.items()
    }
    issues = (*pairs.issues, *([f"{counted(num_repeated, 'pair')} repeated"] if num_repeated else []))
    dataset = Dataset(pairs.name, pairs.path, passages, queries, qrels, issues)
    return PairTrainingSet(dataset, targets, num_repeated)


def shared_pairs(pairs: PairTrainingSet, split: str) -> set[tuple[str, str]]:
    """The pairs of a split, as (query_id, passage_id), whose texts are a pair of another split too, in any order."""
    texts = {
        (query_id, passage_id): frozenset(
            (pairs.dataset.queries[query_id].text, pairs.dataset.passages[passage_id].text)
        )
        for by_query in pairs.targets.values()
        for query_id, judged in by_query.items()
        for passage_id in judged
    }
    keys = {
        (query_id, passage_id) for query_id, judged in pairs.targets.get(split, {}).items() for passage_id in judged
    }
    others = {text for key, text in texts.items() if key not in keys}
    return {key for key in keys if texts[key] in others}


def plan_of_pairs(
    pairs: PairTrainingSet,
    split: str,
    *,
    leave_out: Collection[tuple[str, str]] = (),
    seed: int,
    max_queries: int | None = None,
) -> list[PlanEntry]:
    """The plan of a pair set: the judged pairs of a split, without mining and without easy negatives.

    Pairs in ``leave_out`` (query_id, passage_id) are left out. With ``max_queries``, a random sample of this many
    queries is used.

    Raises:
        InputError: no pairs are left.
    """
    judged = {
        query_id: {name: target for name, target in by_passage.items() if (query_id, name) not in leave_out}
        for query_id, by_passage in pairs.targets.get(split, {}).items()
    }
    chosen = sorted(query_id for query_id, by_passage in judged.items() if by_passage)
    if not chosen:
        shared = " that no other split has" if leave_out else ""
        raise InputError(f"{pairs.dataset.path}: split '{split}' has no pairs to train on{shared}")
    if max_queries is not None and len(chosen) > max_queries:
        chosen = sorted(random.Random(f"{seed}:{pairs.dataset.name}").sample(chosen, max_queries))
    return [_entry(query_id, judged[query_id]) for query_id in chosen]


def _entry(query_id: str, judged: Mapping[str, float]) -> PlanEntry:
    positives = tuple(passage_id for passage_id, target in judged.items() if target > _YES)
    negatives = tuple(passage_id for passage_id, target in judged.items() if target <= _YES)
    targets = tuple(judged[passage_id] for passage_id in positives + negatives)
    return PlanEntry(query_id, positives, negatives, (), targets)


def _range(pairs: PairDataset) -> tuple[float, float]:
    if pairs.kind != "scores":
        return 0.0, 1.0
    split = "train" if "train" in pairs.splits else next(iter(pairs.splits))
    scores = [pair.score for pair in pairs.pairs(split) if pair.score is not None]
    if not scores or min(scores) == max(scores):
        raise DataFormatError(pairs.path, f"the scores of split '{split}' are all equal, so nothing can be learnt")
    return min(scores), max(scores)


def _target(pairs: PairDataset, pair: LabelledPair, lowest: float, highest: float) -> float:
    if pair.score is not None:
        return min(1.0, max(0.0, (pair.score - lowest) / (highest - lowest)))
    if pairs.kind == "binary":
        return float(pairs.is_yes(pair))
    return _NLI_TARGETS[nli_class(pairs, pair)]


def nli_class(pairs: PairDataset, pair: LabelledPair) -> str:
    """Entailment, neutral or contradiction; ``DataFormatError`` for any other class."""
    name = (pair.label or "").lower()
    if name not in NLI_SYNONYMS:
        raise DataFormatError(
            pairs.path,
            f"pair '{pair.id}' has the class '{pair.label}'; known are yes/no labels and the classes of natural "
            f"language inference: {', '.join(NLI_SYNONYMS)}",
        )
    return NLI_SYNONYMS[name]
