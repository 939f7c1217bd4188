"""Mines again during training, with the student's current ranking as the source of hard negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingPlan, TrainingSource
from d2llm.data.same_text import SameText
from d2llm.models.protocols import SearchStudent
from d2llm.recipe import MiningConfig
from d2llm.training.mining.choose import DatasetJudgements, Ranked, Selection, choose, work_folder
from d2llm.training.mining.ranking import EncoderRanking, Lists
from d2llm.training.mining.teacher import TeacherCheck


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
