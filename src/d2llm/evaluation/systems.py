"""The systems that rank a corpus in an evaluation: each ranks the same queries and is timed on a few of them.

Measured systems are stored, so that a repeated evaluation can reuse them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.files import write_bytes
from d2llm.core.fingerprint import fingerprint_json, fingerprint_passages
from d2llm.core.json_values import parse_json
from d2llm.core.names import counted
from d2llm.core.progress import progress_bar
from d2llm.core.types import PartKind, Passage, Query, SystemKind, Task
from d2llm.data.beir import Dataset
from d2llm.data.same_text import OwnPassages
from d2llm.data.trec import TrecRun
from d2llm.evaluation.report import Cost, Latency
from d2llm.evaluation.settings import EvaluationSettings
from d2llm.models.protocols import SearchStudent, expansion_fingerprint
from d2llm.models.tokens import EncodedTexts
from d2llm.ops.fusion import reciprocal_rank_fusion
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.retrieval.local_segment import LocalSegment
from d2llm.retrieval.open_index import part_formats
from d2llm.retrieval.query_preparation import ENCODED_AT_ONCE
from d2llm.retrieval.reading import encode_shard, encode_texts
from d2llm.retrieval.reranker import OpenReranker
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.retrieval.segments import IndexView
from d2llm.runners.placement import HERE, Placement
from d2llm.store.bm25 import WordIndex, rank_passages
from d2llm.store.index_manifest import FORMAT_VERSION

RankedIds = tuple[tuple[str, float], ...]
"""Passage ids with their scores, best first."""


@dataclass(frozen=True, slots=True)
class System:
    """One measured system.

    ``rankings``: query_id -> passages with scores, best first. ``probe_seconds``: "total" and, if known, its parts
    "encode", "candidates" and "score" -> the time of each probe. ``costs``: the other fields of ``Cost`` by name.
    ``notes``: remarks for the report.
    """

    name: str
    kind: SystemKind
    rankings: Mapping[str, RankedIds]
    probe_seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    costs: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    def ids(self, query_id: str) -> list[str]:
        """The passage ids of one query's ranking; empty if the system did not answer it."""
        return [passage_id for passage_id, _ in self.rankings.get(query_id, ())]

    @property
    def cost(self) -> Cost:
        """The percentiles of the probes' times, and the other costs."""
        times = {name: milliseconds(seconds) for name, seconds in self.probe_seconds.items()}
        known: dict[str, Any] = {**times, **self.costs}
        return Cost(**known)


@dataclass(frozen=True, slots=True)
class Trial:
    """The queries that every system answers, with ``top_k`` passages each.

    ``probes`` are the queries that are timed. ``own_passages`` are those that are the query itself; every system leaves
    them out (``data.same_text``).
    """

    queries: Sequence[Query]
    probes: Sequence[Query]
    task: Task
    top_k: int
    own_passages: OwnPassages = field(default_factory=OwnPassages)

    @property
    def num_own(self) -> int:
        """How many passages more than ``top_k`` a system must rank, so that as many are left."""
        return max((len(self.own_passages.of(query.id)) for query in self.queries), default=0)

    def without_own(self, query_id: str, ranking: Iterable[tuple[str, float]]) -> RankedIds:
        """The first ``top_k`` passages of a query's ranking that are not the query itself."""
        own_ids = self.own_passages.of(query_id)
        return tuple(islice((hit for hit in ranking if hit[0] not in own_ids), self.top_k))


def sample(total: int, size: int | None, seed: int) -> NDArray[np.intp]:
    """Sorted places of a random sample of ``size`` of ``total`` items; all if there are no more, or for None."""
    if size is None or size >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, size, replace=False))


def milliseconds(seconds: Sequence[float]) -> Latency | None:
    """Median, 95th percentile and mean of some times; None if there are none."""
    if not seconds:
        return None
    p50, p95 = np.percentile(seconds, [50, 95]).tolist()
    return Latency(1000 * p50, 1000 * p95, 1000 * float(np.mean(seconds)))


def lexical_system(name: str, passages: Sequence[Passage], trial: Trial) -> System:
    """Rank by BM25."""
    with peak_memory() as peak:
        begin = time.perf_counter()
        index, ids = WordIndex.from_texts(passage.full_text for passage in passages), [p.id for p in passages]
        rate = len(passages) / (time.perf_counter() - begin)
        rankings: dict[str, RankedIds] = {}
        with progress_bar(f"ranking by {name}", len(trial.queries)) as advance:
            lists = rank_passages(index, ids, (query.text for query in trial.queries), trial.top_k + trial.num_own)
            for query, candidates in zip(trial.queries, lists, strict=True):
                ranking = ((candidate.passage_id, candidate.score) for candidate in candidates)
                rankings[query.id] = trial.without_own(query.id, ranking)
                advance(1)
        totals = timed(lambda query: list(rank_passages(index, ids, [query.text], trial.top_k)), trial.probes)
        return System(
            name,
            "bm25",
            rankings,
            {"total": totals},
            {
                "passages_per_second": rate,
                "bytes_per_passage": index.num_bytes / len(index),
                "peak_memory_mib": peak(),
            },
        )


def student_system(
    name: str, kind: SystemKind, searcher: Searcher, trial: Trial, encoded: EncodedTexts | None = None
) -> System:
    """Rank by a student's search; ``encoded`` are the queries, if workers have encoded them.

    The search's own ``top_k`` must be at least that of the trial and ``trial.num_own`` together.
    """
    with peak_memory() as peak:
        ranked = searcher.rank_ids(trial.queries, title=f"ranking by {name}", encoded=encoded)
        rankings = {ranking.query.id: trial.without_own(ranking.query.id, ranking.passages) for ranking in ranked}
        num_cut = sum(ranking.truncated for ranking in ranked)
        probe_answers = [searcher.rank([query])[0] for query in (trial.probes[0], *trial.probes)][1:]
        totals = timed(lambda query: searcher.rank([query]), trial.probes)
        seconds = {
            part: tuple(ranking.seconds[part] for ranking in probe_answers)
            for part in ("encode", "candidates", "score")
        }
        return System(
            name,
            kind,
            rankings,
            {"total": totals, **seconds},
            {
                "pairs_per_second": sum(answer.num_candidates for answer in probe_answers)
                / max(sum(seconds["score"]), 1e-9),
                "peak_memory_mib": peak(),
            },
            notes=(f"{num_cut:,} of {len(ranked):,} queries were truncated",) if num_cut else (),
        )


def hybrid_system(name: str, first: System, second: System, trial: Trial) -> System:
    """Fuse two rankings by reciprocal rank; its time is the sum of both systems' times."""
    rankings: dict[str, RankedIds] = {}
    for query in trial.queries:
        fused = reciprocal_rank_fusion([first.ids(query.id), second.ids(query.id)])[: trial.top_k]
        rankings[query.id] = tuple((candidate.passage_id, candidate.score) for candidate in fused)
    totals = zip(first.probe_seconds["total"], second.probe_seconds["total"], strict=True)
    return System(
        name,
        "hybrid",
        rankings,
        {"total": tuple(first_time + second_time for first_time, second_time in totals)},
        {"bytes_per_passage": sum(system.costs.get("bytes_per_passage") or 0 for system in (first, second))},
    )


def run_system(run: TrecRun, trial: Trial, passages: Mapping[str, Passage]) -> System:
    """An external system, by the rankings in its run file; queries and passages outside this evaluation are counted."""
    query_ids = {query.id for query in trial.queries}
    rankings = {
        query_id: tuple(
            (passage_id, run.scores[query_id][passage_id]) for passage_id in ranking if passage_id in passages
        )
        for query_id, ranking in run.rankings.items()
        if query_id in query_ids
    }
    num_unknown = sum(passage_id not in passages for query_id in rankings for passage_id in run.rankings[query_id])
    num_own = sum(
        passage_id in trial.own_passages.of(query_id) for query_id in rankings for passage_id in run.rankings[query_id]
    )
    counts = (
        (len(run.rankings.keys() - query_ids), "query", "of the run not judged here, left out"),
        (len(query_ids - rankings.keys()), "query", "not in the run, counted as 0"),
        (num_unknown, "ranked passage", "not in the corpus, left out"),
        (num_own, "ranked passage", "with the query's own text, left out"),
    )
    notes = tuple(f"{counted(count, noun)} {what}" for count, noun, what in counts if count)
    truncated = {query_id: trial.without_own(query_id, ranking) for query_id, ranking in rankings.items()}
    return System(run.name, "external", truncated, notes=(*run.issues, *notes))


def reranked(
    first: System, scores: Mapping[str, Mapping[str, float]], trial: Trial, *, name: str, kind: SystemKind
) -> System:
    """Rank the scored passages by score (ties by passage id), followed by the rest of ``first`` in its order."""
    rankings: dict[str, RankedIds] = {}
    for query in trial.queries:
        scored = sorted(scores[query.id].items(), key=lambda item: (-item[1], item[0]))
        rest = [passage_id for passage_id in first.ids(query.id) if passage_id not in scores[query.id]]
        lowest = scored[-1][1] if scored else 0.0
        unscored = [(passage_id, lowest - rank) for rank, passage_id in enumerate(rest, start=1)]
        rankings[query.id] = tuple((scored + unscored)[: trial.top_k])
    return System(name, kind, rankings)


def with_first_stages(system: System, scoring: Sequence[float], first_stages: Sequence[System]) -> System:
    """Add a reranker's times: the mean time of the systems that propose its candidates, plus the scoring."""
    proposing = sum(float(np.mean(stage.probe_seconds["total"])) for stage in first_stages)
    return replace(
        system, probe_seconds={"total": tuple(proposing + seconds for seconds in scoring), "score": tuple(scoring)}
    )


def timed(ask: Callable[[Query], object], probes: Sequence[Query]) -> tuple[float, ...]:
    """Seconds that each probe takes on its own, after a warm-up call."""
    ask(probes[0])
    seconds: list[float] = []
    for query in probes:
        begin = time.perf_counter()
        ask(query)
        seconds.append(time.perf_counter() - begin)
    return tuple(seconds)


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 2**20


@contextmanager
def peak_memory() -> Generator[Callable[[], float | None]]:
    """Yield a function that returns the peak resident memory of this process, in MiB, since the block was entered.

    Only Linux can reset the peak; elsewhere it is the peak since the process started, or None if the system does not
    report it.
    """
    with suppress(OSError):
        _RESET.write_text("5")
    yield _peak


def _peak() -> float | None:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / _MIB if sys.platform == "darwin" else largest / 1024


_VERSION = 5  # version of the stored values; incremented when the meaning of a system's rankings or times changes


class MeasuredStore:
    """A cache of measured values, one JSON file per key; the key contains everything that the values depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_found = 0
        """How many values an earlier run had measured."""

    def values(self, key: object, make: Callable[[], Any]) -> Any:
        """The JSON values stored under ``key``; if there are none, calls ``make`` and stores what it returns."""
        path = self.folder / f"{fingerprint_json([_VERSION, key])}.json"
        if path.is_file():
            self.num_found += 1
            return parse_json(path.read_text(encoding="utf-8"))
        values = make()
        write_bytes(path, json.dumps(values, ensure_ascii=False).encode())
        return values

    def system(self, key: object, make: Callable[[], System]) -> System:
        """The system stored under ``key``; if there is none, calls ``make`` and stores what it returns."""
        values = self.values(key, lambda: asdict(make()))
        rankings = {
            query_id: tuple((passage_id, score) for passage_id, score in ranking)
            for query_id, ranking in values["rankings"].items()
        }
        seconds = {name: tuple(times) for name, times in values["probe_seconds"].items()}
        restored: dict[str, Any] = {"rankings": rankings, "probe_seconds": seconds, "notes": tuple(values["notes"])}
        return System(**(dict(values) | restored))


@dataclass
class RetrievalWork:
    """The state of one evaluation. Teachers score the ``sampled`` queries; ``folder`` holds indexes and measurements.

    ``indexes`` are made already; one that a student made of this corpus is searched instead of a new one.
    """

    dataset: Dataset
    settings: EvaluationSettings
    trial: Trial
    sampled: Sequence[Query]
    folder: Path
    labels: Path | None
    placement: Placement = HERE
    indexes: Sequence[Path] = ()

    def __post_init__(self) -> None:
        self.passages: list[Passage] = list(self.dataset.passages.values())
        self.corpus = fingerprint_passages(self.passages)
        self.store = MeasuredStore(self.folder / "measured")
        self.notes: list[str] = []
        self._given = [Index.open(folder) for folder in self.indexes]
        self._part_formats: dict[str, dict[PartKind, str]] = {}
        self._encoded: dict[object, EncodedTexts] = {}

    def key(self, name: str, *details: object) -> list[object]:
        """The key of a measured system: its name, ``details``, the corpus and the queries."""
        trial = self.trial
        texts = [[(query.id, query.text) for query in queries] for queries in (trial.queries, trial.probes)]
        own_passages = sorted(
            (query.id, sorted(trial.own_passages.of(query.id)))
            for query in trial.queries
            if trial.own_passages.of(query.id)
        )
        return [name, *details, self.corpus, fingerprint_json([texts, own_passages]), trial.task, trial.top_k]

    def identity(self, model: SearchStudent) -> object:
        """What a student's rankings depend on: its fingerprint, and the weights of the score features in its scores."""
        weights = model.feature_weights(self.trial.task)
        tokens = model.token_fingerprint
        fingerprints = [name for name in (tokens, expansion_fingerprint(model)) if name]
        named = [model.fingerprint, weights.model_dump(mode="json"), *fingerprints]
        return named if weights else model.fingerprint

    def store_parts_for(self, student: SearchStudent) -> None:
        """Store vectors of windows or tokens in a student's index if its score uses them.

        Its inner product, which uses none, shares the index.
        """
        self._part_formats.setdefault(student.fingerprint, {}).update(part_formats(student, self.trial.task))

    def index(self, model: SearchStudent) -> tuple[Index, float | None]:
        """The index of a model, and the passages encoded per second if it had to be built now."""
        dtype, rate = self.settings.dtype, None
        formats, tokens = self._parts_of(model)
        words = expansion_fingerprint(model)
        named = [*formats.values(), *(name for name in (tokens, words) if name)]
        name = "-".join([model.fingerprint, self.corpus, dtype, str(FORMAT_VERSION), *named])
        made = next((index.folder for index in self._of_corpus if self._is_made_by(model, index)), None)
        target = made or self.folder / "indexes" / name
        if not target.exists():
            report = encode(
                self.passages,
                model,
                target,
                vector_format=dtype,
                approximate=False,
                window_vectors=formats.get("window"),
                token_vectors=formats.get("token"),
                runner=self.placement.runner,
                device=self.placement.device,
                load_student=self.placement.load(model),
            )
            rate = report.passages_per_second
        return Index.open(target, model), rate

    def _parts_of(self, model: SearchStudent) -> tuple[Mapping[PartKind, str], str | None]:
        """The formats of the parts in a model's index, and what fingerprint its projection has if tokens count."""
        formats = self._part_formats.get(model.fingerprint, {})
        return formats, model.token_fingerprint if "token" in formats else None

    def unused_indexes(self, models: Sequence[SearchStudent]) -> list[Path]:
        """The given indexes that are not searched for any of the models."""
        used = {index.folder for index in self._of_corpus for model in models if self._is_made_by(model, index)}
        return [index.folder for index in self._given if index.folder not in used]

    def _is_made_by(self, model: SearchStudent, index: Index) -> bool:
        """Whether a given index has what a new one of a model would have."""
        manifest, (formats, tokens) = index.storage.manifest, self._parts_of(model)
        return (
            manifest["student"] == model.fingerprint
            and manifest["vector_format"] == self.settings.dtype
            and all(manifest[f"{kind}_format"] == name for kind, name in formats.items())
            and tokens in (None, manifest["token_projection"])
            and expansion_fingerprint(model) == manifest["document_expansion"]
        )

    @cached_property
    def _of_corpus(self) -> list[Index]:
        """Those of the given indexes that have the passages of the corpus, each encoded on its own, and no others."""
        return [
            index
            for index in self._given
            if index.storage.num_shards is None
            and not (index.chunking is not None and index.chunking.late)
            and len(index) == len(self.passages)
            and fingerprint_passages(index.get(list(self.dataset.passages))) == self.corpus
        ]

    def measure(
        self,
        name: str,
        kind: SystemKind,
        index: Index,
        settings: SearchSettings,
        *,
        view: LocalSegment | None = None,
        trial: Trial | None = None,
        rerank: OpenReranker | None = None,
        passages_per_second: float | None = None,
    ) -> System:
        """Rank by the student of an index.

        ``view`` replaces the index's own view, ``trial`` the queries of all systems. ``passages_per_second`` is the
        encoding speed.
        """
        searched = view or index.unsharded_view
        searcher = Searcher(IndexView(index.storage, [searched]), index.student, settings, rerank=rerank)
        queries = (trial or self.trial).queries
        encoded = None
        if settings.instruction is None:  # workers encode plain queries
            encoded = self._encode(queries, index.student, with_tokens="token" in searcher.weights.part_kinds)
        system = student_system(name, kind, searcher, trial or self.trial, encoded)
        feature_bytes = searched.words.num_bytes if searcher.weights.counts_words else 0
        part_vectors = {"window": searched.windows, "token": searched.tokens}
        feature_bytes += sum(part.num_bytes for kind in searcher.weights.part_kinds if (part := part_vectors[kind]))
        num_cut = index.stats().num_truncated
        notes = (f"{num_cut:,} of {len(self.passages):,} passages were truncated",) if num_cut else ()
        return replace(
            system,
            costs={
                **system.costs,
                "passages_per_second": passages_per_second,
                "bytes_per_passage": searched.format.code_size + feature_bytes / max(len(searched), 1),
            },
            fingerprint=index.student.fingerprint,
            notes=(*system.notes, *notes),
        )

    def _encode(self, queries: Sequence[Query], student: SearchStudent, *, with_tokens: bool) -> EncodedTexts | None:
        """Queries encoded by the workers of a cluster; None if a search encodes them here, as it does if they are few.

        Workers encode them in the same blocks as a search.
        """
        if len(queries) <= ENCODED_AT_ONCE or self.placement.is_here(student):
            return None
        texts = tuple(query.text for query in queries)
        tokens = student.token_fingerprint if with_tokens else None
        key = (student.fingerprint, tokens, texts)
        if key not in self._encoded:
            with (
                progress_bar("encoding queries", len(texts)) as advance,
                self.placement.workers(student, encode_shard) as workers,
            ):
                self._encoded[key] = encode_texts(
                    workers,
                    texts,
                    "query",
                    with_tokens=with_tokens,
                    block=ENCODED_AT_ONCE,
                    advance=advance,
                )
        return self._encoded[key]

    def search_settings(self, num_candidates: int) -> SearchSettings:
        """The search settings of a row: ``num_candidates`` passages get the full score, beside those left out."""
        num_own = self.trial.num_own
        return SearchSettings(
            task=self.trial.task, top_k=self.trial.top_k + num_own, num_candidates=num_candidates + num_own
        )

    @cached_property
    def relevant(self) -> dict[str, frozenset[str]]:
        """The relevant passages of each query."""
        return {query_id: frozenset(ids) for query_id, ids in self.dataset.positives(self.settings.split).items()}

    @cached_property
    def qrels(self) -> dict[str, dict[str, int]]:
        """For each query, the grades of the judged passages that are in the corpus."""
        judged = self.dataset.qrels[self.settings.split]
        return {
            query.id: {p: grade for p, grade in judged[query.id].items() if p in self.dataset.passages}
            for query in self.trial.queries
        }
