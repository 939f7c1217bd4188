"""Asking a judge (the teacher, a cross-encoder) about pooled pairs, once each: judgements are kept in a label store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from d2llm.core.progress import progress_bar
from d2llm.core.types import Task
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.retrieval.protocols import PairJudge

_PAIRS_AT_ONCE = 128  # at least, of whole queries: enough for full batches, few enough that the progress bar moves
_WRITE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class PoolScores:
    """Scores by group (query_id) and passage_id. ``num_truncated`` of the ``num_new`` pairs judged now were cut."""

    scores: dict[str, dict[str, float]]
    num_new: int
    num_truncated: int
    pairs_per_second: float | None


Pool = Mapping[str, Sequence[str]]
"""query_id -> the passages whose scores are wanted."""


def interleaved(rankings: Sequence[Sequence[str]], depth: int) -> list[str]:
    """The first ``depth`` different passages, taken from the rankings in turn."""
    in_turn = chain.from_iterable(zip_longest(*rankings))
    return list(dict.fromkeys(passage_id for passage_id in in_turn if passage_id is not None))[:depth]


def judge_pool(
    judge: PairJudge,
    pool: Pool,
    query_texts: Mapping[str, str],
    passage_texts: Mapping[str, str],
    task: Task,
    *,
    dataset: str,
    store: Path,
    known: Path | None = None,
    title: str,
    show_progress: bool | None,
) -> PoolScores:
    """Scores of every pair of the pool; those that ``store`` or ``known`` holds are not judged again.

    Args:
        judge: whom to ask.
        pool: what is wanted.
        query_texts: by query_id.
        passage_texts: full texts by passage_id.
        task: which prompt.
        dataset: name of the data set.
        store: folder of a label store that this call may write.
        known: folder of another label store, of the same data set, that is read only (labels made for training).
        title: of the progress bar.
        show_progress: None means: if standard error is a terminal.
    """
    key = {"teacher": judge.fingerprint, "prompt": judge.prompt_fingerprint(task), "dataset": dataset}
    kept = LabelStore(store, **key)
    before = LabelStore(known, **key) if known is not None else None
    scores: dict[str, dict[str, float]] = {}
    wanted: list[tuple[str, list[str]]] = []
    for query_id, passage_ids in pool.items():
        found = {**(before.log_odds(query_id) if before is not None else {}), **kept.log_odds(query_id)}
        scores[query_id] = {passage_id: found[passage_id] for passage_id in passage_ids if passage_id in found}
        if missing := [passage_id for passage_id in passage_ids if passage_id not in found]:
            wanted.append((query_id, missing))
    num_pairs = sum(len(passage_ids) for _, passage_ids in wanted)
    num_truncated, unwritten = 0, list[QueryLabels]()
    begin = last_written = time.perf_counter()
    with progress_bar(title, num_pairs, show=show_progress) as advance:
        for group in _groups(wanted):
            pairs = [(query_texts[query_id], passage_texts[found]) for query_id, ids in group for found in ids]
            judged = judge.judge(pairs, task)
            num_truncated += judged.num_truncated
            ends = np.cumsum([len(ids) for _, ids in group])[:-1]
            for (query_id, ids), values in zip(group, np.split(judged.log_odds, ends), strict=True):
                scores[query_id].update(zip(ids, values.tolist(), strict=True))
                unwritten.append(QueryLabels(query_id, tuple(ids), values.astype(np.float32), None))
            advance(len(pairs))
            if time.perf_counter() - last_written > _WRITE_SECONDS:
                kept.write(unwritten)
                unwritten, last_written = [], time.perf_counter()
    kept.write(unwritten)
    rate = num_pairs / (time.perf_counter() - begin) if num_pairs else None
    return PoolScores(scores, num_pairs, num_truncated, rate)


def _groups(wanted: Sequence[tuple[str, list[str]]]) -> Iterator[list[tuple[str, list[str]]]]:
    """Queries with their passages, as many together as give ``_PAIRS_AT_ONCE`` pairs."""
    group: list[tuple[str, list[str]]] = []
    for query in wanted:
        group.append(query)
        if sum(len(passage_ids) for _, passage_ids in group) >= _PAIRS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
