"""The verb ``mine``: chooses the hard and easy negatives of each training query; ``remine`` does again in training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import progress_bar
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
from d2llm.data.same_text import OwnCounts, SameText
from d2llm.models.protocols import SearchStudent, TextEncoder
from d2llm.recipe import MiningConfig
from d2llm.retrieval.cosine import CosineStudent
from d2llm.runners.placement import HERE, Placement
from d2llm.store.bm25 import bm25_lists
from d2llm.training.mining.audit import Audit
from d2llm.training.mining.choose import (
    DatasetJudgements,
    Ranked,
    Selection,
    choose,
    draw_easy,
    key_of,
    random_of,
    work_folder,
)
from d2llm.training.mining.ranking import EncoderRanking, Lists
from d2llm.training.mining.teacher import TeacherCheck

_log = logging.getLogger(__name__)
_NUM_SHOWN = 5
_NUM_EXAMPLES = 3
_LISTED = ("without_positives", "shared_positive", "not_sampled", "too_few_hard", "too_few_easy")
_NUM_QUERIES_SHOWN = 20  # queries shown with their texts in the audit


@dataclass(frozen=True)
class MiningResult:
    """The plan's entries in the order of the qrels file, a report of counts and seconds, and the audit's content."""

    entries: list[PlanEntry]
    report: dict[str, Any]
    audit: dict[str, Any]


@dataclass
class _Tally:
    """Counts for the report."""

    queries: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in _LISTED})
    same_text: int = 0
    own_passages: OwnCounts = field(default_factory=OwnCounts)
    seconds: dict[str, float] = field(default_factory=dict[str, float])


def mine(
    dataset: Dataset,
    split: str,
    config: MiningConfig,
    *,
    encoder: TextEncoder | None,
    student: SearchStudent | None = None,
    teacher: TeacherCheck | None = None,
    task: Task = "asymmetric",
    seed: int,
    max_queries: int | None = None,
    exclude_passages_of: Sequence[str] = ("dev", "test"),
    work: Path | None = None,
    placement: Placement = HERE,
) -> MiningResult:
    """Choose hard and easy negatives for the queries of a split.

    Candidates for hard negatives are the union of ranges of two lists, BM25's and the encoder's, without the query's
    positives (in any split), passages with the same text as a positive, and passages that are the query itself
    (``data.same_text``). They are tried in the order given by ``config.sampling``. Likely positives are dropped
    (``config.near_duplicate``, ``relative_margin``, ``teacher_margin``), unless the data set itself judges them not
    relevant, and the first ``num_hard`` that pass are used. Easy negatives are drawn from the rest of the corpus. A
    query's draw depends on the seed, its id and the corpus, not on the order of files or on which other queries are
    mined.

    Args:
        dataset: passages, queries and judgements.
        split: the split to train on.
        config: numbers of negatives, ranges, sampling and filters.
        encoder: ranks by its cosine; without it and ``student``, only BM25 is used.
        student: ranks by its full score, instead of ``encoder``.
        teacher: scores candidates for ``config.teacher_margin``.
        task: the task, which decides the branch of the student's interaction.
        seed: seed of the draws and of the sample of queries.
        max_queries: mine a random sample of this many queries (a larger sample contains a smaller one).
        exclude_passages_of: leave out queries that share a positive with a query of these splits, so that dev and test
            passages have never been positives in training. The passages are still used as negatives.
        work: a folder that keeps the passages' vectors, so that an interrupted run, or another draw, need not encode
            them again; by default a temporary one.
        placement: where texts are encoded: in this process, or by the workers of a cluster; ``teacher`` has its own.

    Raises:
        InputError: there is no query to mine for or no list to mine from, or a teacher's margin is set without a
            teacher.
        ModelError: some of the encoder's vectors or the teacher's log-odds are not finite.
    """
    start = time.perf_counter()
    if config.teacher_margin is not None and teacher is None:
        raise InputError("mining.teacher_margin is set, but no teacher was given; remove the margin or give a teacher")
    tally = _Tally()
    positives = _eligible(dataset, split, exclude_passages_of, tally)
    if max_queries is not None and len(positives) > max_queries:
        chosen = set(sorted(positives, key=lambda query_id: key_of(seed, query_id))[:max_queries])
        tally.queries["not_sampled"] = [query_id for query_id in positives if query_id not in chosen]
        positives = {query_id: ids for query_id, ids in positives.items() if query_id in chosen}
    queries = [dataset.queries[query_id] for query_id in positives]
    corpus = sorted(dataset.passages)
    ranker = student or (None if encoder is None else CosineStudent(encoder))
    shown = sorted(positives, key=lambda query_id: key_of(seed, "audit", query_id))[:_NUM_QUERIES_SHOWN]
    with work_folder(work) as folder:
        ranked = _rank(
            dataset,
            corpus,
            queries,
            config,
            ranker,
            folder,
            task=task,
            name="cosine" if student is None else "student",
            resumable=work is not None,
            placement=placement,
            tally=tally,
        )
        audit = Audit(dataset.passages, list(ranked.lists), frozenset(shown))
        begin = time.perf_counter()
        judged = DatasetJudgements(dataset, SameText(dataset.passages))
        tally.own_passages = dataset.own_passages.counts(positives)
        tally.same_text = sum(len(judged.repeats(query_id, ids)) for query_id, ids in positives.items())
        selections = choose(
            dataset, queries, positives, judged, ranked, config, seeds=(seed,), teacher=teacher, record=audit.add
        )
        with progress_bar("choosing", len(queries)) as advance:
            entries: list[PlanEntry] = []
            for item in selections:
                entries.append(_entry(item, corpus, config, seed, tally))
                advance(1)
        tally.seconds["choosing"] = time.perf_counter() - begin
        del ranked, selections  # closes the memory map of the vectors before their folder is deleted
    tally.seconds["total"] = time.perf_counter() - start
    return MiningResult(entries, _report(dataset, split, entries, tally, audit, teacher), audit.to_json())


def _entry(item: Selection, corpus: Sequence[str], config: MiningConfig, seed: int, tally: _Tally) -> PlanEntry:
    """The hard negatives that were chosen for a query, with easy ones from the rest of the corpus."""
    query_id, hard = item.query.id, tuple(candidate.passage_id for candidate in item.kept)
    no_easy = {*item.forbidden, *hard, *(drop.candidate.passage_id for drop in item.dropped)}
    easy = draw_easy(corpus, no_easy, config.num_easy, random_of(seed, "easy", query_id))
    if len(hard) < config.num_hard:
        tally.queries["too_few_hard"].append(query_id)
    if len(easy) < config.num_easy:
        tally.queries["too_few_easy"].append(query_id)
    return PlanEntry(query_id, item.positives, hard, tuple(easy))


def _rank(
    dataset: Dataset,
    corpus: Sequence[str],
    queries: Sequence[Query],
    config: MiningConfig,
    ranker: SearchStudent | None,
    folder: Path,
    *,
    task: Task,
    name: str,
    resumable: bool,
    placement: Placement,
    tally: _Tally,
) -> Ranked:
    """Make the lists, cut at the end of their ranges."""
    lists: dict[str, Lists] = {}
    encoder: EncoderRanking | None = None
    # One after the other, so that BM25's index is freed before the vectors are computed.
    if "bm25" in config.sources:
        begin = time.perf_counter()
        lists["bm25"] = bm25_lists(dataset.passages, corpus, queries, config.range_max)
        tally.seconds["bm25"] = time.perf_counter() - begin
    if "encoder" in config.sources and ranker is not None:
        encoder = EncoderRanking(
            ranker,
            dataset.passages,
            corpus,
            queries,
            task=task,
            folder=folder,
            resumable=resumable,
            placement=placement,
        )
        tally.seconds["encoding"] = encoder.encoding_seconds
        begin = time.perf_counter()
        lists[name] = encoder.lists(config.range_max)
        tally.seconds[name] = time.perf_counter() - begin
    if not lists:
        raise InputError("there is no list to mine from: mining.sources has only the encoder, but none was given")
    return Ranked(lists, encoder, name)


def _eligible(
    dataset: Dataset, split: str, exclude_passages_of: Sequence[str], tally: _Tally
) -> dict[str, tuple[str, ...]]:
    """The positives of the queries of ``split`` that can be trained on."""
    others = [other for other in exclude_passages_of if other != split]
    unread = [other for other in others if other not in dataset.qrels]
    if unread:
        _log.warning(
            "%s: queries that share positives with %s are not left out, because these splits were not read",
            dataset.name,
            ", ".join(unread),
        )
    eligible = dataset.unshared_positives(split, [other for other in others if other in dataset.qrels])
    for query_id, positives in dataset.positives(split).items():
        if query_id not in eligible:
            tally.queries["shared_positive" if positives else "without_positives"].append(query_id)
    if not eligible:
        raise InputError(
            f"{dataset.path}: split '{split}' has no query to mine for. Of {len(dataset.qrels[split])} in its qrels, "
            f"{len(tally.queries['without_positives'])} have no relevant passage in the corpus, and "
            f"{len(tally.queries['shared_positive'])} share one with {' or '.join(others) or 'no other split'}; "
            "to keep these, set exclude_shared_passages = false in the recipe (in Python, exclude_passages_of=())"
        )
    return eligible


def _report(
    dataset: Dataset,
    split: str,
    entries: Sequence[PlanEntry],
    tally: _Tally,
    audit: Audit,
    teacher: TeacherCheck | None,
) -> dict[str, Any]:
    return {
        "dataset": dataset.name,
        "split": split,
        "num_judged_queries": len(dataset.qrels[split]),
        "num_unknown_queries": sum(query_id not in dataset.queries for query_id in dataset.qrels[split]),
        "num_entries": len(entries),
        "num_positives": sum(len(entry.positives) for entry in entries),
        "num_hard_negatives": sum(len(entry.hard_negatives) for entry in entries),
        "num_easy_negatives": sum(len(entry.easy_negatives) for entry in entries),
        "num_same_text_as_positive": tally.same_text,
        "num_own_passages": tally.own_passages.num_left_out,
        "num_own_passages_judged_relevant": tally.own_passages.num_judged,
        "num_dropped": audit.num_dropped,
        "hard_negatives_from": dict(sorted(audit.hard_from.items())),
        "teacher": {
            "scored": teacher.counts.pairs if teacher else 0,
            "truncated": teacher.counts.truncated if teacher else 0,
            "without_label": audit.num_without_label if teacher else 0,
        },
        "queries": {name: {"count": len(ids), "first": ids[:_NUM_SHOWN]} for name, ids in tally.queries.items()},
        "examples": [_example(dataset, entry) for entry in entries[:_NUM_EXAMPLES]],
        "issues": list(dataset.issues),
        "seconds": {name: round(seconds, 3) for name, seconds in tally.seconds.items()},
    }


def _example(dataset: Dataset, entry: PlanEntry) -> dict[str, str | None]:
    hard = entry.hard_negatives[0] if entry.hard_negatives else None
    return {
        "query_id": entry.query_id,
        "query": dataset.queries[entry.query_id].text,
        "positive": dataset.passages[entry.positives[0]].full_text,
        "hard_negative": None if hard is None else dataset.passages[hard].full_text,
    }


def remine(
    source: TrainingSource,
    student: SearchStudent,
    config: MiningConfig,
    *,
    seed: int,
    epoch: int,
    labels: LabelStore | None = None,
    only_labelled: bool = False,
    same_text: SameText | None = None,
    folder: Path | None = None,
) -> TrainingSource:
    """Draw new hard negatives for a plan, from the student's ranking of the corpus.

    Queries, positives and their order do not change. Hard negatives are drawn from the configured range of the
    student's list with the given sampling and filters; if there are too few for a query, its earlier ones are used too.
    Easy negatives are kept, except those that are hard negatives now. The draw of a query depends only on the seed, the
    epoch, its id, the corpus and the student.

    ``labels`` are the teacher's, for ``teacher_margin`` (only stored labels are used) and for ``only_labelled``, which
    draws only from the query's labelled passages: every negative then has a label, and only labelled passages are
    encoded. Otherwise, new negatives have no labels until ``label`` is run. ``same_text`` is the data set's index of
    equal texts, if there is one already; ``folder`` is for the passages' vectors, by default a temporary one.

    Returns:
        The source with a new plan, whose manifest has the seed, the epoch and the number of new hard negatives under
        "remined"; labelled pairs are returned unchanged, because the pairs are the plan.

    Raises:
        InputError: ``only_labelled`` or a teacher's margin is set, but ``labels`` is not given.
        ModelError: one of the student's vectors is not finite.
    """
    if source.pairs is not None:
        return source
    if labels is None and (only_labelled or config.teacher_margin is not None):
        raise InputError("mining again from labelled passages, or with a teacher's margin, needs the label store")
    dataset, entries = source.dataset, source.plan.entries
    queries = [dataset.queries[entry.query_id] for entry in entries]
    labelled = [sorted(labels.log_odds(entry.query_id)) for entry in entries] if labels and only_labelled else None
    corpus = sorted(dataset.passages)
    if labelled is not None:  # and the positives, whose scores the filters need
        corpus = sorted({*chain(*labelled), *chain.from_iterable(entry.positives for entry in entries)})
    judged = DatasetJudgements(dataset, same_text or SameText(dataset.passages))
    positives = {entry.query_id: entry.positives for entry in entries}
    with work_folder(folder) as work:
        ranking = EncoderRanking(
            student, dataset.passages, corpus, queries, task=source.task, folder=work, resumable=False
        )
        depth = config.range_max
        lists = ranking.lists(depth) if labelled is None else _lists_of(ranking, labelled, depth)
        teacher = None
        if labels is not None and config.teacher_margin is not None:
            teacher = TeacherCheck(labels, None, source.task, config.teacher_margin, dataset.passages)
        selections = choose(
            dataset,
            queries,
            positives,
            judged,
            Ranked({"student": lists}, ranking, "student"),
            config,
            seeds=(seed, epoch),
            teacher=teacher,
        )
        renewed = [_renew(entry, item, config.num_hard) for entry, item in zip(entries, selections, strict=True)]
        del ranking, selections  # closes the memory map of the vectors before their folder is deleted
    num_new = sum(
        len(set(new.hard_negatives) - set(old.hard_negatives)) for new, old in zip(renewed, entries, strict=True)
    )
    content = [[e.query_id, e.positives, e.hard_negatives, e.easy_negatives] for e in renewed]
    remined = {"seed": seed, "epoch": epoch, "num_new": num_new}
    manifest = source.plan.manifest | {"content_hash": fingerprint_json(content), "remined": remined}
    return replace(source, plan=TrainingPlan(tuple(renewed), manifest))


def _renew(entry: PlanEntry, item: Selection, num_hard: int) -> PlanEntry:
    hard = tuple(candidate.passage_id for candidate in item.kept)
    excluded = {*hard, *(drop.candidate.passage_id for drop in item.dropped)}
    earlier = [passage_id for passage_id in entry.hard_negatives if passage_id not in excluded]
    hard += tuple(earlier[: max(0, num_hard - len(hard))])
    easy = tuple(passage_id for passage_id in entry.easy_negatives if passage_id not in hard)
    return PlanEntry(entry.query_id, entry.positives, hard, easy)


def _lists_of(ranking: EncoderRanking, labelled: Sequence[Sequence[str]], top_k: int) -> Lists:
    """Rank each query's labelled passages, best first, ties by id."""
    lists: Lists = []
    for index, ids in enumerate(labelled):
        order = np.argsort(-ranking.scores(index, ids), kind="stable").tolist() if ids else []  # ids are sorted
        lists.append([ids[int(row)] for row in order[:top_k]])
    return lists
