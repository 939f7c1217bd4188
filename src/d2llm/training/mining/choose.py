"""Chooses negatives from lists: the order of the candidates, the filters for likely positives, and the sampling.

Used by ``mine`` and by mining again during training (``remine``).
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.data.same_text import SameText, jaccard, shingles
from d2llm.recipe import MiningConfig
from d2llm.recipe.data import NegativeCandidate, Sampling
from d2llm.training.mining.ranking import EncoderRanking, Lists
from d2llm.training.mining.teacher import TeacherCheck


def key_of(*values: object) -> bytes:
    """A hash of the parts that is the same in every process."""
    return hashlib.sha256(":".join(map(str, values)).encode()).digest()


def random_of(*values: object) -> random.Random:
    """A random generator that depends only on the parts."""
    return random.Random(key_of(*values))


def order_candidates(
    ranked: Mapping[str, Sequence[str]],
    forbidden: Collection[str],
    num_skipped: int,
    sampling: Sampling,
    rng: random.Random,
) -> list[NegativeCandidate]:
    """All candidates of a query in the order in which they are tried; hard negatives are the first that pass.

    ``ranked`` has each source's list, best first, cut at the end of the range; the ``num_skipped`` passages at the top
    of each, not counting ``forbidden`` ones, are not candidates. The result does not depend on the order of the
    sources.
    """
    ranks: dict[str, dict[str, int]] = {}
    skipped: set[str] = set()
    for source, passage_ids in ranked.items():
        allowed = [passage_id for passage_id in passage_ids if passage_id not in forbidden]
        # A passage skipped at the top of one list is skipped altogether, whatever its rank in another list.
        skipped.update(allowed[:num_skipped])
        for rank, passage_id in enumerate(allowed):
            ranks.setdefault(passage_id, {})[source] = rank
    pool = [NegativeCandidate(passage_id, ranks[passage_id]) for passage_id in sorted(ranks.keys() - skipped)]
    return list(sampling.order(pool, rng))


def draw_easy(corpus: Sequence[str], forbidden: Collection[str], num_easy: int, rng: random.Random) -> list[str]:
    """``num_easy`` random passages of the corpus (sorted ids), in random order."""
    # Draw enough that ``num_easy`` remain even if every forbidden passage is among them.
    drawn = rng.sample(range(len(corpus)), min(len(corpus), num_easy + len(forbidden)))
    return [corpus[row] for row in drawn if corpus[row] not in forbidden][:num_easy]


REASONS = {
    "near_duplicate": "text nearly the same as that of a positive (likeness above the limit)",
    "relative_margin": "the encoder scores it as high as a positive",
    "teacher_margin": "the teacher scores it as relevant as a positive",
}
"""Why a candidate may be a positive, as the audit explains it; each is a setting of ``[mining]``."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A candidate dropped as a likely positive: ``value`` (likeness, score or log-odds) is above ``limit``."""

    candidate: NegativeCandidate
    reason: str
    value: float
    limit: float


@dataclass
class Selection:
    """One query's candidates in the order in which they are tried, and those kept and dropped."""

    query: Query
    positives: tuple[str, ...]
    candidates: Sequence[NegativeCandidate]
    judged_negative: Collection[str]
    """Passages that the data set itself judges not relevant; no check drops them."""
    index: int
    """Position of the query among those that are mined."""
    forbidden: Collection[str]
    """Passages that are not candidates: the relevant ones, those with the same text as one, and the query itself."""
    num_tried: int = 0
    kept: list[NegativeCandidate] = field(default_factory=list[NegativeCandidate])
    dropped: list[Dropped] = field(default_factory=list[Dropped])


CandidateCheck = Callable[[Selection, NegativeCandidate], Dropped | None]
"""Returns why a candidate is dropped, or None."""


def select(
    blocks: Sequence[Sequence[Selection]],
    num_hard: int,
    checks: Sequence[CandidateCheck],
    teacher: TeacherCheck | None,
) -> None:
    """Try the candidates of some queries until each has ``num_hard`` negatives or no candidate is left.

    Each round proposes as many candidates as are still missing, so that the teacher scores many pairs at once, and few
    that are not needed. The pairs of a block are scored in one call.
    """
    unfinished = [list(block) for block in blocks]
    while unfinished:
        proposed = [
            [(item, _propose(item, num_hard - len(item.kept), checks)) for item in block] for block in unfinished
        ]
        if teacher is not None:
            teacher.score(
                [
                    [
                        (item.query, item.positives + tuple(c.passage_id for c in candidates))
                        for item, candidates in block
                        if candidates
                    ]
                    for block in proposed
                ]
            )
        for item, candidates in chain.from_iterable(proposed):
            for candidate in candidates:
                drop = None if teacher is None else _teacher_drop(teacher, item, candidate)
                if drop is None:
                    item.kept.append(candidate)
                else:
                    item.dropped.append(drop)
        rest = [[item for item in block if _lacks_negatives(item, num_hard)] for block in unfinished]
        unfinished = [block for block in rest if block]


def _lacks_negatives(item: Selection, num_hard: int) -> bool:
    """Whether a query needs more negatives and has candidates that were not tried."""
    return len(item.kept) < num_hard and item.num_tried < len(item.candidates)


def near_duplicate_check(passages: Mapping[str, Passage], threshold: float) -> CandidateCheck:
    """A check that drops candidates whose likeness to a positive's text is above ``threshold`` (see ``jaccard``)."""
    positive_shingles: dict[str, list[frozenset[str]]] = {}

    def check(item: Selection, candidate: NegativeCandidate) -> Dropped | None:
        if item.query.id not in positive_shingles:
            positive_shingles.clear()  # queries are checked one after another
            positive_shingles[item.query.id] = [shingles(passages[passage_id].text) for passage_id in item.positives]
        candidate_shingles = shingles(passages[candidate.passage_id].text)
        value = max(jaccard(candidate_shingles, other) for other in positive_shingles[item.query.id])
        return Dropped(candidate, "near_duplicate", value, threshold) if value > threshold else None

    return check


def relative_margin_check(ranking: EncoderRanking, margin: float) -> CandidateCheck:
    """A check that drops candidates with a score above mean - margin * |mean|, the mean being over the positives."""
    limits: dict[str, float] = {}

    def check(item: Selection, candidate: NegativeCandidate) -> Dropped | None:
        if item.query.id not in limits:
            limits.clear()
            mean = float(np.mean(ranking.scores(item.index, item.positives)))
            limits[item.query.id] = mean - margin * abs(mean)
        [value] = ranking.scores(item.index, [candidate.passage_id]).tolist()
        limit = limits[item.query.id]
        return Dropped(candidate, "relative_margin", value, limit) if value > limit else None

    return check


def _propose(item: Selection, num_missing: int, checks: Sequence[CandidateCheck]) -> list[NegativeCandidate]:
    proposed: list[NegativeCandidate] = []
    while len(proposed) < num_missing and item.num_tried < len(item.candidates):
        candidate = item.candidates[item.num_tried]
        item.num_tried += 1
        trusted = candidate.passage_id in item.judged_negative
        drop = None if trusted else next((drop for check in checks if (drop := check(item, candidate))), None)
        if drop is None:
            proposed.append(candidate)
        else:
            item.dropped.append(drop)
    return proposed


def _teacher_drop(teacher: TeacherCheck, item: Selection, candidate: NegativeCandidate) -> Dropped | None:
    limit = teacher.limit(item.query.id, item.positives)
    value = teacher.log_odds(item.query.id, candidate.passage_id)
    if value is None or limit is None or candidate.passage_id in item.judged_negative or value <= limit:
        return None
    return Dropped(candidate, "teacher_margin", value, limit)


_QUERIES_AT_ONCE = 32  # number of queries whose candidates the teacher scores in one call


@dataclass(frozen=True)
class Ranked:
    """The lists of each source, and the encoder of the encoder's list."""

    lists: Mapping[str, Lists]
    encoder: EncoderRanking | None = None
    encoder_name: str = "cosine"


class DatasetJudgements:
    """The data set's own judgements of a query's passages, in any split."""

    def __init__(self, dataset: Dataset, same_text: SameText) -> None:
        self._same_text = same_text
        self._own_passages = dataset.own_passages
        self._relevant: dict[str, set[str]] = {}
        self._refused: dict[str, set[str]] = {}
        for qrels in dataset.qrels.values():
            for query_id, grades in qrels.items():
                for passage_id, grade in grades.items():
                    if passage_id not in dataset.passages:
                        continue
                    kind = self._relevant if grade > 0 else self._refused
                    kind.setdefault(query_id, set()).add(passage_id)

    def relevant(self, query_id: str, positives: Sequence[str]) -> set[str]:
        """Passages that the data set judges relevant, in any split; ``positives`` are the plan's."""
        return self._relevant.get(query_id, set()) | set(positives)

    def repeats(self, query_id: str, positives: Sequence[str]) -> set[str]:
        """Other passages with the same text as a relevant one."""
        return self._same_text.duplicates_of(self.relevant(query_id, positives))

    def own_passages(self, query_id: str) -> frozenset[str]:
        """Passages that are the query itself (``data.same_text``)."""
        return self._own_passages.of(query_id)

    def negative(self, query_id: str) -> set[str]:
        """Passages that the data set judges not relevant."""
        return self._refused.get(query_id, set()) - self._relevant.get(query_id, set())


def choose(
    dataset: Dataset,
    queries: Sequence[Query],
    positives: Mapping[str, tuple[str, ...]],
    judged: DatasetJudgements,
    ranked: Ranked,
    config: MiningConfig,
    *,
    seeds: tuple[object, ...],
    teacher: TeacherCheck | None,
    record: Callable[[Selection, Mapping[str, Mapping[str, float]]], None] | None = None,
) -> Iterator[Selection]:
    """Yield the hard negatives of each query, in the order of the queries, which is also that of the lists.

    The draw of a query depends on ``seeds`` and its id. The teacher scores candidates for its margin. ``record`` is
    called with each query's selection and the scores of its passages, by scorer and passage id.
    """
    checks: list[CandidateCheck] = []
    if config.near_duplicate < 1:
        checks.append(near_duplicate_check(dataset.passages, config.near_duplicate))
    if config.relative_margin is not None:
        if ranked.encoder is None:
            raise InputError("mining.relative_margin needs an encoder's scores; add 'encoder' to mining.sources")
        checks.append(relative_margin_check(ranked.encoder, config.relative_margin))

    def begin(index: int, query: Query) -> Selection:
        query_positives = positives[query.id]
        forbidden = (
            judged.relevant(query.id, query_positives)
            | judged.repeats(query.id, query_positives)
            | judged.own_passages(query.id)
        )
        candidates = order_candidates(
            {source: lists[index] for source, lists in ranked.lists.items()},
            forbidden,
            config.range_min,
            config.sampling,
            random_of(*seeds, query.id),
        )
        return Selection(query, query_positives, candidates, judged.negative(query.id), index, forbidden)

    num_together = _QUERIES_AT_ONCE * (1 if teacher is None else teacher.num_together)
    try:
        for first in range(0, len(queries), num_together):
            together = [begin(index, query) for index, query in enumerate(queries[first : first + num_together], first)]
            selections = [
                together[start : start + _QUERIES_AT_ONCE] for start in range(0, len(together), _QUERIES_AT_ONCE)
            ]
            select(selections, config.num_hard, checks, teacher)
            for item in together:
                if record is not None:
                    record(item, _scores(item, ranked, teacher))
                if teacher is not None:
                    teacher.keep(item.query.id, (*item.positives, *(c.passage_id for c in item.kept)))
                yield item
    finally:
        if teacher is not None:
            teacher.close()


@contextmanager
def work_folder(work: Path | None) -> Generator[Path]:
    """A folder for working files: ``work``, created if missing, or else a temporary folder."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    # On Windows a file that is still mapped cannot be deleted; it is left to the system's clean-up.
    with tempfile.TemporaryDirectory(prefix="d2llm-mine-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _scores(item: Selection, ranked: Ranked, teacher: TeacherCheck | None) -> dict[str, dict[str, float]]:
    """The scores by encoder and teacher of the positives, and of the kept and dropped candidates."""
    negatives = [c.passage_id for c in item.kept] + [drop.candidate.passage_id for drop in item.dropped]
    ids = [*item.positives, *negatives]
    scores: dict[str, dict[str, float]] = {}
    if ranked.encoder is not None:
        scores[ranked.encoder_name] = dict(zip(ids, ranked.encoder.scores(item.index, ids).tolist(), strict=True))
    if teacher is not None:
        labelled = ((passage_id, teacher.log_odds(item.query.id, passage_id)) for passage_id in ids)
        scores["teacher"] = {passage_id: value for passage_id, value in labelled if value is not None}
    return scores
