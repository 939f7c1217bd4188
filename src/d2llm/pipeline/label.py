"""The verb ``label``: the teacher judges every pair of the training plans; what is finished is never judged again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from d2llm.core.recipe import TeacherConfig
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry
from d2llm.data.training import TrainingSource, check_sources
from d2llm.models.judge import load_judge
from d2llm.pipeline.progress import progress_bar

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

    ``pairs`` were judged now; ``finished_queries`` had all their labels before. ``num_truncated`` pairs lost text to
    the teacher's length limit.
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
    negatives has only these judged.

    Args:
        sources: data sets with their plans and tasks.
        store: folder of the label store; made when missing.
        teacher: the LLM, tuned or not, and its prompt.
        device: by default what this machine has.
        dtype: by default what is fast there.
        show_progress: None means: if standard error is a terminal.

    Raises:
        InputError: data sets that cannot be told apart (see ``check_sources``).
        ModelError: the teacher gave log-odds that are no numbers.
    """
    started = time.monotonic()
    check_sources(sources)
    model = load_judge(teacher, device=device, dtype=dtype)
    work: list[tuple[TrainingSource, LabelStore, list[_Job]]] = []
    finished = 0
    for source in sources:
        labels = LabelStore(
            store,
            teacher=model.fingerprint,
            prompt=model.prompt_fingerprint(source.task),
            dataset=source.dataset.name,
        )
        entries = source.entries_to_label
        jobs = [job for entry in entries if (job := _job(labels, entry)).passage_ids]
        finished += len(entries) - len(jobs)
        work.append((source, labels, jobs))
    num_pairs = sum(len(job.passage_ids) for _, _, jobs in work for job in jobs)
    num_truncated = num_tokens = 0
    with progress_bar("labelling pairs", num_pairs, show=show_progress) as advance:
        for source, labels, jobs in work:
            unwritten: list[QueryLabels] = []
            last_written = time.monotonic()
            for chunk in _chunks(jobs):
                pairs = [
                    (source.query_text(job.query_id), source.passage_text(passage_id))
                    for job in chunk
                    for passage_id in job.passage_ids
                ]
                judgements = model.judge(pairs, source.task, with_features=True, advance=advance)
                assert judgements.features is not None
                unwritten += _by_query(chunk, judgements.log_odds, judgements.features)
                num_truncated += judgements.num_truncated
                num_tokens += judgements.num_tokens
                if time.monotonic() - last_written > _SHARD_SECONDS:
                    labels.write(unwritten)
                    unwritten, last_written = [], time.monotonic()
            if unwritten:
                labels.write(unwritten)
    seconds = time.monotonic() - started
    return LabelReport(
        store=str(store),
        teacher=model.fingerprint,
        queries=sum(len(jobs) for _, _, jobs in work),
        pairs=num_pairs,
        finished_queries=finished,
        num_truncated=num_truncated,
        tokens=num_tokens,
        seconds=seconds,
        pairs_per_second=num_pairs / seconds,
    )


def _job(labels: LabelStore, entry: PlanEntry) -> _Job:
    """What is still to be judged of one query."""
    listed = entry.positives + entry.hard_negatives
    if labels.missing_cosines(entry.query_id, listed):
        return _Job(entry.query_id, entry.passage_ids, len(listed))
    return _Job(entry.query_id, tuple(labels.missing(entry.query_id, entry.passage_ids)), 0)


def _chunks(jobs: Sequence[_Job]) -> Iterator[Sequence[_Job]]:
    for start in range(0, len(jobs), _QUERIES_AT_ONCE):
        yield jobs[start : start + _QUERIES_AT_ONCE]


def _by_query(
    jobs: Sequence[_Job], log_odds: Float32[np.ndarray, " pairs"], features: Float32[np.ndarray, "pairs dim"]
) -> list[QueryLabels]:
    """Cut the judgements of a chunk into those of each query; the Gram matrix covers positives and hard negatives."""
    labels: list[QueryLabels] = []
    start = 0
    for job in jobs:
        end = start + len(job.passage_ids)
        listed = features[start : start + job.num_listed]
        directions = listed / np.linalg.norm(listed, axis=1, keepdims=True).clip(min=1e-12)
        gram = directions @ directions.T if job.num_listed else None
        labels.append(QueryLabels(job.query_id, job.passage_ids, log_odds[start:end], gram))
        start = end
    return labels
