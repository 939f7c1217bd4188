"""Short messages to a bank (``messages.toml``), four for each request, which the demo groups by meaning.

The interaction of the shipped students was trained on messages like these (BANKING77), but not on these: they were
written for the demo before any system had ranked them, and are not adapted to the results. Similar requests (a lost
card and a stolen one, a transfer that is late and one that failed) make the task hard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.toml import read_toml
from d2llm.core.types import Passage, Task
from d2llm.demo.report import DemoAnswer, MessageReport, MessageSystem, top_results
from d2llm.models.interaction import Interaction
from d2llm.models.protocols import SearchStudent
from d2llm.models.student import Student
from d2llm.ops.significance import paired_randomisation
from d2llm.retrieval.cosine import DotStudent

TOP_K = 3
"""The number of other messages with the same request."""
MAX_GAINED, MAX_LOST = 2, 1
"""The number of examples shown."""
_WITHOUT = "D2LLM without its interaction"

MESSAGES: dict[str, list[str]] = read_toml(Path(__file__).with_name("messages.toml"))
"""Request -> its four messages."""


def messages() -> list[Passage]:
    """The messages as passages; the title is the request, the id the request with a number ("card lost 2")."""
    return [
        Passage(f"{request} {position}", text, request)
        for request, texts in MESSAGES.items()
        for position, text in enumerate(texts, start=1)
    ]


def request_of(answer: DemoAnswer) -> str:
    """The request of an example's message."""
    return answer.right_ids[0].rpartition(" ")[0]


def interaction_weight(student: Student, task: Task) -> float:
    """Weight of the interaction in a student's score, chosen on its dev data; 0 if it has no interaction."""
    head = student.interaction
    if not isinstance(head, Interaction):
        return 0.0
    return float(head.interaction_weight(task)) if head.has_dot else 1.0


def rank_messages(student: Student, cosine: SearchStudent) -> MessageReport:
    """Rank all other messages for each message, and count how many of the first three make the same request.

    Args:
        student: scores in the symmetric task, with and without its interaction.
        cosine: the untuned baseline.
    """
    passages = messages()
    request = np.unique([message.title for message in passages], return_inverse=True)[1]
    texts = [message.text for message in passages]  # without the titles, which name the request
    encoded = student.encode_queries(texts).vectors, student.encode_passages(texts).vectors
    scores = {
        "cosine, untuned": _score(cosine, cosine.encode_queries(texts).vectors, cosine.encode_passages(texts).vectors)
    }
    if student.has_dot:
        scores[_WITHOUT] = _score(DotStudent(student), *encoded)
    scores["D2LLM"] = _score(student, *encoded)
    hits = {name: request[_order(values)[:, :TOP_K]] == request[:, None] for name, values in scores.items()}
    p_value, gains, examples = None, np.zeros(len(passages), np.int64), ()
    if student.has_dot:
        gains = hits["D2LLM"].sum(1) - hits[_WITHOUT].sum(1)
        p_value = paired_randomisation(hits["D2LLM"].sum(1), hits[_WITHOUT].sum(1))
        by_gain = np.argsort(-gains, kind="stable")
        gained, lost = by_gain[gains[by_gain] > 0][:MAX_GAINED], by_gain[gains[by_gain] < 0][::-1][:MAX_LOST]
        examples = tuple(
            _example(passages, index, scores[_WITHOUT][index], scores["D2LLM"][index])
            for index in (*gained.tolist(), *lost.tolist())
        )
    return MessageReport(
        num_messages=len(passages),
        num_requests=len(MESSAGES),
        interaction_weight=interaction_weight(student, "symmetric"),
        systems=tuple(MessageSystem(name, float(hit.mean()), float(hit[:, 0].mean())) for name, hit in hits.items()),
        p_value=p_value,
        num_better=int((gains > 0).sum()),
        num_worse=int((gains < 0).sum()),
        examples=examples,
    )


def _score(scorer: SearchStudent, queries: NDArray[np.float32], passages: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores [queries, passages] of every text against every other; each text itself gets -inf."""
    scores = np.stack([scorer.score(query, passages, "symmetric") for query in queries])
    np.fill_diagonal(scores, -np.inf)
    return scores


def _order(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=-1, kind="stable")


def _example(
    passages: Sequence[Passage], index: int, without: NDArray[np.float32], whole: NDArray[np.float32]
) -> DemoAnswer:
    message = passages[index]
    by_without, by_whole = (
        [(passages[at], float(scores[at])) for at in _order(scores).tolist()] for scores in (without, whole)
    )

    def is_same(other: Passage) -> bool:
        return other.title == message.title

    return DemoAnswer(
        question=message.text,
        right_ids=tuple(other.id for other in passages if is_same(other) and other.id != message.id),
        baseline=top_results(by_without, by_whole, is_same, TOP_K),
        d2llm=top_results(by_whole, by_without, is_same, TOP_K),
    )
