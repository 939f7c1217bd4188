"""What the demo found, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class DemoPlace:
    """One place of a ranking.

    ``right``: the passage was named beforehand as an answer. ``other_rank``: its rank in the other system's list of
    ``DemoReport.depth``; None where it is not in there.
    """

    rank: int
    passage_id: str
    title: str
    text: str
    score: float
    right: bool
    other_rank: int | None


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """The top of both rankings for one question. ``right_ids``: its answers among the passages, named beforehand."""

    question: str
    right_ids: tuple[str, ...]
    cosine: tuple[DemoPlace, ...]
    d2llm: tuple[DemoPlace, ...]


@dataclass(frozen=True, slots=True)
class JudgedPassage:
    """One passage before the teacher: its P(yes), and the two systems' own scores of it."""

    passage_id: str
    title: str
    probability: float
    log_odds: float
    cosine: float
    d2llm: float
    right: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a system with the teacher, over the judged passages: Kendall's tau_b, and whether the first is the same."""

    kendall_tau: float
    same_first: bool


@dataclass(frozen=True, slots=True)
class TeacherOpinion:
    """The teacher on the best passages of both systems for one question, its most likely answer first."""

    model: str
    tuned: bool
    question: str
    passages: tuple[JudgedPassage, ...]
    agreement_cosine: Agreement
    agreement_d2llm: Agreement


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """Bytes: of D2LLM's index on disk, of what it keeps of one passage, and of the student's own files."""

    index: int
    per_passage: float
    vector_per_passage: int
    student: int


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The result of the demo. ``seconds``: step -> time; a step that found its work done has no entry."""

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
    answers: tuple[DemoAnswer, ...]
    teacher: TeacherOpinion
    sizes: DemoSizes
    seconds: Mapping[str, float]
    total_seconds: float
    next_commands: tuple[tuple[str, str], ...]
    """(what for, what to type)."""

    @property
    def num_right_cosine(self) -> int:
        """Questions with a right passage in the top of the cosine."""
        return sum(any(place.right for place in answer.cosine) for answer in self.answers)

    @property
    def num_right_d2llm(self) -> int:
        """Questions with a right passage in the top of D2LLM."""
        return sum(any(place.right for place in answer.d2llm) for answer in self.answers)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        counts = {"num_right_cosine": self.num_right_cosine, "num_right_d2llm": self.num_right_d2llm}
        return asdict(self) | {"folder": str(self.folder)} | counts
