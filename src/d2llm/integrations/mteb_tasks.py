"""What mteb's tasks are to a student: which branch of the IEM they ask for, and which of their measures sees it."""

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
"""Type of an mteb task -> branch of the IEM. In tasks of other types the IEM takes no part."""

DUPLICATE_QUESTIONS = (
    "AskUbuntuDupQuestions",
    "CQADupstack",
    "MultilingualNanoQuora",
    "NanoQuora",
    "Quora",
    "StackOverflowDupQuestions",
)
"""How the names of retrieval and reranking tasks begin that look for the same question: symmetric ones."""

OWN_SIMILARITY: Mapping[str, str] = {
    "cosine_spearman": "spearman",
    "cosine_pearson": "pearson",
    "max_ap": "similarity_ap",
    "max_accuracy": "similarity_accuracy",
    "max_f1": "similarity_f1",
}
"""mteb's main measure of pair tasks -> the same one of the model's own score."""


PAIR_TYPES = ("PairClassification", "STS")
"""Types of the tasks that ask for a score of each pair."""


def branch_of(task_metadata: TaskMetadata, overrides: Mapping[str, Task]) -> Task:
    """The branch of the IEM for an mteb task: by its name, then by its type."""
    name = task_metadata.name
    if name in overrides:
        return overrides[name]
    if name.startswith(DUPLICATE_QUESTIONS):
        return "symmetric"
    return TASK_OF_TYPE.get(task_metadata.type, "asymmetric")


def scores_with_interaction(results: ModelResult, tasks: Iterable[AbsTask]) -> dict[str, float]:
    """Each task's main measure, taken from the student's own score where mteb's main one is of the bare vectors.

    mteb's main measure of STS is the cosine's; that of pair classification is the best of five similarities, picked
    on the test data. ``OWN_SIMILARITY`` names what stands here instead. Averages over splits and subsets as mteb's.

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
