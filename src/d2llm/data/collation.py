"""Batches for distillation: which passages are read together, and which role each plays for each query."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingSource
from d2llm.data.same_text import SameText
from d2llm.ops.batching import even_batches

_CERTAIN_LOG_ODDS = 20.0  # log-odds of a data set's own judgement

ScorePassages = Callable[[str, Sequence[str]], NDArray[np.float32]]
"""Scores of passages of a data set, or what words add to them (query text, passage ids -> [n])."""


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """A data set whose plan the teacher has labelled."""

    source: TrainingSource
    labels: LabelStore
    same_text: SameText
    judged_relevant: Mapping[str, tuple[str, ...]]
    """query id -> the passages that the data set's train split judges relevant; empty for labelled pairs."""
    entries: tuple[PlanEntry, ...]
    """The queries to train on, sorted by id."""
    num_unlabelled: int
    """Number of queries of the plan with missing labels."""
    unlabelled: frozenset[str]
    """Those of them that are trained on nevertheless."""
    score_words: ScorePassages | None = None
    """Adds the words' part of the score to every pair of a batch; None if only the vectors count in training."""
    token_weight: float = 0.0
    """The weight of the token embeddings in the scores of a batch; 0 if they do not count in training."""
    pair_inputs: Mapping[str, ScorePassages] = field(default_factory=dict[str, ScorePassages])
    """name -> a number for each query and passage of a batch, for losses that need one."""
    query_inputs: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(
        default_factory=dict[str, Mapping[str, NDArray[np.float32]]]
    )
    """name -> query id -> a vector [dim], of the queries that have one, for losses that need them."""
    clusters: Mapping[str, int] = field(default_factory=dict[str, int])
    """query id -> its cluster, if batches are to have queries of few clusters; else empty."""

    @property
    def passage_ids(self) -> list[str]:
        """The passages of all entries, each once."""
        return list(dict.fromkeys(passage_id for entry in self.entries for passage_id in entry.passage_ids))

    def never_negative(self, entry: PlanEntry) -> set[str]:
        """Passages that are no negatives of a query: its positives, those with the same text, and the query itself.

        Its positives are those of the plan and of the data set's train split; a plan may have only some of them.
        """
        positives = {*entry.positives, *self.judged_relevant.get(entry.query_id, ())}
        own_passages = (
            self.source.dataset.own_passages.of(entry.query_id) if self.source.pairs is None else frozenset[str]()
        )
        return positives | self.same_text.duplicates_of(positives) | own_passages

    @classmethod
    def join(cls, source: TrainingSource, labels: LabelStore, *, keep_unlabelled: bool = False) -> LabelledSource:
        """Join a source and its labels.

        ``keep_unlabelled``: train queries with missing labels on the data set's own judgements; otherwise they are left
        out.
        """
        plan = sorted(source.plan.entries, key=lambda entry: entry.query_id)
        labelled = [entry for entry in plan if not labels.missing(entry.query_id, entry.passage_ids)]
        entries = plan if keep_unlabelled else labelled
        without = {entry.query_id for entry in plan} - {entry.query_id for entry in labelled}
        trained = frozenset(without & {entry.query_id for entry in entries})
        is_judged = source.pairs is None and "train" in source.dataset.qrels
        relevant = source.dataset.positives("train") if is_judged else {}
        return cls(source, labels, SameText(source.dataset.passages), relevant, tuple(entries), len(without), trained)

    def with_source(self, source: TrainingSource) -> LabelledSource:
        """The same queries with the plan of ``source``."""
        query_ids = {entry.query_id for entry in self.entries}
        entries = sorted((e for e in source.plan.entries if e.query_id in query_ids), key=lambda entry: entry.query_id)
        return replace(self, source=source, entries=tuple(entries))

    def without_unjudged_negatives(self) -> LabelledSource:
        """A copy without unlabelled hard negatives, for the queries that learn from the teacher."""
        entries: list[PlanEntry] = []
        for entry in self.entries:
            unjudged = {*self.labels.missing(entry.query_id, entry.hard_negatives)}
            if unjudged and not entry.targets and entry.query_id not in self.unlabelled:
                left = tuple(passage_id for passage_id in entry.hard_negatives if passage_id not in unjudged)
                entry = replace(entry, hard_negatives=left)
            entries.append(entry)
        return replace(self, entries=tuple(entries))


@dataclass(frozen=True, slots=True)
class DistillationBatch:
    """Q queries of one data set against the N passages of all of them together.

    All arrays but ``gram_columns`` and ``gram`` are [Q, N]. ``teacher_log_odds`` is -inf where there is no label
    (P(yes) = 0).
    ``targets``, for labelled pairs only, is the data set's own probability of a yes, NaN for pairs that were not
    judged. ``gram_columns`` [Q, n] holds for each query the columns of its positive and hard negatives, -1 for padding
    and where the store has no cosines; ``gram`` [Q, n, n] holds the cosines of the teacher's features over these
    passages.
    ``labelled`` says which pairs have a label of the teacher. ``word_scores`` is what words add to the scores; None if
    they add nothing. ``token_weight`` is the weight of the token embeddings. ``pair_inputs`` [Q, N] and
    ``query_inputs`` [Q, dim], NaN for queries without one, have what single losses need.
    """

    source: TrainingSource
    query_ids: tuple[str, ...]
    passage_ids: tuple[str, ...]
    positive: NDArray[np.bool_]
    hard: NDArray[np.bool_]
    easy: NDArray[np.bool_]
    teacher_log_odds: NDArray[np.float32]
    labelled: NDArray[np.bool_]
    gram_columns: NDArray[np.int64]
    gram: NDArray[np.float32]
    targets: NDArray[np.float32] | None = None
    word_scores: NDArray[np.float32] | None = None
    token_weight: float = 0.0
    pair_inputs: Mapping[str, NDArray[np.float32]] = field(default_factory=dict[str, NDArray[np.float32]])
    query_inputs: Mapping[str, NDArray[np.float32]] = field(default_factory=dict[str, NDArray[np.float32]])


@dataclass(frozen=True, slots=True)
class Draw:
    """The passages of one query in one batch: some positives and negatives, or all judged ones for labelled pairs."""

    entry: PlanEntry
    positives: list[str]
    hard: list[str]
    easy: list[str]

    @property
    def passage_ids(self) -> list[str]:
        """All passages of the draw."""
        return self.positives + self.hard + self.easy


def batches_per_epoch(sources: Sequence[LabelledSource], batch_queries: int) -> int:
    """The number of batches that ``epoch_batches`` returns, without drawing them."""
    return sum(_batches_per_pass(sources, batch_queries))


def epoch_batches(
    sources: Sequence[LabelledSource],
    *,
    epoch: int,
    batch_queries: int,
    num_hard: int,
    num_easy: int,
    seed: int,
    num_positives: int = 1,
    temperature: float = 1.0,
) -> list[tuple[LabelledSource, list[Draw]]]:
    """All batches of an epoch, each from one data set, in an order fixed by seed and epoch.

    Each query contributes some of its positives and of its negatives, drawn again each time the query is used; the
    draw depends only on the seed, the query, and how often the query has been used. Each data set is passed through
    repeatedly, in a new order each time; an epoch continues where the previous one stopped.

    A batch has at most ``batch_queries``; the batches of one data set have equal sizes. A data set of m batches gets a
    number in proportion to m^(1/T) of the batches of an epoch, whose total the temperature T does not change. With T =
    1 every query is used once per epoch.
    """
    per_pass = _batches_per_pass(sources, batch_queries)
    batches: list[tuple[LabelledSource, list[Draw]]] = []
    for source, num_per_pass, num_per_epoch in zip(
        sources, per_pass, _batches_per_epoch(per_pass, temperature), strict=True
    ):
        numbers = range(epoch * num_per_epoch, (epoch + 1) * num_per_epoch)
        for round_number in sorted({n // num_per_pass for n in numbers}):
            round_batches = _round(source, round_number, batch_queries, (num_positives, num_hard, num_easy), seed)
            batches += [(source, round_batches[n % num_per_pass]) for n in numbers if n // num_per_pass == round_number]
    random.Random(f"{seed}:{epoch}").shuffle(batches)
    return batches


def queries_by_set(batches: Sequence[tuple[LabelledSource, list[Draw]]]) -> dict[str, int]:
    """How many queries of each data set the batches hold, counting repeated queries each time."""
    counts: Counter[str] = Counter()
    for source, draws in batches:
        counts[source.source.dataset.name] += len(draws)
    return dict(counts)


def _batches_per_pass(sources: Sequence[LabelledSource], batch_queries: int) -> list[int]:
    return [even_batches(len(source.entries), batch_queries)[0] for source in sources]


def _batches_per_epoch(per_pass: Sequence[int], temperature: float) -> list[int]:
    """Batches of each data set per epoch, with unchanged total: rounded down, the rest to the largest remainders."""
    weights = [float(count) ** (1 / temperature) if count else 0.0 for count in per_pass]
    exact = [sum(per_pass) * weight / (sum(weights) or 1.0) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: sum(per_pass) - sum(counts)]:
        counts[index] += 1
    return counts


def _round(
    source: LabelledSource, round_number: int, batch_queries: int, sizes: tuple[int, int, int], seed: int
) -> list[list[Draw]]:
    """The batches of one pass over all queries, the ``round_number``-th; ``sizes`` are those of ``_draw``."""
    entries = list(source.entries)
    rng = random.Random(f"{seed}:{round_number}:{source.source.dataset.name}")
    rng.shuffle(entries)
    if source.clusters:
        numbers = sorted({*source.clusters.values()})
        rank = dict(zip(rng.sample(numbers, len(numbers)), numbers, strict=True))
        entries.sort(key=lambda entry: rank[source.clusters[entry.query_id]])
    draws = [_draw(entry, round_number, sizes, seed) for entry in entries]
    _, size = even_batches(len(draws), batch_queries)
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def _draw(entry: PlanEntry, epoch: int, sizes: tuple[int, int, int], seed: int) -> Draw:
    """Draw the passages of a query; ``sizes`` are the numbers of positives, hard and easy negatives."""
    if entry.targets:
        return Draw(entry, list(entry.positives), list(entry.hard_negatives), [])
    num_positives, num_hard, num_easy = sizes
    rng = random.Random(f"{seed}:{epoch}:{entry.query_id}")
    hard = rng.sample(entry.hard_negatives, min(num_hard, len(entry.hard_negatives)))
    easy = rng.sample(entry.easy_negatives, min(num_easy, len(entry.easy_negatives)))
    positives = entry.drawn_positives
    return Draw(entry, rng.sample(positives, min(num_positives, len(positives))), hard, easy)


def collate(labelled: LabelledSource, draws: Sequence[Draw]) -> DistillationBatch:
    """Collate draws into a batch.

    A passage of another query is an easy negative, with its label if there is one, unless it is a known positive of
    this query or repeats the text of one: such a passage is ignored. For a query that the teacher has not labelled, and
    for a negative that was mined after labelling, the data set's own judgement replaces the teacher's, and there are no
    features to imitate.
    """
    passage_ids = tuple(dict.fromkeys(p for draw in draws for p in draw.passage_ids))
    column = {passage_id: index for index, passage_id in enumerate(passage_ids)}
    return _collate(labelled, draws, [column] * len(draws), passage_ids)


def in_batch_pairs(
    batches: Iterable[tuple[LabelledSource, Sequence[Draw]]],
) -> dict[str, dict[str, list[str]]]:
    """The passages that the teacher scores for all pairs of the batches to have a label: data set -> query id -> ids.

    Left out are queries that learn from the data set's own judgements, and of the other queries' passages those that
    are no negatives, which are ignored in the batch.
    """
    pairs: dict[str, dict[str, dict[str, None]]] = {}
    for labelled, draws in batches:
        of_batch = dict.fromkeys(passage_id for draw in draws for passage_id in draw.passage_ids)
        for draw in draws:
            entry = draw.entry
            if entry.targets or entry.query_id in labelled.unlabelled:
                continue
            ignored = labelled.never_negative(entry).difference(draw.positives)
            ids = pairs.setdefault(labelled.source.dataset.name, {}).setdefault(entry.query_id, {})
            ids.update(dict.fromkeys(passage_id for passage_id in of_batch if passage_id not in ignored))
    return {name: {query_id: [*ids] for query_id, ids in queries.items()} for name, queries in pairs.items()}


def collate_lists(labelled: LabelledSource, draws: Sequence[Draw]) -> DistillationBatch:
    """Like ``collate``, but each query has only its own passages: column j of its row is the j-th of its draw.

    The queries share no passages, so ``passage_ids`` is empty; rows are padded with columns that are ignored.
    """
    columns = [{passage_id: index for index, passage_id in enumerate(draw.passage_ids)} for draw in draws]
    return _collate(labelled, draws, columns, ())


def _collate(
    labelled: LabelledSource,
    draws: Sequence[Draw],
    columns: Sequence[Mapping[str, int]],
    passage_ids: tuple[str, ...],
) -> DistillationBatch:
    shape = (len(draws), max(map(len, columns)))
    positive, hard, easy, scored_by_teacher = (np.zeros(shape, bool) for _ in range(4))
    log_odds = np.full(shape, -np.inf, np.float32)
    width = max(len(draw.positives) + len(draw.hard) for draw in draws)
    targets = np.full(shape, np.nan, np.float32)
    gram_columns = np.full((len(draws), width), -1, np.int64)
    gram = np.zeros((len(draws), width, width), np.float32)
    word_scores = np.zeros(shape, np.float32)
    pair_inputs = {name: np.zeros(shape, np.float32) for name in labelled.pair_inputs}
    scorers = [] if labelled.score_words is None else [(labelled.score_words, word_scores)]
    scorers += [(values, pair_inputs[name]) for name, values in labelled.pair_inputs.items()]
    for row, (draw, column) in enumerate(zip(draws, columns, strict=True)):
        easy[row, : len(column)] = True
        positive[row, [column[passage_id] for passage_id in draw.positives]] = True
        hard[row, [column[passage_id] for passage_id in draw.hard]] = True
        judged = [column[passage_id] for passage_id in draw.positives + draw.hard]
        if draw.entry.targets:
            targets[row, judged] = draw.entry.targets
        for score, added in scorers:
            query = labelled.source.query_text(draw.entry.query_id)
            added[row, list(column.values())] = score(query, list(column))
        for passage_id in labelled.never_negative(draw.entry) & column.keys():
            easy[row, column[passage_id]] = False
        easy[row] &= ~hard[row]
        log_odds[row, positive[row]], log_odds[row, hard[row]] = _CERTAIN_LOG_ODDS, -_CERTAIN_LOG_ODDS
        if draw.entry.targets:
            log_odds[row, judged] = _log_odds(np.array(draw.entry.targets))
        if draw.entry.query_id in labelled.unlabelled:
            continue
        for passage_id, value in labelled.labels.log_odds(draw.entry.query_id).items():
            if passage_id in column:
                log_odds[row, column[passage_id]] = value
                scored_by_teacher[row, column[passage_id]] = True
        gram_columns[row], gram[row] = _features(labelled.labels, draw, column, width)
    return DistillationBatch(
        source=labelled.source,
        query_ids=tuple(draw.entry.query_id for draw in draws),
        passage_ids=passage_ids,
        positive=positive,
        hard=hard,
        easy=easy,
        teacher_log_odds=log_odds,
        labelled=scored_by_teacher,
        gram_columns=gram_columns,
        gram=gram,
        targets=targets if any(draw.entry.targets for draw in draws) else None,
        word_scores=None if labelled.score_words is None else word_scores,
        token_weight=labelled.token_weight,
        pair_inputs=pair_inputs,
        query_inputs={name: _of_queries(vectors, draws) for name, vectors in labelled.query_inputs.items() if vectors},
    )


def _of_queries(vectors: Mapping[str, NDArray[np.float32]], draws: Sequence[Draw]) -> NDArray[np.float32]:
    missing = np.full_like(next(iter(vectors.values())), np.nan)
    return np.stack([vectors.get(draw.entry.query_id, missing) for draw in draws])


def _log_odds(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probabilities) - np.log1p(-probabilities), -_CERTAIN_LOG_ODDS, _CERTAIN_LOG_ODDS)


def _features(
    labels: LabelStore, draw: Draw, column: Mapping[str, int], width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Columns [width] and teacher cosines [width, width] of a draw's positives and hard negatives, in this order."""
    gram_columns, gram = np.full(width, -1, np.int64), np.zeros((width, width), np.float32)
    passage_ids, cosines = labels.gram(draw.entry.query_id) or ((), np.zeros((0, 0), np.float32))
    index_of = {passage_id: index for index, passage_id in enumerate(passage_ids)}
    listed = [passage_id for passage_id in draw.positives + draw.hard if passage_id in index_of]
    chosen = [index_of[passage_id] for passage_id in listed]
    gram_columns[: len(listed)] = [column[passage_id] for passage_id in listed]
    gram[: len(listed), : len(listed)] = cosines[np.ix_(chosen, chosen)]
    return gram_columns, gram
