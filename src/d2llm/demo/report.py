"""The results of the demo, as plain frozen values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2llm.core.types import Passage


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
    top_k: int,
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
        for rank, (passage, score) in enumerate(ranking[:top_k], start=1)
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

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"folder": str(self.folder)}
