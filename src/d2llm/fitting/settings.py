"""The settings of a fit: the same in Python and on the command line (``d2llm fit``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from d2llm.core.errors import InputError
from d2llm.core.settings import TASK_HELP, TRAINED_TASK, WRITER_HELP, Settings, Shown, narrowed, setting
from d2llm.core.types import Task
from d2llm.data.settings import ReadingSettings

if TYPE_CHECKING:
    from d2llm.models.writers.writer import QueryKind
    from d2llm.recipe import TeacherConfig, WriterConfig
    from d2llm.store.index_manifest import Chunking

    Kinds = Mapping[QueryKind, float]
else:
    Kinds = TeacherConfig = WriterConfig = Chunking = Any  # of no use on the command line, which imports this module

DEFAULT_HOURS = 8.0
DEFAULT_KINDS: Kinds = {"question": 0.7, "keywords": 0.3}
"""Fraction of each kind of query among the first queries of the passages."""
_PYTHON_ONLY = Shown(python_only=True)


@dataclass(frozen=True, slots=True)
class CriticSettings:
    """How strict the critic is.

    Attributes:
        depth: the passage must be among this many first results of a search for its query.
        same_text: passages among those results are also relevant if their texts are at least this similar (Jaccard
            similarity of character trigrams).
        num_scored: how many of the results a teacher reads.
        min_log_odds: log-odds of a teacher below which a query is not answered by its passage; not for one that ranks
            lists, whose log-odds only compare passages.
        max_positives: a query with more relevant passages is too general.
    """

    depth: int = 20
    same_text: float = 0.8
    num_scored: int = 5
    min_log_odds: float = 0.0
    max_positives: int = 5


class FitSettings(Settings):
    """How to fit a search engine to documents.

    Example:
        >>> from d2llm import FitSettings
        >>> FitSettings(hours=0.5)
        FitSettings(hours=0.5)
    """

    noun: ClassVar[str] = "setting of a fit"

    hours: float = setting(
        DEFAULT_HOURS,
        "Time for everything, counted in each call; it ends in time with the best so far, and says what was left out.",
        Shown(default=f"{DEFAULT_HOURS:g}"),
        gt=0,
    )
    student: str | None = setting(
        None,
        "The student to start from and to beat: a folder or a name.",
        Shown(default="the shipped one for the documents' language", python_only=True),
    )
    task: Task | None = setting(None, TASK_HELP, TRAINED_TASK)
    writer: WriterConfig | None = setting(None, WRITER_HELP, _PYTHON_ONLY)
    kinds: Kinds = setting(
        DEFAULT_KINDS, "Kinds of queries, each with the probability to be a passage's first.", _PYTHON_ONLY
    )
    examples: tuple[tuple[str, str], ...] = setting(
        (), "Pairs of a passage and a query that show the writer how users ask.", _PYTHON_ONLY, strict=False
    )
    max_tokens: int | None = setting(
        None, "Write no more queries after so many tokens, read and written, over all calls.", ge=1
    )
    max_cost: float | None = setting(
        None, "Write no more queries when they have cost this much, in the currency of the writer's prices.", ge=0
    )
    max_queries: int | None = setting(None, "Write no more queries than this.", ge=1)
    critic: CriticSettings = setting(CriticSettings(), "How strictly queries are reviewed.", _PYTHON_ONLY)
    teacher: TeacherConfig | None = setting(
        None,
        "A model that scores pairs, to review the queries and to learn from where it beats the cosine.",
        _PYTHON_ONLY,
    )
    judged: str | Path | None = setting(
        None,
        "Users' queries and what they chose: lines 'query<TAB>id' with an optional grade, where an id is that of a "
        "passage or a document.",
        _PYTHON_ONLY,
    )
    exclude: tuple[str, ...] = narrowed(ReadingSettings, "exclude")
    chunking: Chunking | None = setting(
        None,
        "How documents are split; by default as in the index, or in the usual way in a new one.",
        _PYTHON_ONLY,
    )
    seed: int = setting(0, "Seed of samples and training.", ge=0)

    def check(self) -> None:
        """Check that the judged queries are there.

        Raises:
            InputError: they are not.
        """
        if self.judged is not None and not Path(self.judged).is_file():
            raise InputError(f"judged is {self.judged}, but there is no such file")
