"""Scores each pair once: log-odds go to a label store, from which an interrupted call continues.

``label``, ``mine``, ``gate``, ``ensemble_teachers`` and ``evaluate`` all use this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import Bar, progress_bar
from d2llm.core.stop_signals import StopSignals
from d2llm.core.types import Task
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.models.remote.endpoint import Limits
from d2llm.models.remote.kept_answers import KeptAnswers
from d2llm.models.teachers.pair_teacher import (
    PairTeacher,
    PartialScores,
    TeacherScores,
    TextPair,
    asks_endpoint,
    gives_grades,
    identify_teacher,
    ranks_lists,
    score_until_error,
)
from d2llm.recipe import LabellingConfig, TeacherConfig, TeacherIdentity
from d2llm.runners.placement import HERE, Placement
from d2llm.runners.runner import Runner, Workers

_PAIRS_AT_ONCE = 256  # minimum per chunk of whole queries: enough to form batches of similar length
_SHARD_SECONDS = 30.0  # the most work that can be lost if the process is killed


@dataclass(frozen=True, slots=True)
class QueryPairs:
    """A query and its passages to score; the Gram matrix of the teacher's features covers the first ``num_listed``."""

    query_id: str
    passage_ids: tuple[str, ...]
    num_listed: int = 0


@dataclass(slots=True)
class ScoringCounts:
    """The number of pairs scored in this call, and sums of the counts in ``TeacherScores``."""

    pairs: int = 0
    truncated: int = 0
    tokens: int = 0
    bounded: int = 0
    undecided: int = 0
    written_tokens: int = 0
    cost: float = 0.0

    @classmethod
    def count(cls, partly: PartialScores) -> ScoringCounts:
        """The counts of one call to a teacher."""
        scores = partly.scores
        return cls(
            int(partly.is_scored.sum()),
            scores.num_truncated,
            scores.num_tokens,
            scores.num_bounded,
            scores.num_undecided,
            scores.num_written_tokens,
            scores.cost,
        )

    def add(self, other: ScoringCounts) -> None:
        """Add the counts of other pairs."""
        for attribute in fields(self):
            setattr(self, attribute.name, getattr(self, attribute.name) + getattr(other, attribute.name))


class Budget:
    """What scoring may cost by ``settings``; ``ended_by`` is the limit that was reached, if one was."""

    def __init__(self, settings: LabellingConfig, started: float) -> None:
        self._limits = Limits(settings.max_minutes, settings.max_tokens, settings.max_cost)
        self._started = started
        self.ended_by: str | None = None

    def spend(self, queries: Iterable[QueryPairs], counts: ScoringCounts) -> Iterator[QueryPairs]:
        """The queries, until a limit is reached; ``counts`` are updated while they are scored."""
        for query in queries:
            self.ended_by = self.ended_by or self._reached(counts)
            if self.ended_by is not None:
                return
            yield query

    def _reached(self, counts: ScoringCounts) -> str | None:
        # Every call gets further, even if loading the teacher takes longer than it may.
        minutes = (time.monotonic() - self._started) / 60 if counts.pairs else 0.0
        limit = self._limits.reached(minutes, counts.tokens + counts.written_tokens, counts.cost)
        return None if limit is None else f"labelling.max_{limit[0]} = {limit[1]:.10g}"


@dataclass(frozen=True, slots=True)
class PairShard:
    """Some queries with all their pairs, which are scored in one call; ``texts`` are those of the pairs, in order."""

    queries: list[QueryPairs]
    texts: list[TextPair]
    task: Task

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class ScoredShard:
    """The labels of a shard's queries, in order; those that there are if an ``error`` ended the work early."""

    labels: list[QueryLabels]
    counts: ScoringCounts
    error: BaseException | None = None


def score_shard(teacher: PairTeacher, shard: PairShard, advance: Callable[[int], None]) -> ScoredShard:
    """Score the pairs of a shard; ``advance`` is called with the number of pairs finished."""
    with_features = any(query.num_listed for query in shard.queries)
    partly = score_until_error(teacher, shard.texts, shard.task, with_features=with_features, advance=advance)
    labels = _by_query(shard.queries, partly.scores, partly.is_scored)
    return ScoredShard(labels, ScoringCounts.count(partly), partly.error)


@dataclass(frozen=True)
class TeacherOnWorkers:
    """A teacher that only the workers of a cluster load; here it is known by its identity."""

    identity: TeacherIdentity

    @property
    def fingerprint(self) -> str:
        """That of the teacher's weights."""
        return self.identity.fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """That of the teacher's question."""
        return self.identity.prompts[task]

    def score_pairs(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> TeacherScores:
        """Raises an ``InputError``: it is not loaded here."""
        del pairs, task, with_features, advance
        raise InputError("this teacher scores on the workers of a cluster and is not loaded in this process")


def place_teacher(
    config: TeacherConfig, load: Callable[[], PairTeacher], runner: Runner, *, device: str | None
) -> tuple[PairTeacher, Placement]:
    """A teacher, and where it works: on the workers of a cluster, which alone load it, or in this process.

    A teacher that asks an endpoint does so from this process. ``load`` loads the teacher; it must be picklable.
    """
    if runner.is_local or asks_endpoint(config):
        return load(), HERE
    teacher = TeacherOnWorkers(identify_teacher(config))
    return teacher, Placement(runner, device, {teacher.fingerprint: load}, {teacher.fingerprint: config.num_gpus})


class LabelWriter:
    """Collects labels and writes them as a shard every half minute, so that at most half a minute's work can be lost.

    Of an endpoint, only requests on their way can be lost (``answers``).

    ``remember``: keep them in the store's memory too, not only on disk (``LabelStore.write``).
    """

    def __init__(self, labels: LabelStore, *, remember: bool = True) -> None:
        self.labels = labels
        self._remember = remember
        self._unwritten: list[QueryLabels] = []
        self._last_written = time.monotonic()
        self.answers = KeptAnswers(labels.folder / "answers", fingerprint_json(astuple(labels.key)))
        """The answers of an endpoint whose labels are not written yet."""

    def add(self, labels: Sequence[QueryLabels]) -> None:
        """Add the labels of some queries; raises the same errors as ``write``."""
        self._unwritten += labels
        if time.monotonic() - self._last_written > _SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the labels that are not in the store yet.

        Raises:
            InputError: the shard cannot be written (disk full); the earlier shards are kept.
            ModelError: some of the teacher's log-odds are not numbers.
        """
        try:
            self.labels.write(self._unwritten, remember=self._remember)
        except OSError as error:
            self.answers.is_broken_off = True
            lost = sum(len(item.passage_ids) for item in self._unwritten)
            raise InputError(
                f"{self.labels.folder}: labels cannot be written ({error.strerror or error}). The shards written "
                f"before are complete and are kept; the last {lost} pairs scored are lost. Free some space and run the "
                "same command again to continue"
            ) from error
        self._unwritten, self._last_written = [], time.monotonic()
        self.answers.clear()


def label_pairs(
    workers: Workers[PairShard, ScoredShard],
    queries: Iterable[QueryPairs],
    writer: LabelWriter,
    task: Task,
    *,
    query_text: Callable[[str], str],
    passage_text: Callable[[str], str],
    advance: Callable[[int], None],
    counts: ScoringCounts,
) -> None:
    """Score pairs that have no label yet, a few hundred at a time, write the labels, and update ``counts``.

    ``workers`` do ``score_shard``, here or elsewhere. ``queries`` are consumed lazily; ``query_text`` and
    ``passage_text`` return the text of an id; ``advance`` is called with the number of pairs finished. The
    labels of all that was scored are written, whatever ends the work early: an endpoint that fails, Ctrl-C, a time
    limit. A process that is killed leaves the answers of an endpoint in the store's folder, for the next.

    Raises:
        InputError: a shard or an answer cannot be written.
        ModelError: some of the teacher's log-odds are not numbers, or it cannot be asked any more.
    """
    shards = (
        PairShard(chunk, [(query_text(q.query_id), passage_text(p)) for q in chunk for p in q.passage_ids], task)
        for chunk in _chunks(queries)
    )
    with writer.answers.used():
        try:
            for scored in workers.map(shards, advance):
                counts.add(scored.counts)
                writer.add(scored.labels)
                if scored.error is not None:
                    raise scored.error
        finally:
            with StopSignals() as signals, signals.held():
                writer.write()


def gram_matrix(features: Float32[np.ndarray, "m dim"]) -> Float32[np.ndarray, "m m"]:
    """The cosines between feature vectors."""
    directions = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    return directions @ directions.T


def with_rate(advance: Bar, counts: ScoringCounts | None = None) -> Callable[[int], None]:
    """Wrap ``advance`` so that the progress bar also shows the pairs per second since this call, and the cost so far.

    ``counts`` are updated while the work goes on.
    """
    started = time.monotonic()
    finished = 0

    def count(pairs: int) -> None:
        nonlocal finished
        finished += pairs
        rate = f"{finished / max(1e-9, time.monotonic() - started):.1f} pairs/s"
        advance(pairs, rate if counts is None or not counts.cost else f"{rate}, cost {counts.cost:.2f}")

    return count


@dataclass(frozen=True, slots=True)
class PoolScores:
    """Scores by query_id and passage_id.

    Of the ``num_new`` pairs scored now, ``num_truncated`` were truncated and ``num_undecided`` got no answer.
    ``ungraded`` are the passages to which a teacher of grades gave none, now or before, by query_id.
    """

    scores: dict[str, dict[str, float]]
    num_new: int
    num_truncated: int
    num_undecided: int = 0
    ungraded: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes for a report on truncated and undecided pairs, if there are any."""
        counts = {"were truncated": self.num_truncated, "are undecided (log-odds 0)": self.num_undecided}
        return tuple(
            f"{count:,} of {self.num_new:,} pairs scored now {what}" for what, count in counts.items() if count
        )


Pool = Mapping[str, Sequence[str]]
"""query_id -> the passages whose scores are needed."""


def interleaved(rankings: Sequence[Sequence[str]], depth: int) -> list[str]:
    """The first ``depth`` distinct passages, taken from the rankings in turn."""
    in_turn = chain.from_iterable(zip_longest(*rankings))
    return list(dict.fromkeys(passage_id for passage_id in in_turn if passage_id is not None))[:depth]


def label_pool(
    teacher: PairTeacher,
    pool: Pool,
    labels: LabelStore,
    task: Task,
    *,
    query_text: Callable[[str], str],
    passage_text: Callable[[str], str],
    title: str,
    placement: Placement = HERE,
    budget: Budget | None = None,
    earlier: ScoringCounts | None = None,
) -> ScoringCounts:
    """Score every pair of the pool and add the labels to an open store; ``score_pool`` also reads them back.

    ``query_text`` and ``passage_text`` return the text of an id; ``placement`` says where the teacher works. If the
    ``budget`` is spent, some queries are left out; what was scored ``earlier`` counts too, and in the result. Errors
    are those of ``label_pairs`` and ``Placement.workers``.
    """
    queries = [QueryPairs(query_id, tuple(passage_ids)) for query_id, passage_ids in pool.items() if passage_ids]
    counts = replace(earlier) if earlier is not None else ScoringCounts()
    if not queries:
        return counts
    num_pairs = sum(len(query.passage_ids) for query in queries)
    with progress_bar(title, num_pairs) as advance, placement.workers(teacher, score_shard) as workers:
        label_pairs(
            workers,
            queries if budget is None else budget.spend(queries, counts),
            LabelWriter(labels),
            task,
            query_text=query_text,
            passage_text=passage_text,
            advance=with_rate(advance, counts),
            counts=counts,
        )
    return counts


def score_pool(
    teacher: PairTeacher,
    pool: Pool,
    query_texts: Mapping[str, str],
    passage_texts: Mapping[str, str],
    task: Task,
    *,
    dataset: str,
    store: Path,
    known: Path | None = None,
    title: str,
    placement: Placement = HERE,
) -> PoolScores:
    """Score every pair of the pool; pairs with a label in ``store`` or ``known`` are not scored again.

    A teacher that ranks lists scores all passages of a query again if any is new, or if their labels are in two stores.

    ``query_texts`` and ``passage_texts`` map ids to texts. New labels are written to the label store in the folder
    ``store``; ``known`` is the folder of another store of the same data set (labels made for training), only read.
    ``placement`` says where the teacher works. Errors are those of ``label_pool``.
    """
    key = {"teacher": teacher.fingerprint, "prompt": teacher.prompt_fingerprint(task), "dataset": dataset}
    labels = LabelStore(store, **key)
    earlier = LabelStore(known, **key) if known is not None else None
    scores: dict[str, dict[str, float]] = {
        query_id: earlier.log_odds(query_id) if earlier is not None else {} for query_id in pool
    }
    missing: dict[str, tuple[str, ...]] = {}
    for query_id, passage_ids in pool.items():
        not_here = labels.missing(query_id, passage_ids)
        nowhere = tuple(name for name in not_here if name not in scores[query_id])
        if ranks_lists(teacher):
            is_known = not not_here or scores[query_id].keys() >= {*passage_ids}
            nowhere = () if is_known else tuple(passage_ids)
        missing[query_id] = nowhere
    counts = label_pool(
        teacher,
        missing,
        labels,
        task,
        query_text=query_texts.__getitem__,
        passage_text=passage_texts.__getitem__,
        title=title,
        placement=placement,
    )
    ungraded: dict[str, frozenset[str]] = {}
    for query_id, passage_ids in pool.items():
        values = scores[query_id] | labels.log_odds(query_id)
        scores[query_id] = {passage_id: values[passage_id] for passage_id in passage_ids}
        if gives_grades(teacher):
            grades = (earlier.grades(query_id) if earlier is not None else {}) | labels.grades(query_id)
            ungraded[query_id] = frozenset(passage_ids) - grades.keys()
    return PoolScores(scores, counts.pairs, counts.truncated, counts.undecided, ungraded)


def _chunks(queries: Iterable[QueryPairs]) -> Iterator[list[QueryPairs]]:
    """Group queries into chunks of at least ``_PAIRS_AT_ONCE`` pairs; the last may be smaller."""
    chunk: list[QueryPairs] = []
    for query in queries:
        chunk.append(query)
        if sum(len(query.passage_ids) for query in chunk) >= _PAIRS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _by_query(
    queries: Sequence[QueryPairs], scores: TeacherScores, is_scored: Bool[np.ndarray, " pairs"]
) -> list[QueryLabels]:
    """Split the scores of a chunk by query; one with features is left out unless all its pairs are scored."""
    log_odds, features, grades = scores.log_odds, scores.features, scores.grades
    labels: list[QueryLabels] = []
    start = 0
    for query in queries:
        rows = start + np.flatnonzero(is_scored[start : start + len(query.passage_ids)])
        gram = None
        if features is not None and query.num_listed:
            rows = rows if len(rows) == len(query.passage_ids) else rows[:0]
            gram = gram_matrix(features[start : start + query.num_listed])
        if len(rows):
            passage_ids = tuple(query.passage_ids[row - start] for row in rows.tolist())
            labels.append(
                QueryLabels(query.query_id, passage_ids, log_odds[rows], gram, None if grades is None else grades[rows])
            )
        start += len(query.passage_ids)
    return labels
