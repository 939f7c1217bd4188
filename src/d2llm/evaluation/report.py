"""The results of ``evaluate`` as frozen dataclasses, from which tables, JSON, Markdown and HTML are rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from d2llm.core.types import SystemKind, Task
from d2llm.ops.agreement import Agreement
from d2llm.ops.calibration import ReliabilityBin, ScoreHistogram

REPORT_VERSION = 2
"""Version of ``EvaluationReport.to_json``; changes when a field is renamed or removed, or its meaning changes."""
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of single queries (or pairs), over the queries that were timed."""

    p50: float
    p95: float
    mean: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a system costs on this machine. A field is None if it does not apply or was not measured in this run.

    Another cost is another field, which says the heading of its column in reports (of a ``Latency``, headings and the
    parts that they show); what measures it gives it to ``System`` by the field's name.

    ``total`` is the time from the query's text to the ranking; ``encode``, ``candidates`` and ``score`` are its parts.
    ``passages_per_second`` is the speed of indexing, ``pairs_per_second`` that of scoring query and passage,
    ``bytes_per_passage`` the storage for a passage besides its text, ``peak_memory_mib`` the largest resident memory of
    the process while the system was measured, including everything else that is loaded.
    """

    total: Latency | None = field(default=None, metadata={"total ms, p50": "p50", "total ms, p95": "p95"})
    encode: Latency | None = field(default=None, metadata={"encode ms": "p50"})
    candidates: Latency | None = field(default=None, metadata={"candidates ms": "p50"})
    score: Latency | None = field(default=None, metadata={"score ms": "p50"})
    passages_per_second: float | None = field(default=None, metadata={"indexing passages/s": ""})
    pairs_per_second: float | None = field(default=None, metadata={"scoring pairs/s": ""})
    bytes_per_passage: float | None = field(default=None, metadata={"bytes per passage": ""})
    peak_memory_mib: float | None = field(default=None, metadata={"peak MiB": ""})

    @property
    def columns(self) -> dict[str, float | None]:
        """Heading and value of each column of a report."""
        return {
            heading: getattr(value, part) if part and value is not None else value
            for attribute in fields(self)
            for value in [getattr(self, attribute.name)]
            for heading, part in attribute.metadata.items()
        }


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One system: its measures over ``num_items`` queries (retrieval) or pairs, and its cost.

    ``fingerprint`` is that of the model, if there is one.
    """

    name: str
    kind: SystemKind
    measures: Mapping[str, Estimate]
    cost: Cost
    num_items: int
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class MissingRow:
    """A system that was not measured, with the reason and how to add it."""

    name: str
    kind: SystemKind
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference ``row`` minus ``baseline`` in one measure, with its significance.

    ``p_value`` is two-sided (``test`` names the test); ``adjusted_p`` is Holm-corrected over all rows compared in this
    measure.
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
    """How well one system's scores agree with the teacher's, on the pairs that the teacher scored."""

    name: str
    agreement: Agreement
    top_10_overlap: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often a system is right when it says "yes" with probability p, on ``num_pairs`` pairs."""

    name: str
    bins: tuple[ReliabilityBin, ...]
    expected_error: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Histogram of the scores that one system gave to relevant and to other passages."""

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
    """One query (or pair) that two systems answer very differently; values are in the report's main measure."""

    id: str
    query: str
    value: float
    baseline_value: float
    relevant: tuple[ShownPassage, ...]
    top: tuple[ShownPassage, ...]
    baseline_top: tuple[ShownPassage, ...]


@dataclass(frozen=True, slots=True)
class Details:
    """Per-query values and texts, which are shown but not exported: they are too large, or may not be shared.

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
    no relevant passage in the corpus. ``num_own_passages`` passages are a query itself and were left out of its
    rankings; ``num_own_passages_judged_relevant`` have a query's text and are relevant to it, so they count. If the
    teacher scored only a sample, ``num_items`` of its row is the size of the sample, and ``sample_rows`` holds every
    system on exactly that sample. ``baseline`` is the row that the others are compared with, ``subject`` the row that
    the examples are about, ``parts`` compares the subject with itself without a part of its score, and
    ``main_measure`` is the measure of the examples. ``notes`` are counts that a reader of the report should know
    (truncated texts, for example). ``provenance`` describes how the systems were made.
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
    num_own_passages: int = 0
    num_own_passages_judged_relevant: int = 0
    details: Details = field(default_factory=Details)

    def row(self, name: str) -> EvaluationRow:
        """The row of the system with this name; ``KeyError`` if there is none."""
        return {row.name: row for row in self.rows}[name]

    def comparison(self, row: str, measure: str) -> Comparison | None:
        """The comparison of a row with the baseline in one measure; None for the baseline itself."""
        return next(
            (comparison for comparison in self.comparisons if (comparison.row, comparison.measure) == (row, measure)),
            None,
        )

    def renamed(self, names: Mapping[str, str]) -> EvaluationReport:
        """The same report with other names of rows: old name -> new name."""

        def new(name: str) -> str:
            return names.get(name, name)

        def compared(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
            return tuple(
                replace(comparison, row=new(comparison.row), baseline=new(comparison.baseline))
                for comparison in comparisons
            )

        return replace(
            self,
            subject=new(self.subject),
            baseline=None if self.baseline is None else new(self.baseline),
            rows=tuple(replace(row, name=new(row.name)) for row in self.rows),
            missing=tuple(replace(row, name=new(row.name)) for row in self.missing),
            sample_rows=tuple(replace(row, name=new(row.name)) for row in self.sample_rows),
            comparisons=compared(self.comparisons),
            parts=compared(self.parts),
            agreement=tuple(replace(agreement, name=new(agreement.name)) for agreement in self.agreement),
            calibration=tuple(replace(calibration, name=new(calibration.name)) for calibration in self.calibration),
            histograms=tuple(replace(histogram, name=new(histogram.name)) for histogram in self.histograms),
            details=replace(
                self.details,
                values={new(name): values for name, values in self.details.values.items()},
                rankings={new(name): rankings for name, rankings in self.details.rankings.items()},
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-serialisable values, without ``details``."""
        values = asdict(replace(self, details=Details()))
        del values["details"]
        return {"report_version": REPORT_VERSION, **values}
