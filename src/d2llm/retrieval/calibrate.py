"""The ``calibrate`` verb: measure the error of a student's scores against a teacher's, for rerankers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import check_kind
from d2llm.core.types import Task
from d2llm.data.python_records import QueryLike
from d2llm.models.protocols import SearchStudent
from d2llm.models.score_features import FeatureWeights
from d2llm.models.teachers.pair_teacher import RANKING_TEACHER, PairTeacher, ranks_lists
from d2llm.ops.rereading import StudentError, calibrate_error
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import SearchSettings
from d2llm.store.index_manifest import read_errors, write_errors
from d2llm.store.shards import Storage


def measure_error(
    index: IndexView,
    student: SearchStudent,
    teacher: PairTeacher,
    queries: Iterable[QueryLike] | QueryLike,
    *,
    task: Task | None = None,
    depth: int = 50,
    num_passages: int = 10,
) -> StudentError:
    """Measure a student's error against a teacher on its own search results. Needs queries, but no qrels.

    Args:
        index: an index that the student made.
        student: ranks the passages.
        teacher: it reads ``num_passages`` of each query's first ``depth``, evenly spaced.
        queries: queries similar to those expected; about 40 are enough.
        task: the task; None means the index's task.
        depth: how many of the student's top passages a reranker may read.
        num_passages: passages per query, at least 2.

    Raises:
        InputError: there are too few queries or passages, the student's scores do not increase with the teacher's, or
            the teacher ranks lists.
    """
    check_kind(teacher, "teacher", PairTeacher)
    if ranks_lists(teacher):
        raise InputError(RANKING_TEACHER)
    search_task: Task = task or index.task
    pairs: list[tuple[str, str]] = []
    scores: list[float] = []
    names: list[str] = []
    searcher = Searcher(index, student, SearchSettings(top_k=depth, task=search_task))
    for position, ranking in enumerate(searcher.rank(queries)):
        passages = ranking.passages
        for rank in np.unique(np.linspace(0, len(passages) - 1, min(num_passages, len(passages))).astype(np.int64)):
            pairs.append((ranking.query.text, passages[rank].passage.full_text))
            scores.append(passages[rank].score)
            names.append(str(position))
    return calibrate_error(scores, teacher.score_pairs(pairs, search_task).log_odds, names)


def write_error(
    storage: Storage,
    teacher: PairTeacher,
    task: Task,
    error: StudentError,
    score_features: FeatureWeights | None = None,
) -> None:
    """Store an error in the manifest of an index, for this teacher and task; those of other teachers are kept.

    ``score_features`` holds the feature weights used in the scores (``weights_for``); each set of weights has its own
    error.

    Raises:
        IndexLockedError: another process is writing.
    """
    with storage.locked():
        write_errors(storage.folder, {_key(teacher, task, score_features): asdict(error)})


def read_error(
    folder: Path, teacher: PairTeacher, task: Task, score_features: FeatureWeights | None = None
) -> StudentError:
    """The error that ``write_error`` stored.

    Raises:
        InputError: no error is stored for this teacher, task and score features, or the teacher ranks lists.
        DamagedFileError: the index's manifest is damaged.
    """
    if ranks_lists(teacher):
        raise InputError(RANKING_TEACHER)
    error = read_errors(folder).get(_key(teacher, task, score_features))
    if error is None:
        raise InputError(
            f"{folder}: the error of its student, with its current scores, against this teacher ({task}) has not been "
            "measured; measure it with "
            "`d2llm index INDEX calibrate --teacher NAME --queries FILE`"
        )
    return StudentError(**error)


def _key(teacher: PairTeacher, task: Task, score_features: FeatureWeights | None) -> str:
    key = f"{teacher.fingerprint} {teacher.prompt_fingerprint(task)} {task}"
    return f"{key} {fingerprint_json(score_features.model_dump(mode='json'))}" if score_features else key
