"""Compares a trained student with the one that it started from, and with other systems, on held-out queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from d2llm.data.beir import Dataset
from d2llm.fitting.served_index import ServedIndex
from d2llm.fitting.training_data import part_of
from d2llm.ops.gating import GateTest, better
from d2llm.recipe import untuned_config
from d2llm.retrieval.reading import create_student, encoder_loads

if TYPE_CHECKING:
    from d2llm.evaluation.contenders import Contenders
    from d2llm.evaluation.report import EvaluationReport
    from d2llm.models.student import Student

START_NAME, BASE_NAME = "start, as it is", "start, weights fitted"
"""Names of the row of the student that the fit started from: with its own weights of words and tokens, because there
were too few dev queries, or with weights fitted to these documents."""
TRAINED_NAMES = {False: "trained, weights of the start", True: "trained, weights fitted"}
"""Name of the row of the trained student, by whether its weights were fitted to these documents too."""
MIN_USERS_QUERIES = 30
"""With at least this many held-out queries of users, the verdict is about them alone."""


def compare_students(
    served: ServedIndex,
    datasets: Mapping[str, Dataset],
    base: Path,
    trained: Path | None,
    *,
    with_untuned: bool = True,
) -> tuple[dict[str, EvaluationReport], GateTest | None]:
    """Compare all systems on the test queries of each data set, and test whether the trained student is better.

    Each system is measured once, however often this is called. Each row says what it is (``START_NAME``,
    ``TRAINED_NAMES``). The examples are of the student that is served.

    Args:
        served: the passages.
        datasets: the data sets, by name.
        base: the folder of the student that the training started from, with its weights fitted.
        trained: the folder of the trained student, if there is one.
        with_untuned: also compare with the untuned student, for which the corpus is encoded once more.
    """
    from d2llm.evaluation.evaluate import evaluate
    from d2llm.evaluation.retrieval import about_row
    from d2llm.evaluation.settings import EvaluationSettings

    start, fitted = served.load(base), None if trained is None else served.load(trained)
    base_name = BASE_NAME if is_weighted(start, served) else START_NAME
    subject = base_name if fitted is None else TRAINED_NAMES[is_weighted(fitted, served)]
    contenders = _contenders(served, start, base, fitted, trained, base_name, with_untuned=with_untuned)
    indexes = [served.index_of(student) for student in (base, trained) if student is not None]
    # The start's weights, and the trained student's, were fitted on this very data set.
    settings = EvaluationSettings(task=served.task, latency_queries=10, seed=served.settings.seed, score_parts=False)
    reports = {
        name: evaluate(
            dataset,
            contenders,
            settings,
            work_folder=served.folder.measured,
            indexes=indexes,
            runner=served.runner,
            device=served.device,
        ).renamed(_row_names(subject))
        for name, dataset in datasets.items()
    }
    if fitted is None:
        return reports, None
    verdict = _verdict(served, datasets, reports, base_name, subject)
    if not verdict.passed:
        reports = {name: about_row(report, base_name, datasets[name]) for name, report in reports.items()}
    return reports, verdict


def is_weighted(student: Student, served: ServedIndex) -> bool:
    """Whether the weights of a student's score were fitted here: those that it has are not the start's."""
    fitted, start = (one.score_features.tasks.get(served.task) for one in (student, served.load(served.start)))
    return fitted is not None and (start is None or fitted.inherited() != start.inherited())


def _contenders(
    served: ServedIndex,
    start: Student,
    base: Path,
    fitted: Student | None,
    trained: Path | None,
    base_name: str,
    *,
    with_untuned: bool,
) -> Contenders:
    from d2llm.evaluation.contenders import Contenders

    loads = encoder_loads(start, served.loader(base))
    untuned = None
    if with_untuned:
        config = untuned_config(start.config)
        load_untuned = partial(create_student, config, device=served.device, dtype=served.dtype)
        untuned = load_untuned()
        loads = {**encoder_loads(untuned, load_untuned), **loads}
    if fitted is not None and trained is not None:
        loads |= encoder_loads(fitted, served.loader(trained))
    return Contenders(
        student=fitted or start,
        untuned=untuned,
        bi_encoders={} if fitted is None else {base_name: start},
        why_missing={} if with_untuned else {"cosine_untuned": "there was no time to encode the documents with it"},
        loads=loads,
    )


def _verdict(
    served: ServedIndex,
    datasets: Mapping[str, Dataset],
    reports: Mapping[str, EvaluationReport],
    before: str,
    after: str,
) -> GateTest:
    """Whether one row is better than another; queries about the same part of a document count as one, because they
    are not independent.
    """
    users = reports.get("users")
    decisive = [users] if users is not None and users.num_items >= MIN_USERS_QUERIES else list(reports.values())
    part_of_passage = {passage.id: part_of(passage) for passage in served.passages}
    groups = {
        f"{dataset.name}:{query_id}": part_of_passage[passage_ids[0]]
        for dataset in datasets.values()
        for query_id, passage_ids in dataset.positives("test").items()
    }
    return better(_values(decisive, before), _values(decisive, after), groups=groups, seed=served.settings.seed)


def _values(reports: Sequence[EvaluationReport], name: str) -> dict[str, float]:
    """The main measure of a row, by data set and query."""
    return {
        f"{report.dataset}:{item}": value
        for report in reports
        for item, value in zip(report.details.item_ids, report.details.values[name][report.main_measure], strict=True)
    }


def _row_names(student: str) -> dict[str, str]:
    """Names of rows of an evaluation -> their names in a fit, where there are several students."""
    from d2llm.evaluation.contenders import NAME_BM25, NAME_D2LLM, NAME_DOT

    hybrid = f"hybrid: {NAME_BM25} + "
    return {
        NAME_D2LLM: student,
        NAME_DOT: f"{student}: vectors alone",
        hybrid + NAME_D2LLM: hybrid + student,
    }
