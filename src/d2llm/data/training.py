"""Training input: a data set, its plan, and the task of its pairs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from d2llm.core.errors import InputError, MismatchError
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.pairs import PairDataset
from d2llm.data.plan import PlanEntry, TrainingPlan


@dataclass(frozen=True, slots=True)
class TrainingSource:
    """One data set of a training run.

    Raises:
        MismatchError: the plan names queries or passages that the data set does not have.
        InputError: an entry has no positive, or contains a passage twice.
    """

    dataset: Dataset
    plan: TrainingPlan
    task: Task
    max_labelled: int | None = None
    """How many queries the teacher labels; None means all of the plan."""
    label_first: tuple[str, ...] | None = None
    """Queries of the plan, the ones to label first; by default all of them in a random order."""
    pairs: PairDataset | None = None
    """The labelled pairs that ``dataset`` was built from, if it is not a retrieval set."""

    def __post_init__(self) -> None:
        for entry in self.plan.entries:
            _check_entry(entry, self.dataset)

    @property
    def entries_to_label(self) -> list[PlanEntry]:
        """The queries that the teacher labels: the first of ``label_first``, or of an order by the hash of the id.

        A larger sample contains a smaller one.
        """
        order = self.label_first or sorted(
            (entry.query_id for entry in self.plan.entries), key=lambda name: hashlib.sha256(name.encode()).digest()
        )
        chosen = set(order[: self.max_labelled])
        return [entry for entry in self.plan.entries if entry.query_id in chosen]

    def query_text(self, query_id: str) -> str:
        """A query as the data set has it, without the prefix that a model may add."""
        return self.dataset.queries[query_id].text

    def passage_text(self, passage_id: str) -> str:
        """Title and text of a passage as one string."""
        return self.dataset.passages[passage_id].full_text


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A query and a passage with the data set's own judgement of whether they match.

    ``target`` is the probability of a yes: 1 or 0, or in between if the data set has grades.
    """

    query: str
    passage: str
    task: Task
    target: float

    @property
    def is_positive(self) -> bool:
        """Whether a yes is likelier than a no."""
        return self.target > 0.5


def check_sources(sources: Sequence[TrainingSource]) -> None:
    """Raise an ``InputError`` if two sources of a run, and so their labels, have the same name."""
    names = [source.dataset.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"two data sets have the same name: {', '.join(sorted(names))}; rename the folder of one")


def labelled_pairs(
    sources: Sequence[TrainingSource], *, num_negatives: int, max_queries: int | None, seed: int
) -> list[TrainingPair]:
    """One positive and ``num_negatives`` negatives of each query, in an order fixed by ``seed``.

    A quarter of the negatives (at least one) are easy ones, so that a teacher tuned on them also learns to recognise
    clearly irrelevant passages; the rest are hard. The draw of a query depends only on the query and the seed. For a
    set of labelled pairs, exactly the judged pairs of a query are taken. With ``max_queries``, a random sample of this
    many queries of each source is used.
    """
    pairs: list[TrainingPair] = []
    for source in sources:
        entries = sorted(source.plan.entries, key=lambda entry: entry.query_id)
        random.Random(f"{seed}:{source.dataset.name}").shuffle(entries)
        for entry in entries[:max_queries]:
            pairs.extend(_pairs_of(entry, source, num_negatives, seed))
    random.Random(seed).shuffle(pairs)
    return pairs


def _check_entry(entry: PlanEntry, dataset: Dataset) -> None:
    where = f"the plan for '{dataset.name}', query '{entry.query_id}'"
    if entry.query_id not in dataset.queries:
        raise MismatchError(f"{where}: {dataset.path} has no such query; make the plan again from this data set")
    unknown = [passage_id for passage_id in entry.passage_ids if passage_id not in dataset.passages]
    if unknown:
        raise MismatchError(
            f"{where}: {dataset.path} has no passage '{unknown[0]}'; make the plan again from this data set"
        )
    if not entry.positives and not entry.targets:
        raise InputError(f"{where}: there is no positive; make the plan again, or leave the query out")
    if len(set(entry.passage_ids)) < len(entry.passage_ids):
        raise InputError(f"{where}: a passage is named twice; make the plan again")


def _pairs_of(entry: PlanEntry, source: TrainingSource, num_negatives: int, seed: int) -> list[TrainingPair]:
    query = source.query_text(entry.query_id)
    if entry.targets:
        judged = zip(entry.positives + entry.hard_negatives, entry.targets, strict=True)
        return [TrainingPair(query, source.passage_text(p), source.task, target) for p, target in judged]
    rng = random.Random(f"{seed}:{entry.query_id}")
    num_easy = min(len(entry.easy_negatives), max(1, num_negatives // 4))
    hard = rng.sample(entry.hard_negatives, min(len(entry.hard_negatives), num_negatives - num_easy))
    easy = rng.sample(entry.easy_negatives, min(len(entry.easy_negatives), num_negatives - len(hard)))
    positive = rng.choice(entry.positives)
    return [
        TrainingPair(query, source.passage_text(passage_id), source.task, float(passage_id == positive))
        for passage_id in (positive, *hard, *easy)
    ]
