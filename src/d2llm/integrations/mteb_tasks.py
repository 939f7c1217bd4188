"""How mteb's tasks relate to a student: which branch of the IEM they use, and which of their measures reflects it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from d2llm.core.types import Task

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.results import ModelResult

TASK_OF_TYPE: Mapping[str, Task] = {
    "Retrieval": "asymmetric",
    "Reranking": "asymmetric",
    "InstructionRetrieval": "asymmetric",
    "InstructionReranking": "asymmetric",
    "PairClassification": "symmetric",
    "STS": "symmetric",
}
"""Type of an mteb task -> branch of the IEM. Tasks of other types do not use the IEM."""

DUPLICATE_QUESTIONS = (
    "AskUbuntuDupQuestions",
    "CQADupstack",
    "MultilingualNanoQuora",
    "NanoQuora",
    "Quora",
    "StackOverflowDupQuestions",
)
"""Prefixes of the names of retrieval and reranking tasks that look for duplicate questions: these are symmetric."""

OWN_SIMILARITY: Mapping[str, str] = {
    "cosine_spearman": "spearman",
    "cosine_pearson": "pearson",
    "max_ap": "similarity_ap",
    "max_accuracy": "similarity_accuracy",
    "max_f1": "similarity_f1",
}
"""mteb's main measure of pair tasks -> the same measure of the model's own score."""


PAIR_TYPES = ("PairClassification", "STS")
"""Types of tasks that need a score for each pair."""


def branch_of(task_metadata: TaskMetadata, overrides: Mapping[str, Task]) -> Task:
    """The branch of the IEM for an mteb task, chosen by its name, then by its type."""
    name = task_metadata.name
    if name in overrides:
        return overrides[name]
    if name.startswith(DUPLICATE_QUESTIONS):
        return "symmetric"
    return TASK_OF_TYPE.get(task_metadata.type, "asymmetric")


def scores_with_interaction(results: ModelResult, tasks: Iterable[AbsTask]) -> dict[str, float]:
    """Each task's main measure, computed from the student's own score where mteb's main measure uses only the vectors.

    mteb's main measure of STS uses the cosine; that of pair classification is the best of five similarities, picked on
    the test data. ``OWN_SIMILARITY`` names the measures used here instead. Averages over splits and subsets are those
    of mteb.

    Returns:
        name of the task -> value; tasks without a result are left out.
    """
    main = {task.metadata.name: task.metadata.main_score for task in tasks}
    return {
        result.task_name: result.get_score(getter=lambda scores, key=main[result.task_name]: _own(scores, key))
        for result in results.task_results
        if result.task_name in main
    }


def _own(scores: Mapping[str, Any], main_score: str) -> float:
    return float(scores[OWN_SIMILARITY.get(main_score, "main_score")])
