"""What ``evaluate`` found, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from d2llm.core.types import Task


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One system.

    ``measures`` are means over ``num_queries`` queries, in [0, 1]. ``milliseconds_per_query`` is the mean time of one
    query asked alone, from its text to the ranking. ``bytes_per_passage`` is what the system keeps of a passage besides
    its text; None where it keeps nothing of its own.
    """

    name: str
    measures: Mapping[str, float]
    milliseconds_per_query: float
    bytes_per_passage: float | None
    num_queries: int


@dataclass(frozen=True, slots=True)
class MissingRow:
    """A system that was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Significance:
    """Paired randomisation test: is ``first`` minus ``second`` (the mean ``difference``) more than chance?"""

    measure: str
    first: str
    second: str
    difference: float
    p_value: float
    num_queries: int
    num_permutations: int


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The result of ``evaluate``.

    ``rows`` are over all queries that have a relevant passage in the corpus; ``num_left_out`` have none. Where the
    teacher judged a sample only, its row says so by its ``num_queries``, and ``sample_rows`` holds every system on
    exactly that sample. ``notes`` are counts that a reader of the figures should know (truncated texts and the like).
    """

    dataset: str
    split: str
    task: Task
    num_passages: int
    num_queries: int
    num_left_out: int
    rows: tuple[EvaluationRow, ...]
    missing: tuple[MissingRow, ...]
    sample_rows: tuple[EvaluationRow, ...]
    significance: Significance | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    def row(self, name: str) -> EvaluationRow:
        """The row of one system by its name.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)
