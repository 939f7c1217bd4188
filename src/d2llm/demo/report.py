"""What the demo measures, and the results as plain frozen values: rankings of questions, and of messages.

The questions, the ids that answer them, and the messages were written down before any system had ranked them, and are
not adapted to the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.toml import read_toml
from d2llm.core.types import Passage, Task
from d2llm.models.interaction import Interaction
from d2llm.models.protocols import SearchStudent
from d2llm.models.student import Student
from d2llm.ops.significance import paired_randomisation
from d2llm.retrieval.cosine import DotStudent
from d2llm.retrieval.index import Index

TOP_K = 3
"""Entries of a ranking that are shown; each message has as many others with its request."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One entry of a ranking.

    ``right``: the passage was named beforehand as an answer, or makes the same request. ``other_rank``: its rank in the
    first ``DemoReport.depth`` of the other system; None if it is not among them.
    """

    rank: int
    passage_id: str
    title: str
    text: str
    score: float
    right: bool
    other_rank: int | None


def top_results(
    ranking: Sequence[tuple[Passage, float]],
    other: Sequence[tuple[Passage, float]],
    is_right: Callable[[Passage], bool],
) -> tuple[DemoResult, ...]:
    """The first entries of a ranking of (passage, score), compared with the ranking of the ``other`` system."""
    other_ranks = {passage.id: rank for rank, (passage, _) in enumerate(other, start=1)}
    return tuple(
        DemoResult(
            rank=rank,
            passage_id=passage.id,
            title=passage.title,
            text=passage.text,
            score=score,
            right=is_right(passage),
            other_rank=other_ranks.get(passage.id),
        )
        for rank, (passage, score) in enumerate(ranking[:TOP_K], start=1)
    )


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """The top of two rankings for one text. ``right_ids``: its answers among the passages, named beforehand.

    ``baseline``: for a question, the ranking of BM25; for a message, that of the student without its interaction.
    """

    question: str
    right_ids: tuple[str, ...]
    baseline: tuple[DemoResult, ...]
    d2llm: tuple[DemoResult, ...]


@dataclass(frozen=True, slots=True)
class QuestionReport:
    """Results for the questions. ``right_cosine``: for each question, whether a right answer is in the cosine's top.

    The cosine is untuned and ranks the passages that BM25 and D2LLM propose, not the whole corpus.
    """

    answers: tuple[DemoAnswer, ...]
    right_cosine: tuple[bool, ...]
    num_candidates: int

    @property
    def num_right_baseline(self) -> int:
        """Questions with a right passage in the top of BM25."""
        return sum(any(result.right for result in answer.baseline) for answer in self.answers)

    @property
    def num_right_cosine(self) -> int:
        """Questions with a right passage in the top of the untuned cosine."""
        return sum(self.right_cosine)

    @property
    def num_right_d2llm(self) -> int:
        """Questions with a right passage in the top of D2LLM."""
        return sum(any(result.right for result in answer.d2llm) for answer in self.answers)


@dataclass(frozen=True, slots=True)
class MessageSystem:
    """How well one scorer finds messages with the same request; each message is a query, and all others are ranked.

    ``precision``: fraction of the first three messages that make the same request; ``first``: the same for the first
    one.
    """

    name: str
    precision: float
    first: float


@dataclass(frozen=True, slots=True)
class MessageReport:
    """Results for the messages: the untuned cosine, the student's inner product if it has one, and its full score.

    ``p_value``: of the difference in precision that the interaction makes (paired randomisation); None if the student
    has no inner product to compare with. ``examples``: the messages whose first three results the interaction changed
    most, improved ones first.
    """

    num_messages: int
    num_requests: int
    interaction_weight: float
    systems: tuple[MessageSystem, ...]
    p_value: float | None
    num_better: int
    num_worse: int
    examples: tuple[DemoAnswer, ...]


@dataclass(frozen=True, slots=True)
class ScoredResult:
    """One passage at the top of a ranking, and the parts of its score; None is a part that the score does not have.

    ``words`` is what BM25 adds, ``windows`` and ``tokens`` what the vectors of sentences and tokens add, and
    ``interaction`` what the IEM adds to ``inner_product``.
    """

    passage_id: str
    title: str
    right: bool
    score: float
    inner_product: float | None
    words: float | None
    windows: float | None
    tokens: float | None
    interaction: float | None


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """The parts of the scores of the best passages for one question, best first.

    ``interaction_weight``: weight of the student's interaction in this task; with 0 it adds nothing.
    """

    question: str
    passages: tuple[ScoredResult, ...]
    interaction_weight: float


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """Bytes: of the index on disk, of one passage in it, of one vector, and of the student's own files."""

    index: int
    per_passage: float
    vector_per_passage: int
    student: int


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The result of the demo. ``seconds``: step -> time; a step that had nothing to do has no entry."""

    folder: Path
    python: str
    num_modules: int
    num_documented: int
    num_passages: int
    student: str
    student_fingerprint: str
    baseline: str
    depth: int
    top_k: int
    questions: QuestionReport
    score: ScoreReport
    messages: MessageReport
    sizes: DemoSizes
    seconds: Mapping[str, float]
    total_seconds: float
    next_commands: tuple[tuple[str, str], ...]
    """(purpose, command)."""


DEPTH = 100
"""Number of ranks that are compared; passages further down count as missing."""
_PROPOSED = 10
"""Passages per question that BM25 and D2LLM each pass to the untuned cosine, which has no index."""


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question and the ids of the passages that answer it; not every Python version has all of them."""

    text: str
    right_ids: frozenset[str]


QUESTIONS = (
    DemoQuestion(
        "How do I run a function every few seconds in the background?",
        frozenset(
            {"threading.Timer", "sched", "sched.scheduler.enter", "asyncio.base_events.BaseEventLoop.call_later"}
        ),
    ),
    DemoQuestion(
        "How can I find all files matching a pattern in a folder and in all folders below it?",
        frozenset({"pathlib.Path.rglob", "pathlib.Path.glob", "glob.glob", "glob.iglob"}),
    ),
    DemoQuestion(
        "How do I merge two dictionaries so that the second one wins?",
        frozenset({"dict.update", "collections.abc.MutableMapping.update"}),
    ),
    DemoQuestion(
        "Somebody made a typo: which of my known words did they mean?",
        frozenset({"difflib.get_close_matches"}),
    ),
    DemoQuestion(
        "How can I remember the results of a slow function so that they are not computed twice?",
        frozenset({"functools.lru_cache", "functools.cache"}),
    ),
    DemoQuestion(
        "How do I copy a nested list so that changes to the copy leave the original alone?",
        frozenset({"copy", "copy.deepcopy"}),
    ),
    DemoQuestion(
        "How do I get a folder that is deleted by itself when I am done with it?",
        frozenset({"tempfile.TemporaryDirectory"}),
    ),
    DemoQuestion(
        "How do I ask for a password without showing it on the screen?",
        frozenset({"getpass", "getpass.getpass", "getpass.unix_getpass", "getpass.win_getpass"}),
    ),
)

EXPLAINED = 1
"""Position of the question whose scores are shown part by part."""


def without_piece(passage_id: str) -> str:
    """The id of the first piece of a long docstring: "copy" for "copy#2"."""
    return passage_id.partition("#")[0]


class Candidates:
    """The rankings of BM25 and D2LLM for each question, and untuned cosine scores of their first passages."""

    def __init__(self, index: Index, cosine: SearchStudent) -> None:
        self._index = index
        texts = [question.text for question in QUESTIONS]
        self._d2llm = [
            [(result.passage, result.score) for result in ranking.passages]
            for ranking in index.search(texts, top_k=DEPTH)
        ]
        self._bm25: list[list[tuple[Passage, float]]] = []
        for text in texts:
            matches = index.view.match(text, DEPTH)
            passages = index.view.passages(matches.rows)
            self._bm25.append(list(zip(passages, np.asarray(matches.scores).tolist(), strict=True)))
        proposed = {passage.id: passage for position in range(len(texts)) for passage in self.top(position, _PROPOSED)}
        vectors = cosine.encode_passages([passage.full_text for passage in proposed.values()]).vectors
        scores = cosine.encode_queries(texts).vectors @ vectors.T
        self._cosine = [dict(zip(proposed, row.tolist(), strict=True)) for row in scores]
        self._proposed = proposed

    def top(self, position: int, top_k: int) -> list[Passage]:
        """The first passages of D2LLM and of BM25 for a question, without duplicates."""
        hits = [*self._d2llm[position][:top_k], *self._bm25[position][:top_k]]
        return list({passage.id: passage for passage, _ in hits}.values())

    def answer(self) -> QuestionReport:
        """The top of BM25 and D2LLM, and whether the untuned cosine has a right answer in its top."""
        ids = set(self._index.view.ids(self._index.view.live_rows()))
        answers: list[DemoAnswer] = []
        for question, by_bm25, by_d2llm in zip(QUESTIONS, self._bm25, self._d2llm, strict=True):
            is_answer = partial(is_right, question)
            baseline = top_results(by_bm25, by_d2llm, is_answer)
            d2llm = top_results(by_d2llm, by_bm25, is_answer)
            answers.append(DemoAnswer(question.text, tuple(sorted(question.right_ids & ids)), baseline, d2llm))
        right_cosine = tuple(
            any(is_right(question, passage) for passage in self._cosine_top(position))
            for position, question in enumerate(QUESTIONS)
        )
        return QuestionReport(tuple(answers), right_cosine, len(self._proposed))

    def _cosine_top(self, position: int) -> list[Passage]:
        ranked = sorted((-score, passage_id) for passage_id, score in self._cosine[position].items())
        return [self._proposed[passage_id] for _, passage_id in ranked[:TOP_K]]


def explain(index: Index, interaction_weight: float) -> ScoreReport:
    """The parts of the scores of the best passages for one question."""
    question = QUESTIONS[EXPLAINED]
    ranking = index.search(question.text, top_k=TOP_K, explain=True)
    passages: list[ScoredResult] = []
    for result in ranking.passages:
        explanation = result.explanation
        assert explanation is not None
        passages.append(
            ScoredResult(
                passage_id=result.passage.id,
                title=result.passage.title,
                right=is_right(question, result.passage),
                score=result.score,
                inner_product=explanation.dot,
                words=explanation.lexical,
                windows=explanation.windows,
                tokens=explanation.tokens,
                interaction=explanation.interaction,
            )
        )
    return ScoreReport(question.text, tuple(passages), interaction_weight)


def is_right(question: DemoQuestion, passage: Passage) -> bool:
    """Whether a passage, or the passage that it continues, was named as an answer."""
    return without_piece(passage.id) in question.right_ids


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
        baseline=top_results(by_without, by_whole, is_same),
        d2llm=top_results(by_whole, by_without, is_same),
    )
