"""Mining again during training: the student's own ranking says which negatives are hard now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.recipe import MiningConfig
from d2llm.data.labels import LabelStore
from d2llm.data.plan import PlanEntry, TrainingPlan
from d2llm.data.same_text import SameText
from d2llm.data.training import TrainingSource
from d2llm.retrieval.protocols import SearchStudent
from d2llm.training.mining.audit import Audit
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
    show_progress: bool | None = None,
) -> TrainingSource:
    """Draw the hard negatives of a plan anew, from the student's ranking of the corpus.

    Queries, positives and their order stay. Hard negatives are drawn from the encoder's range of the student's list
    with the plan's sampling and filters; a query with too few is filled up with its earlier ones. Easy negatives stay,
    but for one that is a hard negative now. The draw of a query depends on the seed, the epoch, its id, the corpus and
    the student alone.

    Args:
        source: the data set with its plan; one of labelled pairs is given back as it is, since its pairs are the plan.
        student: ranks by its full score; training may go on with it afterwards.
        config: numbers, the encoder's range, sampling and filters.
        seed: seed of the draws.
        epoch: of the draws.
        labels: what the teacher said, for ``teacher_margin`` (stored labels alone) and ``only_labelled``.
        only_labelled: draw from the query's labelled passages alone, so that every negative has its label and only
            labelled passages are encoded. Without, new negatives have none until ``label`` makes them.
        same_text: that of the data set, if there is one already.
        folder: for the file of the passages' vectors; by default the system's folder for temporary files.
        show_progress: None shows progress if standard error is a terminal.

    Returns:
        The source with another plan; its manifest names seed, epoch and how many hard negatives are new ("remined").

    Raises:
        InputError: ``only_labelled`` or a teacher's margin without ``labels``.
        ModelError: the student gave a vector that is not finite.
    """
    if source.pairs is not None:
        return source
    if labels is None and (only_labelled or config.teacher_margin is not None):
        raise InputError("mining anew from labelled passages, or with a teacher's margin, needs the label store")
    dataset, entries = source.dataset, source.plan.entries
    queries = [dataset.queries[entry.query_id] for entry in entries]
    labelled = [sorted(labels.log_odds(entry.query_id)) for entry in entries] if labels and only_labelled else None
    corpus = sorted(dataset.passages) if labelled is None else _union(labelled, entries)
    judged = DatasetJudgements(dataset, same_text or SameText(dataset))
    positives = {entry.query_id: entry.positives for entry in entries}

    def forbidden(query_id: str) -> set[str]:
        return judged.relevant(query_id, positives[query_id]) | judged.repeats(query_id, positives[query_id])

    first_rank, depth = config.range_min, config.range_max
    with work_folder(folder) as work:
        ranking = EncoderRanking(
            student,
            dataset.passages,
            corpus,
            queries,
            task=source.task,
            folder=work,
            resumable=False,
            show_progress=show_progress,
        )
        lists = ranking.lists(depth) if labelled is None else _lists_of(ranking, labelled, depth)
        teacher = None
        if labels is not None and config.teacher_margin is not None:
            teacher = TeacherCheck(labels, None, source.task, config.teacher_margin, dataset.passages)
        selections = choose(
            dataset,
            queries,
            positives,
            forbidden,
            judged,
            Ranked({"student": lists}, {"student": first_rank}, ranking, "student"),
            config,
            seeds=(seed, epoch),
            teacher=teacher,
            audit=Audit(dataset.passages, ["student"], frozenset()),
        )
        renewed = [_renew(entry, item, config.num_hard) for entry, item in zip(entries, selections, strict=True)]
        del ranking, selections  # and with them the map of the vectors, before their folder goes
    num_new = sum(
        len(set(new.hard_negatives) - set(old.hard_negatives)) for new, old in zip(renewed, entries, strict=True)
    )
    return _with_plan(source, renewed, {"seed": seed, "epoch": epoch, "num_new": num_new})


def _renew(entry: PlanEntry, item: Selection, num_hard: int) -> PlanEntry:
    hard = tuple(candidate.passage_id for candidate in item.kept)
    not_again = {*hard, *(drop.candidate.passage_id for drop in item.dropped)}
    earlier = [passage_id for passage_id in entry.hard_negatives if passage_id not in not_again]
    hard += tuple(earlier[: max(0, num_hard - len(hard))])
    easy = tuple(passage_id for passage_id in entry.easy_negatives if passage_id not in hard)
    return PlanEntry(entry.query_id, entry.positives, hard, easy)


def _with_plan(source: TrainingSource, entries: Sequence[PlanEntry], remined: dict[str, int]) -> TrainingSource:
    content = [[e.query_id, e.positives, e.hard_negatives, e.easy_negatives] for e in entries]
    manifest = source.plan.manifest | {"content_hash": fingerprint_json(content), "remined": remined}
    return TrainingSource(
        source.dataset, TrainingPlan(tuple(entries), manifest), source.task, source.max_labelled, source.pairs
    )


def _union(labelled: Sequence[Sequence[str]], entries: Sequence[PlanEntry]) -> list[str]:
    """All labelled passages, and the positives, whose scores the filters ask for."""
    of_queries = (passage_id for of_query in labelled for passage_id in of_query)
    return sorted({*of_queries, *(passage_id for entry in entries for passage_id in entry.positives)})


def _lists_of(ranking: EncoderRanking, labelled: Sequence[Sequence[str]], top_k: int) -> Lists:
    """Each query's own passages, best first, ties by id."""
    lists: Lists = []
    for place, ids in enumerate(labelled):
        order = np.argsort(-ranking.scores(place, ids), kind="stable").tolist() if ids else []  # ids are in order
        lists.append([ids[int(row)] for row in order[:top_k]])
    return lists
