"""The demo's questions, the documentation that answers them, and the rankings of BM25, the untuned cosine and D2LLM.

The questions and the right ids were written down from knowledge of the standard library before any system had ranked
them, and are not adapted to the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from d2llm.core.types import Passage
from d2llm.demo.report import DemoAnswer, QuestionReport, ScoredResult, ScoreReport, top_results
from d2llm.models.protocols import SearchStudent
from d2llm.retrieval.index import Index

TOP_K = 3
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
            baseline = top_results(by_bm25, by_d2llm, is_answer, TOP_K)
            d2llm = top_results(by_d2llm, by_bm25, is_answer, TOP_K)
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
