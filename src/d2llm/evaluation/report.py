"""The results of ``evaluate`` as plain frozen values; tables, JSON, Markdown and HTML are made from these alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from d2llm.core.types import SystemKind, Task
from d2llm.ops.agreement import Agreement
from d2llm.ops.calibration import ReliabilityBin, ScoreHistogram

REPORT_VERSION = 2
"""Of ``EvaluationReport.to_json``: changes when a field is renamed, removed or means something else."""
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Milliseconds:
    """Time of one query (or pair) alone, over the queries that were timed."""

    p50: float
    p95: float
    mean: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a system costs on this machine. None: does not apply, or was not measured in this run.

    ``total`` is from the query's text to the ranking; ``encode``, ``candidates`` and ``score`` are its parts.
    ``passages_per_second`` is the rate of making the index, ``pairs_per_second`` of scoring query and passage,
    ``bytes_per_passage`` what is kept of a passage besides its text, ``peak_memory_mib`` the largest resident memory of
    the process while the system was measured, everything loaded included.
    """

    total: Milliseconds | None
    encode: Milliseconds | None = None
    candidates: Milliseconds | None = None
    score: Milliseconds | None = None
    passages_per_second: float | None = None
    pairs_per_second: float | None = None
    bytes_per_passage: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One system: its measures over ``num_items`` queries (retrieval) or pairs, and its cost.

    ``fingerprint`` is the model's, where there is one.
    """

    name: str
    kind: SystemKind
    measures: Mapping[str, Estimate]
    cost: Cost
    num_items: int
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class MissingRow:
    """A system that was not measured, with the reason and what would bring it."""

    name: str
    kind: SystemKind
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Is ``row`` minus ``baseline`` more than chance, in one measure?

    ``p_value`` is two-sided (``test`` names the test); ``adjusted_p`` is Holm's over all rows compared in this measure.
    """

    measure: str
    row: str
    baseline: str
    difference: Estimate
    p_value: float
    adjusted_p: float
    num_items: int
    test: str

    @property
    def is_significant(self) -> bool:
        """Whether the adjusted p-value is below 0.05."""
        return self.adjusted_p < SIGNIFICANCE_LEVEL


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """How far one system's scores follow the teacher's, on the pairs that the teacher judged."""

    name: str
    agreement: Agreement
    top_10_overlap: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """When a system says "yes" with probability p, how often is it right? On ``num_pairs`` pairs."""

    name: str
    bins: tuple[ReliabilityBin, ...]
    expected_error: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """The scores that one system gave to relevant and to other passages."""

    name: str
    counts: ScoreHistogram


@dataclass(frozen=True, slots=True)
class ShownPassage:
    """A passage at the top of a ranking, or the passage of a pair."""

    id: str
    text: str
    is_relevant: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One query (or pair) that two systems answer very differently; values are of the report's main measure."""

    id: str
    query: str
    value: float
    baseline_value: float
    relevant: tuple[ShownPassage, ...]
    top: tuple[ShownPassage, ...]
    baseline_top: tuple[ShownPassage, ...]


@dataclass(frozen=True, slots=True)
class Details:
    """What is shown but is too large, or not allowed, to be passed on: values of single queries, and texts.

    ``values``: row name -> measure -> one value for each of ``item_ids``, in their order. ``rankings``: row name ->
    query_id -> (passage_id, score), best first.
    """

    item_ids: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, tuple[float, ...]]] = field(
        default_factory=dict[str, Mapping[str, tuple[float, ...]]]
    )
    wins: tuple[Example, ...] = ()
    losses: tuple[Example, ...] = ()
    rankings: Mapping[str, Mapping[str, tuple[tuple[str, float], ...]]] = field(
        default_factory=dict[str, Mapping[str, tuple[tuple[str, float], ...]]]
    )


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The result of ``evaluate``.

    ``kind`` says whether ``rows`` are over queries ("retrieval") or over pairs ("pairs"). ``num_left_out`` queries had
    no relevant passage in the corpus. Where the teacher judged a sample only, its row says so by its ``num_items``, and
    ``sample_rows`` holds every system on exactly that sample. ``baseline`` is the row that the others are compared
    with, ``subject`` the row that the examples are about, ``parts`` compares it with itself without a part of its
    score, ``main_measure`` their measure. ``notes`` are counts that a reader of the figures should know (truncated
    texts and the like). ``provenance`` says what made the systems.
    """

    kind: Literal["retrieval", "pairs"]
    dataset: str
    split: str
    task: Task
    num_passages: int
    num_items: int
    num_left_out: int
    main_measure: str
    subject: str
    baseline: str | None
    rows: tuple[EvaluationRow, ...]
    missing: tuple[MissingRow, ...]
    sample_rows: tuple[EvaluationRow, ...]
    comparisons: tuple[Comparison, ...]
    agreement: tuple[AgreementRow, ...]
    calibration: tuple[Calibration, ...]
    histograms: tuple[Histogram, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    seconds: float
    parts: tuple[Comparison, ...] = ()
    details: Details = field(default_factory=Details)

    def row(self, name: str) -> EvaluationRow:
        """The row of one system by its name.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def comparison(self, row: str, measure: str) -> Comparison | None:
        """The comparison of a row with the baseline in one measure; None for the baseline itself."""
        return next((one for one in self.comparisons if (one.row, one.measure) == (row, measure)), None)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, without ``details``."""
        values = asdict(replace(self, details=Details()))
        del values["details"]
        return {"report_version": REPORT_VERSION, **values}
