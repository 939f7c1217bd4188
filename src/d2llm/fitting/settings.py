"""The settings of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.inputs import pairs_of, strings_of
from d2llm.core.shipped import DEFAULT_WRITER
from d2llm.core.types import Task
from d2llm.fitting.critic import CriticSettings
from d2llm.fitting.write_queries import DEFAULT_KINDS
from d2llm.models.writers.writer import QueryKind
from d2llm.recipe import TeacherConfig, WriterConfig
from d2llm.store.side_files import Chunking

DEFAULT_HOURS = 8.0


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How to fit a search engine to documents.

    Attributes:
        hours: time for everything, counted in each call; what there is no time for is left out, and said.
        student: the student to start from and to beat: a folder or a name. None: the shipped one for the language of
            the documents.
        task: what makes a passage relevant; None: what the student to start from was trained for.
        writer: the language model that writes queries.
        kinds: kinds of queries, each with the probability to be a passage's first.
        examples: pairs (passage, query) that show the writer how users ask.
        max_tokens: limit of the tokens that the writer reads and writes, over all calls.
        max_cost: limit of what they cost, in the currency of the writer's prices.
        max_queries: write no more queries than this.
        critic: how strictly queries are reviewed.
        teacher: a model that judges pairs: for the critic, and to be distilled if it beats the cosine. None: the
            student learns from the queries alone.
        judged: a file of users' queries and what they chose (``fitting.training_data.read_judged``).
        exclude: what to leave out of folders of documents, as in a ``.gitignore``.
        chunking: how documents are split; None: as the index does it already, or by default.
        seed: seed of all samples and of training.

    Example:
        >>> from d2llm import FitSettings
        >>> FitSettings(hours=0.5).hours
        0.5
    """

    hours: float = DEFAULT_HOURS
    student: str | None = None
    task: Task | None = None
    writer: WriterConfig = field(default_factory=lambda: WriterConfig(model=DEFAULT_WRITER))
    kinds: Mapping[QueryKind, float] = field(default_factory=lambda: dict(DEFAULT_KINDS))
    examples: tuple[tuple[str, str], ...] = ()
    max_tokens: int | None = None
    max_cost: float | None = None
    max_queries: int | None = None
    critic: CriticSettings = field(default_factory=CriticSettings)
    teacher: TeacherConfig | None = None
    judged: Path | None = None
    exclude: tuple[str, ...] = ()
    chunking: Chunking | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(strings_of(self.exclude, "exclude")))
        object.__setattr__(self, "examples", pairs_of(self.examples, "examples"))
        if self.hours <= 0:
            raise InputError(f"hours is {self.hours:g}, but must be above 0")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}, but must not be negative")
