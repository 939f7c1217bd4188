"""The systems that ``evaluate`` compares: each ranks the same queries, and is timed on a few of them asked alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from d2llm.core.progress import progress_bar
from d2llm.core.types import Passage, Query, SystemKind, Task
from d2llm.data.trec import TrecRun
from d2llm.evaluation.memory import peak_memory
from d2llm.evaluation.report import Cost, Milliseconds
from d2llm.ops.ranking import reciprocal_rank_fusion
from d2llm.retrieval.search import Searcher
from d2llm.store.bm25 import WordIndex, rank_passages

RankedIds = tuple[tuple[str, float], ...]
"""Passage ids with their scores, best first."""


@dataclass(frozen=True, slots=True)
class System:
    """One measured system.

    ``rankings``: query_id -> passages with scores, best first. ``probe_seconds``: "total" and, where known, its parts
    "encode", "candidates" and "score" -> the time of each probe. ``num_truncated``: texts or pairs that were cut.
    """

    name: str
    kind: SystemKind
    rankings: Mapping[str, RankedIds]
    probe_seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    passages_per_second: float | None = None
    pairs_per_second: float | None = None
    bytes_per_passage: float | None = None
    peak_memory_mib: float | None = None
    fingerprint: str | None = None
    num_truncated: int = 0
    notes: tuple[str, ...] = ()

    def ids(self, query_id: str) -> list[str]:
        """The ranking of one query without its scores; empty for one that was not asked."""
        return [passage_id for passage_id, _ in self.rankings.get(query_id, ())]

    @property
    def cost(self) -> Cost:
        """The times of the probes in percentiles, and the rest."""
        times = {name: milliseconds(seconds) for name, seconds in self.probe_seconds.items()}
        return Cost(
            total=times.get("total"),
            encode=times.get("encode"),
            candidates=times.get("candidates"),
            score=times.get("score"),
            passages_per_second=self.passages_per_second,
            pairs_per_second=self.pairs_per_second,
            bytes_per_passage=self.bytes_per_passage,
            peak_memory_mib=self.peak_memory_mib,
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """What is asked of every system. ``probes`` are the queries that are timed."""

    queries: Sequence[Query]
    probes: Sequence[Query]
    task: Task
    top_k: int
    show_progress: bool | None


def milliseconds(seconds: Sequence[float]) -> Milliseconds | None:
    """Median, 95th percentile and mean of some times; None where there are none."""
    if not seconds:
        return None
    p50, p95 = np.percentile(seconds, [50, 95]).tolist()
    return Milliseconds(1000 * p50, 1000 * p95, 1000 * float(np.mean(seconds)))


def lexical_system(name: str, passages: Sequence[Passage], trial: Trial) -> System:
    """Rank by BM25."""
    with peak_memory() as peak:
        begin = time.perf_counter()
        index, ids = WordIndex.from_texts(passage.full_text for passage in passages), [p.id for p in passages]
        rate = len(passages) / (time.perf_counter() - begin)
        rankings: dict[str, RankedIds] = {}
        with progress_bar(f"ranking by {name}", len(trial.queries), show=trial.show_progress) as advance:
            found = rank_passages(index, ids, (query.text for query in trial.queries), trial.top_k)
            for query, candidates in zip(trial.queries, found, strict=True):
                rankings[query.id] = tuple((candidate.passage_id, candidate.score) for candidate in candidates)
                advance(1)
        totals = timed(lambda query: list(rank_passages(index, ids, [query.text], trial.top_k)), trial.probes)
        return System(
            name,
            "bm25",
            rankings,
            {"total": totals},
            passages_per_second=rate,
            bytes_per_passage=index.num_bytes / len(index),
            peak_memory_mib=peak(),
        )


def student_system(name: str, kind: SystemKind, searcher: Searcher, trial: Trial) -> System:
    """Rank by a student's search."""
    with peak_memory() as peak:
        answers = searcher.rank(trial.queries, show_progress=trial.show_progress, title=f"ranking by {name}")
        rankings = {
            answer.query.id: tuple((place.passage.id, place.score) for place in answer.passages) for answer in answers
        }
        num_cut = sum(answer.truncated for answer in answers)
        asked = [searcher.rank([query])[0] for query in (trial.probes[0], *trial.probes)][1:]
        totals = timed(lambda query: searcher.rank([query]), trial.probes)
        parts = {part: tuple(ranking.seconds[part] for ranking in asked) for part in ("encode", "candidates", "score")}
        return System(
            name,
            kind,
            rankings,
            {"total": totals, **parts},
            pairs_per_second=sum(ranking.num_candidates for ranking in asked) / max(sum(parts["score"]), 1e-9),
            peak_memory_mib=peak(),
            notes=(f"{name}: {num_cut:,} of {len(answers):,} queries were truncated",) if num_cut else (),
        )


def hybrid_system(name: str, first: System, second: System, trial: Trial) -> System:
    """Fuse two rankings by reciprocal rank; the time is that of both, one after the other."""
    rankings: dict[str, RankedIds] = {}
    for query in trial.queries:
        fused = reciprocal_rank_fusion([first.ids(query.id), second.ids(query.id)])[: trial.top_k]
        rankings[query.id] = tuple((candidate.passage_id, candidate.score) for candidate in fused)
    totals = zip(first.probe_seconds["total"], second.probe_seconds["total"], strict=True)
    return System(
        name,
        "hybrid",
        rankings,
        {"total": tuple(one + other for one, other in totals)},
        bytes_per_passage=(first.bytes_per_passage or 0) + (second.bytes_per_passage or 0),
    )


def run_system(run: TrecRun, trial: Trial, passages: Mapping[str, Passage]) -> System:
    """A system of somebody else, by the rankings it wrote; what does not belong to this evaluation is counted."""
    asked = {query.id for query in trial.queries}
    rankings = {
        query_id: tuple(
            (passage_id, run.scores[query_id][passage_id]) for passage_id in ranking if passage_id in passages
        )
        for query_id, ranking in run.rankings.items()
        if query_id in asked
    }
    strangers = sum(passage_id not in passages for query_id in rankings for passage_id in run.rankings[query_id])
    counts = {
        "queries of the run are not judged here and were left out": len(run.rankings.keys() - asked),
        "queries are not in the run and count as 0": len(asked - rankings.keys()),
        "ranked passages are not in the corpus and were left out": strangers,
    }
    notes = tuple(f"{run.name}: {count:,} {what}" for what, count in counts.items() if count)
    cut = {query_id: ranking[: trial.top_k] for query_id, ranking in rankings.items()}
    return System(run.name, "external", cut, notes=(*(f"{run.name}: {issue}" for issue in run.issues), *notes))


def reranked(
    first: System, scores: Mapping[str, Mapping[str, float]], trial: Trial, *, name: str, kind: SystemKind
) -> System:
    """What was judged, by its score (ties by passage id), and behind it the rest of ``first`` in its order."""
    rankings: dict[str, RankedIds] = {}
    for query in trial.queries:
        judged = sorted(scores[query.id].items(), key=lambda item: (-item[1], item[0]))
        rest = [passage_id for passage_id in first.ids(query.id) if passage_id not in scores[query.id]]
        lowest = judged[-1][1] if judged else 0.0
        behind = [(passage_id, lowest - place) for place, passage_id in enumerate(rest, start=1)]
        rankings[query.id] = tuple((judged + behind)[: trial.top_k])
    return System(name, kind, rankings)


def with_first_stages(system: System, judging: Sequence[float], first_stages: Sequence[System]) -> System:
    """A reranker's time: what proposes its candidates (on average) and the judging."""
    before = sum(float(np.mean(stage.probe_seconds["total"])) for stage in first_stages)
    return replace(
        system, probe_seconds={"total": tuple(before + seconds for seconds in judging), "score": tuple(judging)}
    )


def timed(ask: Callable[[Query], object], probes: Sequence[Query]) -> tuple[float, ...]:
    """Seconds that each probe takes, asked alone; a first call before pays for what is set up once."""
    ask(probes[0])
    seconds: list[float] = []
    for query in probes:
        begin = time.perf_counter()
        ask(query)
        seconds.append(time.perf_counter() - begin)
    return tuple(seconds)
