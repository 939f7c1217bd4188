"""The verb ``label``: lets the teacher score every pair of the training plans that has no label yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.data.collation import LabelledSource
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingSource, check_sources
from d2llm.evaluation.pool_scores import (
    Budget,
    LabelWriter,
    QueryPairs,
    ScoringCounts,
    label_pairs,
    label_pool,
    score_shard,
    with_rate,
)
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import asks_endpoint, identify_teacher, load_teacher, ranks_lists
from d2llm.ops.ranking import kendall_tau
from d2llm.ops.robust_sampling import draw, label_gains, robust_probabilities
from d2llm.ops.selection import ids_at
from d2llm.recipe import LabellingConfig, TeacherConfig, TeacherIdentity
from d2llm.runners.placement import find_runner, load_work
from d2llm.runners.runner import Runner

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelReport:
    """The result of a labelling run.

    ``pairs`` were scored in this run. ``finished_pairs`` already had labels, and ``finished_queries`` already had all
    of theirs. ``num_truncated`` pairs were truncated to the teacher's length limit. With a remote teacher,
    ``num_bounded`` log-odds are only a bound, ``num_undecided`` pairs got no answer, ``written_tokens`` are those of
    its answers, and ``cost`` is in the currency of its prices. ``ended_by`` is the limit that ended the labelling
    before all of the ``unfinished_pairs`` were scored, None if there are none.
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
    written_tokens: int = 0
    cost: float = 0.0
    unfinished_pairs: int = 0
    ended_by: str | None = None


def label(
    sources: Sequence[TrainingSource],
    store: Path,
    *,
    teacher: TeacherConfig,
    settings: LabellingConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    runner: str | Runner = "local",
) -> LabelReport:
    """Label the positives, hard and easy negatives of every query in the plans, and store the features' Gram matrices.

    Labels are stored by (teacher, prompt, query_id, passage_id), in shards that are written every half minute: an
    interrupted run continues where it stopped, and the order of a plan does not matter. If a query has new positives or
    hard negatives, all its pairs are scored again, because the Gram matrix needs the features of all of them; if only
    its easy negatives are new, only those are scored. A teacher without features gives no Gram matrices. A teacher that
    ranks lists scores all pairs of a query again if any is new, because it compares only the passages of one list.
    Memory holds the data, the plan, the labels that existed at the start, and those since the last shard.

    Args:
        sources: data sets with their plans and tasks.
        store: folder of the label store; created if missing.
        teacher: the LLM, tuned or not, and its prompt.
        settings: if a data set has a limit of queries to label, those are labelled whose passages
            ``compared_students`` rank most differently (``disagreements``), that ``mistaken_student`` gets wrong most
            surely (``mistakes``), or at which ``unsure_student`` is unsure (``robust_sample``), instead of a random
            sample; and limits of time, tokens and cost, at which labelling ends after the pairs that are being scored.
        device: where to compute; by default the best device available.
        dtype: number format; by default the fastest on that device.
        runner: where the teacher scores: in this process (``local``), or on the workers of a Ray cluster (``ray``,
            ``ray:ADDRESS``, or a ``RayRunner``), which load it from the same path. The pairs of a call to the teacher
            are the same, and this process alone writes the store.

    Raises:
        InputError: two data sets cannot be distinguished (see ``check_sources``), a shard cannot be written (disk
            full), or there is no such runner or cluster; the earlier shards are kept, and the next run continues from
            there.
        ModelError: some of the teacher's log-odds are not numbers, or workers end again and again.
        MismatchError: a worker has other versions than this process, or another teacher at this path.
    """
    started = time.monotonic()
    runner = _runner_for(teacher, runner)
    check_sources(sources)
    settings = settings or LabellingConfig()
    sources = _most_wanted_first(sources, settings, device=device, dtype=dtype)
    identity, whole = identify_teacher(teacher), ranks_lists(teacher)
    work = [(source, _labels_of(source, store, identity)) for source in sources]
    left = [
        (len(_unfinished(labels, entry, whole=whole).passage_ids), len(entry.passage_ids))
        for source, labels in work
        for entry in source.entries_to_label
    ]
    num_pairs, num_queries = sum(count for count, _ in left), sum(count > 0 for count, _ in left)
    counts, budget = ScoringCounts(), Budget(settings, started)
    if num_pairs:
        load = partial(load_teacher, teacher, device=device, dtype=dtype)
        load = partial(load_work, load, identity.fingerprint, score_shard)
        workers = runner.workers(load, device=device, gpus=teacher.num_gpus)
        with progress_bar("labelling pairs", num_pairs) as advance, workers as opened:
            for source, labels in work:
                queries = (_unfinished(labels, entry, whole=whole) for entry in source.entries_to_label)
                label_pairs(
                    opened,
                    budget.spend((query for query in queries if query.passage_ids), counts),
                    LabelWriter(labels, remember=False),  # each query occurs only once in a plan
                    source.task,
                    query_text=source.query_text,
                    passage_text=source.passage_text,
                    advance=with_rate(advance, counts),
                    counts=counts,
                )
    seconds = time.monotonic() - started
    return LabelReport(
        store=str(store),
        teacher=identity.fingerprint,
        queries=num_queries,
        pairs=counts.pairs,
        finished_queries=len(left) - num_queries,
        num_truncated=counts.truncated,
        tokens=counts.tokens,
        seconds=seconds,
        pairs_per_second=counts.pairs / seconds,
        num_bounded=counts.bounded,
        num_undecided=counts.undecided,
        finished_pairs=sum(total for _, total in left) - num_pairs,
        written_tokens=counts.written_tokens,
        cost=counts.cost,
        unfinished_pairs=num_pairs - counts.pairs,
        ended_by=budget.ended_by,
    )


class TeacherOnDemand:
    """Lets a teacher score more pairs in training; it is loaded when first needed.

    The ``limits`` are those of all its calls together; a call raises an ``InputError`` if one is reached.
    """

    def __init__(
        self, teacher: TeacherConfig, limits: LabellingConfig, *, device: str | None, dtype: str | None
    ) -> None:
        self._load = partial(load_teacher, teacher, device=device, dtype=dtype)
        self._limits, self._teacher = limits, None
        self._spent, self._seconds = ScoringCounts(), 0.0

    def __call__(self, labelled: LabelledSource, passages: Mapping[str, Sequence[str]]) -> None:
        """Score the passages (query_id -> passage ids) that have no label yet."""
        source, before, name = labelled.source, self._spent, labelled.source.dataset.name
        missing = {query_id: labelled.labels.missing(query_id, ids) for query_id, ids in passages.items()}
        num_missing = sum(map(len, missing.values()))
        if not num_missing:
            return
        self._teacher = self._teacher or self._load()
        started = time.monotonic() - self._seconds
        budget = Budget(self._limits, started)
        self._spent = label_pool(
            self._teacher,
            missing,
            labelled.labels,
            source.task,
            query_text=source.query_text,
            passage_text=source.passage_text,
            title=f"labelling pairs of {name}",
            budget=budget,
            earlier=before,
        )
        self._seconds = time.monotonic() - started
        num_scored = self._spent.pairs - before.pairs
        for what, count in (
            ("were truncated for the teacher", self._spent.truncated - before.truncated),
            ("got no answer from the teacher and count as undecided", self._spent.undecided - before.undecided),
        ):
            if count:
                _log.warning("%s: %d of %d pairs scored in training %s", name, count, num_scored, what)
        if budget.ended_by is not None:
            raise InputError(
                f"{name}: {num_missing - num_scored:,} of {num_missing:,} pairs that the teacher is to score in "
                f"training have no label yet, because {budget.ended_by} was reached. Labels and progress are kept: run "
                "the same command again to go on, or raise the limit"
            )


def disagreements(source: TrainingSource, first: Student, second: Student) -> dict[str, float]:
    """How differently two students rank the positives and hard negatives of each query of a plan.

    The value is (1 - Kendall's tau_b) / 2: 0 for the same order, 1 for the reverse; 0 for a single passage.
    """
    values: dict[str, float] = {}
    others = _list_scores(source, second)
    for query_id, scores in _list_scores(source, first).items():
        tau = kendall_tau(scores, others[query_id]) if len(scores) > 1 else 1.0
        values[query_id] = (1 - tau) / 2
    return values


def mistakes(source: TrainingSource, student: Student) -> dict[str, float]:
    """How far a student scores a hard negative of each query of a plan above all its positives; below 0: it is right.

    The hard negatives of PGKD: examples that the student gets wrong although it is sure. Di Palo et al.,
    "Performance-Guided LLM Knowledge Distillation", EMNLP 2024 (arXiv 2411.05045), where a language model writes more
    examples like them; here the teacher labels them first.
    """
    positives = {entry.query_id: len(entry.positives) for entry in source.plan.entries}
    return {
        query_id: max(scores[positives[query_id] :], default=-inf) - max(scores[: positives[query_id]])
        for query_id, scores in _list_scores(source, student).items()
    }


def robust_sample(source: TrainingSource, student: Student, count: int, *, teacher_errors: float) -> list[str]:
    """``count`` queries of a plan at which a student is unsure, drawn so that a teacher's errors harm least.

    Baykal et al., "Robust Active Distillation", ICLR 2023 (arXiv 2210.01213): a query's gain is 1 minus the margin
    between the student's two most probable classes, here positives and hard negatives of the query's list. The draw
    depends on nothing but the data set's name and the student.
    """
    gains: dict[str, float] = {}
    for query_id, scores in sorted(_list_scores(source, student).items()):
        exponentials = np.exp(np.array(scores) - max(scores))
        gains[query_id] = label_gains(exponentials / exponentials.sum())
    probabilities = robust_probabilities(np.array([*gains.values()]), count, teacher_errors * len(gains))
    drawn = draw(probabilities, np.random.default_rng([*source.dataset.name.encode()]))
    return ids_at([*gains], drawn)


def _list_scores(source: TrainingSource, student: Student) -> dict[str, list[float]]:
    """A student's scores of the positives, then of the hard negatives, of each query of a plan."""
    entries = source.plan.entries
    passage_ids = sorted({name for entry in entries for name in entry.positives + entry.hard_negatives})
    row_of = {name: row for row, name in enumerate(passage_ids)}
    passages = student.encode_passages([source.passage_text(name) for name in passage_ids]).vectors
    queries = student.encode_queries([source.query_text(entry.query_id) for entry in entries]).vectors
    scores: dict[str, list[float]] = {}
    for query, entry in zip(queries, entries, strict=True):
        rows = [row_of[name] for name in entry.positives + entry.hard_negatives]
        scores[entry.query_id] = student.score(query, passages[rows], source.task).tolist()
    return scores


def _most_wanted_first(
    sources: Sequence[TrainingSource], settings: LabellingConfig, *, device: str | None, dtype: str | None
) -> Sequence[TrainingSource]:
    """The sources, each with the queries first that are to be labelled first, where the settings choose some."""
    names = settings.compared_students or (settings.mistaken_student or settings.unsure_student,)
    students = [Student.load(name, device=device, dtype=dtype) for name in names if name is not None]
    if not students:
        return sources
    ordered: list[TrainingSource] = []
    for source in sources:
        if source.max_labelled is None or source.max_labelled >= len(source.plan.entries):
            ordered.append(source)  # all of it will be labelled
            continue
        if settings.unsure_student:
            (student,), count = students, source.max_labelled
            first = robust_sample(source, student, count, teacher_errors=settings.teacher_errors)
        else:
            values = disagreements(source, *students) if settings.compared_students else mistakes(source, *students)
            first = sorted(values, key=lambda name: (-values[name], name))
        ordered.append(replace(source, label_first=tuple(first)))
    return ordered


def _runner_for(teacher: TeacherConfig, runner: str | Runner) -> Runner:
    found = find_runner(runner)
    if not found.is_local and asks_endpoint(teacher):
        raise InputError("a remote teacher answers at the speed of its endpoint, so workers do not help; label locally")
    return found


def _labels_of(source: TrainingSource, store: Path, identity: TeacherIdentity) -> LabelStore:
    prompt, dataset = identity.prompts[source.task], source.dataset.name
    return LabelStore(store, teacher=identity.fingerprint, prompt=prompt, dataset=dataset)


def _unfinished(labels: LabelStore, entry: PlanEntry, *, whole: bool) -> QueryPairs:
    """The passages of one query that still have to be scored; all of them if they are scored as a ``whole``."""
    listed = entry.positives + entry.hard_negatives
    # A query with labels but no Gram matrix was scored by a teacher without features, so it will never have cosines.
    has_no_features = bool(labels.log_odds(entry.query_id)) and labels.gram(entry.query_id) is None
    if not has_no_features and labels.missing_cosines(entry.query_id, listed):
        return QueryPairs(entry.query_id, entry.passage_ids, len(listed))
    missing = tuple(labels.missing(entry.query_id, entry.passage_ids))
    return QueryPairs(entry.query_id, entry.passage_ids if whole and missing else missing)
