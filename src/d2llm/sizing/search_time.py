"""Milliseconds of a search by stage, what an approximate index reads, and how long queries wait for a core."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel, ConfigDict

from d2llm.retrieval.build_ann import MIN_PASSAGES
from d2llm.retrieval.segments import first_depth
from d2llm.sizing.index_bytes import StudentFacts, parts_of_passage
from d2llm.sizing.plan import SizePlan, in_words
from d2llm.sizing.speeds import Speed, Speeds
from d2llm.sizing.texts import TextFacts
from d2llm.store.vector_formats import make_format
from d2llm.store.word_files import SEGMENT_ROWS

_MEDIAN, _SLOWEST = 0.5, 0.99


class AnnFacts(BaseModel):
    """What an approximate index reads to find most of the exact candidates; it depends on the texts.

    Attributes:
        source: where it was measured.
        passages: in an index of so many passages.
        first_ten: fraction of the exact first ten that it found.
        candidates: when so many were searched for.
        visited: so many rows were visited: a search compares those of their neighbours that it did not meet before.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    passages: int
    first_ten: float
    candidates: float
    visited: float

    def visited_at(self, num_passages: int, num_candidates: float) -> float:
        """The rows visited among so many passages; they grow with the logarithm of these, and with the candidates."""
        growth = math.log(num_passages) / math.log(self.passages)
        return min(num_passages, self.visited * growth * max(1.0, num_candidates / self.candidates))


def shipped_ann_facts() -> AnnFacts:
    """Those of the benchmark of a million passages."""
    return AnnFacts.model_validate_json((files("d2llm.sizing") / "ann.json").read_text(encoding="utf-8"))


class MaxScoreFacts(BaseModel):
    """How many of the postings of a query's words BM25 reads to find the best passages; it depends on the texts.

    Attributes:
        source: where it was measured.
        read: the fractions of the postings that are read, after the fraction of all passages that is searched for:
            ascending pairs. All of them are read for all passages.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    read: tuple[tuple[float, float], ...]

    def fraction(self, num_candidates: float, num_passages: float) -> float:
        """The fraction that is read for so many candidates of so many passages, by a power law between the pairs.

        Beyond the least that was measured, the power law of the first two pairs continues.
        """
        wanted, read = np.log(np.array([*self.read, (1.0, 1.0)])).T
        at = math.log(min(1.0, num_candidates / num_passages))
        slope = (read[1] - read[0]) / (wanted[1] - wanted[0])
        return math.exp(read[0] + slope * (at - wanted[0]) if at < wanted[0] else np.interp(at, wanted, read))


@cache
def shipped_maxscore_facts() -> MaxScoreFacts:
    """Those of the benchmark of a million passages."""
    return MaxScoreFacts.model_validate_json((files("d2llm.sizing") / "maxscore.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class StageTime:
    """Median milliseconds of one core for a stage of a search; None if its speed was not measured.

    ``per_shard``: whether every shard does it, or one process for all of them.
    """

    stage: str
    ms: float | None
    basis: str
    per_shard: bool = True


def search_stages(
    plan: SizePlan,
    student: StudentFacts,
    texts: TextFacts,
    speeds: Speeds,
    num_passages: int,
    *,
    num_shards: int = 1,
    ann: AnnFacts | None = None,
) -> list[StageTime]:
    """The stages of a search of ``num_passages`` in each shard, with an approximate index if ``ann`` is given.

    ``texts`` are as long as the plan's. Encoding the query comes first. A shard is asked for little more than its part
    of the proposals of all, and scores its part of the candidates.
    """
    encode = speeds.query_ms
    basis = "not measured for this student" if encode is None else encode.source
    first = StageTime("query", None if encode is None else encode.value, basis, per_shard=False)
    return [first, *_stages(plan, student, texts, speeds, num_passages, num_shards, ann)]


def _stages(
    plan: SizePlan,
    student: StudentFacts,
    texts: TextFacts,
    speeds: Speeds,
    num_passages: int,
    num_shards: int,
    ann: AnnFacts | None,
) -> Iterator[StageTime]:
    of_all = min(plan.num_candidates, num_passages * num_shards)
    candidates = of_all / num_shards
    by_source = math.ceil(of_all / (2 if student.weights.counts_words else 1))  # half by vectors, half by words
    proposed = min(first_depth(by_source, num_shards), num_passages)
    code_size = make_format(plan.vector_format, student.dim).code_size
    weights = student.weights
    if not student.has_dot:
        yield _stage("interaction of every passage", num_passages, "pairs", speeds.interaction_pairs)
    elif ann is None:
        scan = speeds.scan_bytes.get(plan.vector_format)
        yield _stage("scan of all vectors", num_passages * code_size, "bytes", scan)
    else:
        visited = ann.visited_at(num_passages, proposed)
        yield _stage("approximate index", visited, "rows visited", speeds.visited_rows, ann.source)
    if student.has_dot:  # once to rank the proposals, and once for the full score
        products = proposed + (candidates if weights or student.counts_interaction else 0)
        basis = f"{products:,.0f} of {student.dim} dimensions"
        yield _stage(
            "candidates' vectors", products * student.dim, "dimensions", speeds.products.get(plan.vector_format), basis
        )
    if weights.counts_words:
        yield _words(num_passages, proposed, texts, speeds)
    long = texts.of_candidates(counts_words=weights.counts_words)
    if weights.terms.get("window_bm25") or weights.terms.get("window_bm25_fraction"):
        yield _stage("words of candidates' windows", candidates * long.words, "words", speeds.candidate_words)
    for kind in sorted(weights.part_kinds):
        of_format = speeds.products if kind == "window" else speeds.compared_tokens
        num_vectors, dim = candidates * parts_of_passage(kind, student, long), student.part_format(kind).dim
        speed = of_format.get(student.formats[kind])
        basis = f"{num_vectors:,.0f} of {dim} dimensions"
        yield _stage(f"vectors of candidates' {kind}s", num_vectors * dim, "dimensions", speed, basis)
    if student.has_dot and student.counts_interaction:
        yield _stage("interaction", candidates, "pairs", speeds.interaction_pairs)
    result = speeds.result_ms
    yield StageTime("texts of ten results", None if result is None else result.value, _source(result), per_shard=False)


def _words(num_passages: int, num_candidates: float, texts: TextFacts, speeds: Speeds) -> StageTime:
    facts = shipped_maxscore_facts()
    fraction = facts.fraction(num_candidates, num_passages)
    read = fraction * num_passages * texts.query_postings
    basis = f"{fraction:.0%} of the postings: {facts.source}"
    stage = _stage("best passages by words", read, "postings", speeds.postings, basis)
    num_segments = math.ceil(num_passages / SEGMENT_ROWS)
    if stage.ms is None or speeds.segment_ms is None or speeds.words_ms is None:
        return replace(stage, ms=None)
    whole, of_segment = speeds.words_ms.value, speeds.segment_ms.value
    basis = f"{stage.basis}; {num_segments:,} segments, {of_segment:.2g} ms each, and {whole:.2g} ms whatever is found"
    return StageTime(stage.stage, stage.ms + num_segments * of_segment + whole, basis)


def _stage(name: str, amount: float, unit: str, speed: Speed | None, basis: str = "") -> StageTime:
    """The time for so many of something at a speed a second."""
    why = "; ".join(filter(None, [f"{in_words(amount)} {unit}", basis]))
    if speed is None:
        return StageTime(name, None, f"{why}; their speed was not measured")
    return StageTime(name, 1e3 * amount / speed.value, f"{why}, at {in_words(speed.value)} a second: {speed.source}")


def _source(speed: Speed | None) -> str:
    return "not measured" if speed is None else speed.source


def can_approximate(plan: SizePlan, student: StudentFacts, num_passages: int, ann: AnnFacts) -> bool:
    """Whether an approximate index may be used: large enough an index, and no higher recall than it was measured at."""
    return student.has_dot and num_passages >= MIN_PASSAGES and plan.recall <= ann.first_ten


def total_ms(stages: Iterable[StageTime]) -> float:
    """The sum of the stages that are known."""
    return sum(stage.ms for stage in stages if stage.ms is not None)


def slowest_of(num_shards: int, median: float, slow_ratio: float, fraction: float) -> float:
    """The time within which a fraction of the searches has the answers of all shards.

    The times of a shard are taken as log-normal with this median, and a p99 of ``slow_ratio`` medians, and as
    independent.
    """
    spread = math.log(slow_ratio) / NormalDist().inv_cdf(_SLOWEST)
    return median * math.exp(spread * NormalDist().inv_cdf(fraction ** (1 / num_shards)))


def fraction_that_waits(cores: int, busy: float) -> float:
    """The fraction of queries that wait for a free core, if ``busy`` of them are, on average (Erlang's C formula).

    Raises:
        ValueError: all are always busy, so the queue grows without end.
    """
    if busy >= cores:
        raise ValueError(f"{busy:g} busy cores of {cores}")
    lost = 1.0  # Erlang's B, which is recursive in the number of cores
    for num_cores in range(1, cores + 1):
        lost = busy * lost / (num_cores + busy * lost)
    return lost / (1 - busy / cores * (1 - lost))


def wait_ms(cores: int, busy: float, work_ms: float, fraction: float) -> float:
    """The milliseconds within which a fraction of queries has a core, at exponentially distributed times of work."""
    waiting = fraction_that_waits(cores, busy)
    return max(0.0, work_ms / (cores - busy) * math.log(waiting / (1 - fraction))) if waiting else 0.0
