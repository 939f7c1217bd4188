"""The systems that score single pairs of texts, and what each costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import progress_bar
from d2llm.core.types import SystemKind, Task
from d2llm.data.pairs import LabelledPair, PairDataset
from d2llm.evaluation import setting
from d2llm.evaluation.gold import Floats, Positions
from d2llm.evaluation.judging import judge_pool
from d2llm.evaluation.memory import peak_memory
from d2llm.evaluation.report import Cost
from d2llm.evaluation.setting import EvaluationSettings, Row
from d2llm.evaluation.store import MeasuredStore
from d2llm.evaluation.systems import milliseconds
from d2llm.models.teachers.judge import Judge
from d2llm.retrieval.protocols import SearchStudent
from d2llm.store.bm25 import WordIndex

_TIMED_JUDGEMENTS = 10  # pairs judged once more, alone and then together, for the time


@dataclass(frozen=True, slots=True)
class ScoredSplits:
    """One system's scores of the measured split and of the one that thresholds come from (empty without one).

    ``positions`` and ``tuning_positions`` are the pairs that were scored.
    """

    name: str
    kind: SystemKind
    positions: Positions
    scores: Floats
    tuning_positions: Positions
    tuning_scores: Floats
    cost: Cost
    fingerprint: str | None = None


@dataclass
class PairWork:
    """What every system of one evaluation is measured with."""

    dataset: PairDataset
    settings: EvaluationSettings
    pairs: Sequence[LabelledPair]
    tuning_pairs: Sequence[LabelledPair]
    folder: Path
    labels: Path | None
    show_progress: bool | None

    def __post_init__(self) -> None:
        self.store = MeasuredStore(self.folder / "measured")
        texts = [[(pair.id, pair.query, pair.passage) for pair in split] for split in (self.pairs, self.tuning_pairs)]
        self.content = fingerprint_json(texts)
        self.notes: list[str] = []

    def sample(self, size: int) -> Positions:
        """Positions of a random sample, in order; all of them when there are not more."""
        wanted = self.settings.teacher_queries
        if wanted is None or wanted >= size:
            return np.arange(size)
        return np.sort(np.random.default_rng(self.settings.seed).choice(size, wanted, replace=False))

    @property
    def probes(self) -> list[LabelledPair]:
        """The pairs that are timed."""
        count = min(self.settings.latency_queries, len(self.pairs))
        chosen = np.random.default_rng(self.settings.seed).choice(len(self.pairs), count, replace=False)
        return [self.pairs[position] for position in chosen.tolist()]

    def scored(
        self, name: str, kind: SystemKind, fingerprint: str | None, measure: Callable[[], dict[str, Any]]
    ) -> ScoredSplits:
        """The scores of all pairs, measured now or by an earlier run."""
        found = self.store.values([name, fingerprint, self.content, self.settings.task, "pairs"], measure)
        seconds: list[float] = found["probe_seconds"]
        cost = Cost(
            total=milliseconds(seconds),
            passages_per_second=found.get("passages_per_second"),
            pairs_per_second=found["pairs_per_second"],
            peak_memory_mib=found["peak_memory_mib"],
        )
        if found.get("num_truncated"):
            self.notes.append(f"{name}: {found['num_truncated']:,} texts were truncated")
        every = (np.arange(len(self.pairs)), np.arange(len(self.tuning_pairs)))
        scores, tuning_scores = (np.array(found[part], np.float64) for part in ("scores", "tuning_scores"))
        return ScoredSplits(name, kind, every[0], scores, every[1], tuning_scores, cost, fingerprint)


def lexical_scores(work: PairWork) -> ScoredSplits:
    """BM25 of a pair, with the passages of its split as the collection."""

    def of_split(pairs: Sequence[LabelledPair]) -> list[float]:
        passages = list(dict.fromkeys(pair.passage for pair in pairs))
        if not passages:
            return []
        places = {text: place for place, text in enumerate(passages)}
        index = WordIndex.from_texts(passages)
        scores = np.zeros(len(pairs))
        for query, positions in _by_query(pairs).items():
            of_query = index.scores(index.query(query))
            scores[positions] = of_query[[places[pairs[position].passage] for position in positions]]
        return scores.tolist()

    def measure() -> dict[str, Any]:
        with peak_memory() as peak:
            begin = perf_counter()
            scores = of_split(work.pairs)
            rate = len(scores) / (perf_counter() - begin)
            found = {"scores": scores, "tuning_scores": of_split(work.tuning_pairs), "probe_seconds": []}
            return {**found, "pairs_per_second": rate, "peak_memory_mib": peak()}

    return work.scored(setting.NAME_BM25, "bm25", None, measure)


def student_scores(work: PairWork, row: Row) -> ScoredSplits:
    """A student's scores of all pairs; each text is encoded once."""
    model, task = row.model, work.settings.task

    def measure() -> dict[str, Any]:
        with peak_memory() as peak:
            begin = perf_counter()
            scores, truncated = score_pairs(model, work.pairs, task, row.name, work.show_progress)
            seconds = perf_counter() - begin
            tuning_scores, _ = score_pairs(model, work.tuning_pairs, task, row.name, work.show_progress)
            times: list[float] = []
            for pair in work.probes:
                asked = perf_counter()
                score_pairs(model, [pair], task, row.name, False)
                times.append(perf_counter() - asked)
            return {
                "scores": scores.tolist(),
                "tuning_scores": tuning_scores.tolist(),
                "probe_seconds": times,
                "pairs_per_second": len(work.pairs) / seconds,
                "peak_memory_mib": peak(),
                "num_truncated": truncated,
            }

    return work.scored(row.name, row.kind, model.fingerprint, measure)


def score_pairs(
    model: SearchStudent, pairs: Sequence[LabelledPair], task: Task, title: str, show_progress: bool | None
) -> tuple[Floats, int]:
    """A student's score of each pair [n], and how many different texts were truncated; each text is encoded once."""
    if not pairs:
        return np.zeros(0), 0
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    passages = list(dict.fromkeys(pair.passage for pair in pairs))
    with progress_bar(f"encoding for {title}", len(queries) + len(passages), show=show_progress) as advance:
        encoded = model.encode_queries(queries, advance=advance), model.encode_passages(passages, advance=advance)
    query_rows, passage_rows = ({text: row for row, text in enumerate(texts)} for texts in (queries, passages))
    scores = np.zeros(len(pairs))
    for query, positions in _by_query(pairs).items():
        vectors = encoded[1].vectors[[passage_rows[pairs[position].passage] for position in positions]]
        scores[positions] = model.score(encoded[0].vectors[query_rows[query]], vectors, task)
    return scores, encoded[0].num_truncated + encoded[1].num_truncated


def judge_scores(work: PairWork, name: str, kind: SystemKind, judge: Judge) -> ScoredSplits:
    """A judge's scores of a sample of both splits."""
    parts = [(work.settings.split, work.pairs), ("tuning", work.tuning_pairs)]
    positions = [work.sample(len(pairs)) for _, pairs in parts]
    chosen = {
        f"{label}:{pairs[position].id}": pairs[position]
        for (label, pairs), of_split in zip(parts, positions, strict=True)
        for position in of_split.tolist()
    }
    judged = judge_pool(
        judge,
        {key: [key] for key in chosen},
        {key: pair.query for key, pair in chosen.items()},
        {key: pair.passage for key, pair in chosen.items()},
        work.settings.task,
        dataset=work.dataset.name,
        store=work.folder / "judgements" / work.content,
        known=work.labels,
        title=f"asking {name} (pairs)",
        show_progress=work.show_progress,
    )
    if judged.num_truncated:
        work.notes.append(f"{name}: {judged.num_truncated:,} of {judged.num_new:,} pairs judged now were truncated")

    def measure_time() -> dict[str, Any]:
        probes = [(pair.query, pair.passage) for pair in work.probes[:_TIMED_JUDGEMENTS]]
        seconds: list[float] = []
        for asked in (*([pair] for pair in probes), probes):
            begin = perf_counter()
            judge.judge(asked, work.settings.task)
            seconds.append(perf_counter() - begin)
        return {"alone": seconds[:-1], "pairs_per_second": len(probes) / seconds[-1]}

    times = work.store.values([name, judge.fingerprint, work.content, work.settings.task, "time"], measure_time)
    scores = [
        np.array([judged.scores[key][key] for key in (f"{label}:{pairs[p].id}" for p in of_split.tolist())])
        for (label, pairs), of_split in zip(parts, positions, strict=True)
    ]
    cost = Cost(total=milliseconds(times["alone"]), pairs_per_second=times["pairs_per_second"])
    return ScoredSplits(name, kind, positions[0], scores[0], positions[1], scores[1], cost, judge.fingerprint)


def _by_query(pairs: Sequence[LabelledPair]) -> dict[str, list[int]]:
    """Positions of the pairs of each query text."""
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, pair in enumerate(pairs):
        positions[pair.query].append(position)
    return positions
