"""The verb ``label``: the teacher judges every pair of the training plans; what is finished is never judged again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from d2llm.core.errors import InputError
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.recipe import TeacherConfig
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry
from d2llm.data.training import TrainingSource, check_sources
from d2llm.models.teachers.judge import Judge, Judgements, load_judge

_QUERIES_AT_ONCE = 32  # enough pairs to make batches of like length
_SHARD_SECONDS = 30.0  # the most work that is lost when the run is killed


@dataclass(frozen=True, slots=True)
class _Job:
    """The passages of one query to judge, and how many of the first the Gram matrix shall cover."""

    query_id: str
    passage_ids: tuple[str, ...]
    num_listed: int


@dataclass(frozen=True, slots=True)
class LabelReport:
    """What a labelling run did.

    ``pairs`` were judged now; ``finished_pairs`` were labelled before, ``finished_queries`` had all theirs.
    ``num_truncated`` pairs lost text to the teacher's length limit; of a remote teacher, ``num_bounded`` log-odds are
    only a bound and ``num_undecided`` pairs got no answer.
    """

    store: str
    teacher: str
    queries: int
    pairs: int
    finished_queries: int
    num_truncated: int
    tokens: int
    seconds: float
    pairs_per_second: float
    num_bounded: int = 0
    num_undecided: int = 0
    finished_pairs: int = 0


def label(
    sources: Sequence[TrainingSource],
    store: Path,
    *,
    teacher: TeacherConfig,
    device: str | None = None,
    dtype: str | None = None,
    show_progress: bool | None = None,
) -> LabelReport:
    """Label every query's positives, hard and easy negatives of the plans, and keep the Gram matrix of the features.

    Labels are kept under (teacher, prompt, query_id, passage_id), in shards written every half minute: an interrupted
    run goes on where it stopped, and the order of a plan does not matter. A query whose positives or hard negatives
    changed since is judged anew as a whole, since the Gram matrix needs the features of all; one with other easy
    negatives has only these judged. A teacher without features leaves no Gram matrix. What is in memory besides data
    and plan is what was judged since the last shard, and on a resume the labels that are there.

    Args:
        sources: data sets with their plans and tasks.
        store: folder of the label store; made when missing.
        teacher: the LLM, tuned or not, and its prompt.
        device: by default what this machine has.
        dtype: by default what is fast there.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: data sets that cannot be told apart (see ``check_sources``), or a shard cannot be written (disk
            full); the shards before it stay, and the next run goes on from there.
        ModelError: the teacher gave log-odds that are no numbers.
    """
    started = time.monotonic()
    check_sources(sources)
    model = load_judge(teacher, device=device, dtype=dtype)
    work: list[tuple[TrainingSource, LabelStore]] = []
    total = _Counts()
    for source in sources:
        labels = LabelStore(
            store,
            teacher=model.fingerprint,
            prompt=model.prompt_fingerprint(source.task),
            dataset=source.dataset.name,
        )
        work.append((source, labels))
        for entry in source.entries_to_label:
            num_pairs = len(_job(labels, entry).passage_ids)
            total.pairs += num_pairs
            total.queries += num_pairs > 0
            total.finished += num_pairs == 0
            total.finished_pairs += len(entry.passage_ids) - num_pairs
    with progress_bar("labelling pairs", total.pairs, show=show_progress) as advance:
        for source, labels in work:
            _label_source(model, source, labels, total, _with_rate(advance))
    seconds = time.monotonic() - started
    return LabelReport(
        store=str(store),
        teacher=model.fingerprint,
        queries=total.queries,
        pairs=total.pairs,
        finished_queries=total.finished,
        num_truncated=total.truncated,
        tokens=total.tokens,
        seconds=seconds,
        pairs_per_second=total.pairs / seconds,
        num_bounded=total.bounded,
        num_undecided=total.undecided,
        finished_pairs=total.finished_pairs,
    )


def label_passages(
    judge: Judge,
    source: TrainingSource,
    labels: LabelStore,
    wanted: Mapping[str, Sequence[str]],
    *,
    show_progress: bool | None = None,
) -> int:
    """Judge passages of queries that have no label yet, in shards written every half minute; how many pairs it were.

    Args:
        judge: whose labels they are.
        source: the data set.
        labels: its store, which knows of them afterwards.
        wanted: query_id -> passage ids; those with labels are passed over.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: a shard cannot be written.
        ModelError: the teacher gave log-odds that are no numbers.
    """
    missing = {query_id: tuple(labels.missing(query_id, ids)) for query_id, ids in wanted.items()}
    jobs = [_Job(query_id, ids, 0) for query_id, ids in missing.items() if ids]
    num_pairs = sum(len(job.passage_ids) for job in jobs)
    with progress_bar(
        f"asking the teacher about {source.dataset.name} (pairs)", num_pairs, show=show_progress
    ) as advance:
        _label_jobs(judge, source, labels, iter(jobs), _Counts(), _with_rate(advance), remember=True)
    return num_pairs


@dataclass(slots=True)
class _Counts:
    """What a run has to do, and what it met."""

    pairs: int = 0
    queries: int = 0
    finished: int = 0
    finished_pairs: int = 0
    truncated: int = 0
    tokens: int = 0
    bounded: int = 0
    undecided: int = 0

    def add(self, judgements: Judgements) -> None:
        self.truncated += judgements.num_truncated
        self.tokens += judgements.num_tokens
        self.bounded += judgements.num_bounded
        self.undecided += judgements.num_undecided


def _label_source(
    model: Judge, source: TrainingSource, labels: LabelStore, total: _Counts, advance: Callable[[int], None]
) -> None:
    """Judge what one data set still lacks; memory holds what was judged since the last shard."""
    jobs = (job for entry in source.entries_to_label if (job := _job(labels, entry)).passage_ids)
    _label_jobs(model, source, labels, jobs, total, advance, remember=False)  # a plan names a query once


def _label_jobs(
    model: Judge,
    source: TrainingSource,
    labels: LabelStore,
    jobs: Iterator[_Job],
    total: _Counts,
    advance: Callable[[int], None],
    *,
    remember: bool,
) -> None:
    unwritten: list[QueryLabels] = []
    last_written = time.monotonic()
    for chunk in _chunks(jobs):
        pairs = [
            (source.query_text(job.query_id), source.passage_text(passage_id))
            for job in chunk
            for passage_id in job.passage_ids
        ]
        judgements = model.judge(pairs, source.task, with_features=True, advance=advance)
        total.add(judgements)
        unwritten += _by_query(chunk, judgements.log_odds, judgements.features)
        if time.monotonic() - last_written > _SHARD_SECONDS:
            _write(labels, unwritten, remember=remember)
            unwritten, last_written = [], time.monotonic()
    _write(labels, unwritten, remember=remember)


def _write(labels: LabelStore, unwritten: Sequence[QueryLabels], *, remember: bool) -> None:
    try:
        labels.write(unwritten, remember=remember)
    except OSError as error:
        lost = sum(len(item.passage_ids) for item in unwritten)
        raise InputError(
            f"{labels.folder}: labels cannot be written ({error.strerror or error}). The shards written before are "
            f"whole and stay; the last {lost} pairs judged are lost. Make room and run the same command again: it goes "
            "on from there"
        ) from error


def _with_rate(advance: Advance) -> Callable[[int], None]:
    """``advance`` with the pairs a second, since the first call, beside the bar."""
    started = time.monotonic()
    finished = 0

    def count(pairs: int) -> None:
        nonlocal finished
        finished += pairs
        advance(pairs, f"{finished / max(1e-9, time.monotonic() - started):.1f} pairs/s")

    return count


def _job(labels: LabelStore, entry: PlanEntry) -> _Job:
    """What is still to be judged of one query."""
    listed = entry.positives + entry.hard_negatives
    # A query with labels and no Gram matrix was judged by a teacher without features: there are no cosines to wait for.
    has_no_features = bool(labels.log_odds(entry.query_id)) and labels.gram(entry.query_id) is None
    if not has_no_features and labels.missing_cosines(entry.query_id, listed):
        return _Job(entry.query_id, entry.passage_ids, len(listed))
    return _Job(entry.query_id, tuple(labels.missing(entry.query_id, entry.passage_ids)), 0)


def _chunks(jobs: Iterator[_Job]) -> Iterator[Sequence[_Job]]:
    while chunk := list(itertools.islice(jobs, _QUERIES_AT_ONCE)):
        yield chunk


def _by_query(
    jobs: Sequence[_Job], log_odds: Float32[np.ndarray, " pairs"], features: Float32[np.ndarray, "pairs dim"] | None
) -> list[QueryLabels]:
    """Cut the judgements of a chunk into those of each query; the Gram matrix covers positives and hard negatives."""
    labels: list[QueryLabels] = []
    start = 0
    for job in jobs:
        end = start + len(job.passage_ids)
        gram = None
        if features is not None and job.num_listed:
            listed = features[start : start + job.num_listed]
            directions = listed / np.linalg.norm(listed, axis=1, keepdims=True).clip(min=1e-12)
            gram = directions @ directions.T
        labels.append(QueryLabels(job.query_id, job.passage_ids, log_odds[start:end], gram))
        start = end
    return labels
