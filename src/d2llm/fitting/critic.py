"""Chooses, among the queries that a writer wrote, those worth learning from, and says why the others are not.

First come rules that need no model (``fitting.critic``) and repeated queries. Then a round trip: a search for the
query must find the passage that it was written for among the first results, or the query fits too many passages, or
none (Dai et al., "Promptagator", ICLR 2023). The search counts words, even if the student's score does not yet: queries
kept by the cosine alone would say that words count for little. Passages that say the same as that passage count as
relevant too. A teacher, if there is one, reads the query with its passage and with the best other results: those that
it finds at least as relevant become positives as well, and a query that it finds unanswered is left out (Lee et al.,
"Gecko", 2024).

A query stands for what a user would type who has not seen the passage. A copy of its words is found by any search and
teaches nothing; "What does the author say?" is found by none.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from d2llm.core.errors import OutOfTimeError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.time_limit import time_limit
from d2llm.core.types import Passage, Query, Task
from d2llm.data.labels import LabelStore
from d2llm.data.same_text import comparable, jaccard, shingles
from d2llm.evaluation.pool_scores import PoolScores, score_pool
from d2llm.fitting.settings import CriticSettings
from d2llm.fitting.write_queries import DraftStore, passage_hash
from d2llm.models.teachers.pair_teacher import PairTeacher, ranks_lists
from d2llm.models.writers.answers import split_task
from d2llm.models.writers.writer import QUERY_KINDS, QueryKind
from d2llm.ops.words import fold, runs
from d2llm.retrieval.feature_weights import weights_for
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings
from d2llm.runners.placement import HERE, Placement

QueryFault = Literal["empty", "too short", "too long", "copied", "about the text", "other script"]
"""Why a query is not used: it has no words, too few or too many, repeats the passage word for word, asks about "the
passage" instead of its subject, or is in a script that the passage does not have."""

MIN_UNITS, MAX_UNITS = 2, 60
"""Minimum and maximum number of words of a query; in scripts without spaces, of characters (at most twice as many)."""
COPIED_UNITS, COPIED_FRACTION = 6, 0.8
"""A query is a copy if a run of so many words, and of at least this fraction of its words, is in the passage."""

_ABOUT_THE_TEXT = re.compile(
    r"\b(this|the|given|above|following|provided) (passage|text|article|document|paragraph|authors?|excerpt)\b"
    r"|\b(this|the above|the following|the given) (section|snippet|context|study|paper)\b"
    r"|\b(dieser|diesem|der|im) (text|artikel|abschnitt|autor)\b|\b(ce|cet|le|l') ?(texte|article|passage|auteur)\b"
    r"|\b(este|el) (texto|artículo|pasaje|autor)\b|本文|文中|这段|這段|上文|文章|作者|この文章|이 글|본문",
    re.IGNORECASE,
)


def query_fault(query: str, passage: str) -> QueryFault | None:
    """The first rule that a query written for a passage breaks, or None."""
    units, is_unspaced = _units(query)
    passage_units, passage_is_unspaced = _units(passage)
    if not units:
        return "empty"
    if len(units) < MIN_UNITS:
        return "too short"
    if len(units) > MAX_UNITS * (2 if is_unspaced else 1):
        return "too long"
    if _ABOUT_THE_TEXT.search(query) and not _ABOUT_THE_TEXT.search(passage):
        return "about the text"
    if is_unspaced and not passage_is_unspaced:
        return "other script"
    longest = _longest_shared_run(units, passage_units)
    if longest >= COPIED_UNITS and longest >= COPIED_FRACTION * len(units):
        return "copied"
    return None


def _units(text: str) -> tuple[list[str], bool]:
    """The words of a text, of some scripts its characters (``ops.words``), and whether it is in one without spaces."""
    folded = fold(text)
    found = list(runs(folded))
    return [folded[start:end] for run in found for start, end in run.words], any(not run.is_spaced for run in found)


def _longest_shared_run(query: list[str], passage: list[str]) -> int:
    """The length of the longest run of units that both have."""
    matcher: Callable[..., SequenceMatcher[str]] = SequenceMatcher
    return matcher(None, passage, query, autojunk=False).find_longest_match().size


DATASET = "written"
"""Name of the data set that written queries make up."""
_BM25_WEIGHT = 0.5  # of a search that fuses the ranks of the score and of BM25


class WrittenQuery(NamedTuple):
    """A query with the kind asked for, the passage that it was written for, and the task that was written with it."""

    text: str
    kind: QueryKind
    passage_id: str
    instruction: str | None = None

    @property
    def id(self) -> str:
        """Its id: the same whenever the same text is written for the same passage."""
        return f"w-{fingerprint_json([self.passage_id, self.text])}"


@dataclass(frozen=True, slots=True)
class KeptQuery:
    """A query to learn from: ``positives`` begin with the passage that it was written for, found at ``rank``."""

    written: WrittenQuery
    positives: tuple[str, ...]
    rank: int
    log_odds: float | None = None


@dataclass(frozen=True, slots=True)
class RejectedQuery:
    """A query that is left out. ``reason`` is one of a few, for counting; ``detail`` is about this query."""

    written: WrittenQuery
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Review:
    """What the critic kept and rejected.

    Of those kept, the teacher had no time to read ``num_unscored``, and gave no grade to the own passages of
    ``num_ungraded``.
    """

    kept: tuple[KeptQuery, ...] = ()
    rejected: tuple[RejectedQuery, ...] = ()
    num_unscored: int = 0
    num_ungraded: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])


def review_queries(
    drafts: DraftStore,
    passages: Sequence[Passage],
    index: Index,
    *,
    task: Task = "asymmetric",
    teacher: PairTeacher | None = None,
    label_store: Path | None = None,
    seconds: float = math.inf,
    settings: CriticSettings | None = None,
    placement: Placement = HERE,
) -> Review:
    """Review every query written for the passages of a corpus.

    Drafts of passages that are no longer in the corpus are not looked at. ``index`` is the corpus's, which searches for
    the queries. A ``teacher`` reads queries with their passages for so many ``seconds``; queries that it has not read
    by then are kept without its scores. What it said is kept in ``label_store``, which is required with a teacher, so
    that a call that was interrupted need not ask again. ``placement``: where it scores.
    """
    chosen = settings or CriticSettings()
    by_id = {passage.id: passage for passage in passages}
    rejected: list[RejectedQuery] = []
    candidates = list(_pass_rules(_written(drafts, passages), by_id, rejected))
    retrieved, kept = _round_trips(candidates, index, task, chosen.depth), list[KeptQuery]()
    for written, ranking in zip(candidates, retrieved, strict=True):
        if written.passage_id not in ranking:
            reason = f"not found again among the first {chosen.depth}"
            rejected.append(RejectedQuery(written, "not found again", reason))
            continue
        alike = _same_texts(by_id[written.passage_id], (by_id[name] for name in ranking), chosen.same_text)
        rank = 1 + ranking.index(written.passage_id)
        kept.append(KeptQuery(written, (written.passage_id, *alike), rank))
    num_unscored = num_ungraded = 0
    if teacher is not None and label_store is not None:
        rankings = dict(zip((written.id for written in candidates), retrieved, strict=True))
        pool = _pool(kept, rankings, chosen.num_scored)
        if ranks_lists(teacher):  # a single passage cannot be ranked
            pool = {name: ids for name, ids in pool.items() if len(ids) > 1}
        scored = _ask_teacher(teacher, pool, kept, by_id, task, label_store, seconds, placement)
        log_odds = {
            query_id: {name: value for name, value in values.items() if name not in scored.ungraded.get(query_id, ())}
            for query_id, values in scored.scores.items()
        }
        num_unscored = len(pool) - len(log_odds)
        passage_of = {query.written.id: query.written.passage_id for query in kept}
        num_ungraded = sum(passage_of[query_id] not in values for query_id, values in log_odds.items())
        minimum = -math.inf if ranks_lists(teacher) else chosen.min_log_odds
        kept = list(_answered(kept, log_odds, minimum, rejected))
    general = [query for query in kept if len(query.positives) > chosen.max_positives]
    rejected += [
        RejectedQuery(query.written, "too general", f"{len(query.positives)} passages answer it") for query in general
    ]
    kept = [query for query in kept if len(query.positives) <= chosen.max_positives]
    reasons = Counter(query.reason for query in rejected)
    return Review(tuple(kept), tuple(rejected), num_unscored, num_ungraded, dict(reasons.most_common()))


def _written(drafts: DraftStore, passages: Iterable[Passage]) -> Iterator[WrittenQuery]:
    for passage in passages:
        text_hash = passage_hash(passage)
        for kind in QUERY_KINDS:
            draft = drafts.get((text_hash, kind))
            for text in draft.queries if draft is not None else ():
                instruction, query = split_task(text)
                yield WrittenQuery(query, kind, passage.id, instruction)


def _pass_rules(
    queries: Iterable[WrittenQuery], passages: Mapping[str, Passage], rejected: list[RejectedQuery]
) -> Iterator[WrittenQuery]:
    """The queries that break no rule; a text that was written before, for any passage, is a repetition."""
    seen: set[str] = set()
    for query in queries:
        passage = passages[query.passage_id]
        fault = query_fault(query.text, passage.full_text)
        if fault is not None:
            rejected.append(RejectedQuery(query, fault))
        elif (form := comparable(query.text)) in seen:
            rejected.append(RejectedQuery(query, "repeated", "the same query was written before"))
        else:
            seen.add(form)
            yield query


def _round_trips(queries: Sequence[WrittenQuery], index: Index, task: Task, depth: int) -> list[list[str]]:
    """The first results of a search for each query.

    It is by the student's score if that counts words, or else by its ranks and those of BM25 together.
    """
    if not queries:
        return []
    hybrid = None if weights_for(index.view, index.student, task).counts_words else _BM25_WEIGHT
    searcher = Searcher(index.view, index.student, SearchSettings(task=task, top_k=depth, hybrid=hybrid))
    rankings = searcher.rank_ids([Query(query.id, query.text) for query in queries], title="searching for the queries")
    return [[passage_id for passage_id, _ in ranking.passages] for ranking in rankings]


def _same_texts(passage: Passage, others: Iterable[Passage], threshold: float) -> list[str]:
    passage_shingles = shingles(passage.text)
    return [
        other.id
        for other in others
        if other.id != passage.id and jaccard(passage_shingles, shingles(other.text)) >= threshold
    ]


def _pool(kept: Sequence[KeptQuery], rankings: Mapping[str, Sequence[str]], num_others: int) -> dict[str, list[str]]:
    """query_id -> the passages that the teacher reads: its own, and the first others of the search."""
    pool: dict[str, list[str]] = {}
    for query in kept:
        others = [name for name in rankings[query.written.id] if name not in query.positives]
        pool[query.written.id] = [query.written.passage_id, *others[:num_others]]
    return pool


def _ask_teacher(
    teacher: PairTeacher,
    pool: Mapping[str, Sequence[str]],
    kept: Sequence[KeptQuery],
    passages: Mapping[str, Passage],
    task: Task,
    label_store: Path,
    seconds: float,
    placement: Placement,
) -> PoolScores:
    """What the teacher says about those queries that it had time to read."""
    score = partial(
        score_pool,
        teacher,
        query_texts={query.written.id: query.written.text for query in kept},
        passage_texts={name: passages[name].full_text for names in pool.values() for name in names},
        task=task,
        dataset=DATASET,
        store=label_store,
        title="the teacher reads the queries",
        placement=placement,
    )
    try:
        with time_limit(seconds):
            return score(pool)
    except OutOfTimeError:
        key = {"teacher": teacher.fingerprint, "prompt": teacher.prompt_fingerprint(task), "dataset": DATASET}
        labels = LabelStore(label_store, **key)
        return score({name: ids for name, ids in pool.items() if not labels.missing(name, ids)})


def _answered(
    kept: Sequence[KeptQuery],
    log_odds: Mapping[str, Mapping[str, float]],
    minimum: float,
    rejected: list[RejectedQuery],
) -> Iterator[KeptQuery]:
    """The queries that the teacher finds answered, with the positives that it adds, and those it has not read."""
    for query in kept:
        values = log_odds.get(query.written.id, {})
        passage_log_odds = values.get(query.written.passage_id)
        if passage_log_odds is None:
            yield query
            continue
        if passage_log_odds < minimum:
            rejected.append(
                RejectedQuery(query.written, "not answered", f"the teacher's log-odds are {passage_log_odds:.1f}")
            )
            continue
        added = [name for name, value in values.items() if name not in query.positives and value >= passage_log_odds]
        yield KeptQuery(query.written, (*query.positives, *added), query.rank, passage_log_odds)
