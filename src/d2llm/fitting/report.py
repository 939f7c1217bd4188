"""The report of a fit, and its pages: the report, the audit of the written queries, and the stages while they run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2llm.core.document import Document, Note, Section
from d2llm.core.files import write_bytes
from d2llm.core.names import counted
from d2llm.core.progress import remarks
from d2llm.core.table import Cell, Column, Table
from d2llm.evaluation.report import SIGNIFICANCE_LEVEL
from d2llm.fitting.critic import Review
from d2llm.fitting.training_data import DataReport
from d2llm.fitting.write_queries import WritingReport
from d2llm.ops.gating import GateTest
from d2llm.reports.evaluation_tables import measure_table
from d2llm.reports.html import page
from d2llm.reports.phrases import p_text

if TYPE_CHECKING:
    from d2llm.evaluation.report import EvaluationReport, Example


_EXAMPLES_PER_REASON = 8
_NUM_KEPT_SHOWN = 30
_SHOWN_CHARACTERS = 300
_MEASURE = "nDCG@10"


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit did.

    ``kept`` says whose vectors the index has: "fitted", or "start" if training was no significant improvement.
    ``verdict`` is the test of that, None if nothing was trained, or not compared. ``reports`` compares all systems on
    the held-out queries, by data set. ``notes`` say what was left out.
    """

    folder: Path
    num_passages: int
    writing: WritingReport
    num_kept: int
    rejected: Mapping[str, int]
    data: Mapping[str, DataReport]
    kept: str
    verdict: GateTest | None
    reports: Mapping[str, EvaluationReport]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        return {
            "folder": str(self.folder),
            "num_passages": self.num_passages,
            "writing": asdict(self.writing),
            "num_kept": self.num_kept,
            "rejected": dict(self.rejected),
            "data": {name: asdict(data) for name, data in self.data.items()},
            "kept": self.kept,
            "verdict": None if self.verdict is None else asdict(self.verdict) | {"outcome": outcome(self.verdict)},
            "reports": {name: report.to_json() for name, report in self.reports.items()},
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
        }


def report_page(report: FitReport, stages: Table) -> str:
    """The report as a page: the verdict, all systems on held-out queries, what was read and written, the stages."""
    sections: list[Section] = []
    for name, set_report in report.reports.items():
        title = _set_title(name, set_report)
        sections.append(Section(title, [measure_table(set_report, set_report.rows, title=f"Held-out queries: {name}")]))
        sections += [Section(table.title, [table], level=3) for table in _examples(set_report)]
    facts = _facts(report)
    sections += [Section(facts.title, [facts, *map(Note, report.notes)]), Section(stages.title, [stages])]
    return page(Document(report.folder.name, sections, introduction=verdict_sentence(report)))


def outcome(test: GateTest) -> str:
    """Whether the trained student is better than the start: "better", "significantly worse" or "not different"."""
    if test.passed:
        return "better"
    return "significantly worse" if test.difference < 0 and test.p_value < SIGNIFICANCE_LEVEL else "not different"


def verdict_sentence(report: FitReport) -> str:
    """Whether training was worth it, in one sentence."""
    test = report.verdict
    if test is None:
        return "No trained student was compared; the index has the student to start from."
    change = f"{_MEASURE} {test.first:.3f} to {test.second:.3f}, {p_text(test.p_value)}"
    figures = f"{change}, {counted(test.num_queries, 'held-out query')}"
    if test.passed:
        return f"The trained student is significantly better than the one it started from ({figures}), and is served."
    how = "significantly worse than" if outcome(test) == "significantly worse" else "not significantly different from"
    return f"The trained student is {how} the one it started from ({figures}); that one is served."


def audit_page(review: Review, texts: Mapping[str, str], *, seed: int = 0) -> str:
    """The audit: counts by reason, and examples of rejected and kept queries with their passages."""
    rng = random.Random(seed)
    counts = Table("outcome", Column("queries", ","), title="Outcomes")
    counts.add_row(Cell("kept", "bold"), len(review.kept))
    for reason, count in review.reasons.items():
        counts.add_row(reason, count)
    rejections: list[Table] = []
    for reason in review.reasons:
        rejected = [query for query in review.rejected if query.reason == reason]
        table = Table("query", "kind", "why", "passage", title=f"Rejected: {reason}")
        for query in rng.sample(rejected, min(_EXAMPLES_PER_REASON, len(rejected))):
            passage = _shortened(texts[query.written.passage_id])
            table.add_row(query.written.text, query.written.kind, query.detail, passage)
        rejections.append(table)
    kept = Table("query", "kind", Column("found at rank"), Column("positives"), "passage", title="Kept, a sample")
    for query in rng.sample(review.kept, min(_NUM_KEPT_SHOWN, len(review.kept))):
        passage = _shortened(texts[query.written.passage_id])
        kept.add_row(query.written.text, query.written.kind, query.rank, len(query.positives), passage)
    sections = [Section("", [counts]), *(Section(table.title, [table]) for table in (kept, *rejections))]
    about = "What the critic kept, and what it rejected and why."
    return page(Document("The written queries", sections, introduction=about))


def _set_title(name: str, report: EvaluationReport) -> str:
    kinds = {"written": "Queries written for held-out documents", "users": "Users' queries that were held out"}
    return f"{kinds[name]} ({report.num_items:,})"


def _facts(report: FitReport) -> Table:
    writing = report.writing
    table = Table("", Column("", ","), title="What was read and written")
    table.add_row("passages", report.num_passages)
    table.add_row("passages too short to ask about", writing.num_short)
    table.add_row("queries written", writing.num_queries)
    table.add_row("answers without a query", writing.num_problems)
    table.add_row("tokens that the writer read", writing.num_prompt_tokens)
    table.add_row("tokens that the writer wrote", writing.num_written_tokens)
    table.add_row("queries kept by the critic", report.num_kept)
    for name, data in report.data.items():
        for split, count in data.queries.items():
            table.add_row(f"{name}: {split}", count)
    return table


def _examples(report: EvaluationReport) -> list[Table]:
    """Queries that the student that is served answers better and worse than the baseline."""
    kinds = {"better": report.details.wins, "worse": report.details.losses}
    titled = {f"{report.subject}: {kind} than {report.baseline}": examples for kind, examples in kinds.items()}
    return [_example_table(title, examples) for title, examples in titled.items() if examples]


def _example_table(title: str, examples: tuple[Example, ...]) -> Table:
    table = Table("query", Column("gain", "+.2f"), "relevant passage", title=title)
    for example in examples:
        relevant = example.relevant[0].text if example.relevant else ""
        table.add_row(example.query, example.value - example.baseline_value, _shortened(relevant))
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


# The stages of a fit --------------------------------------------------------------------------------------------------

REFRESH_SECONDS = 5
"""How often the page is written, and reloads itself in a browser."""

StageName = Literal["read", "write", "review", "weights", "train", "compare", "serve"]
STAGES: dict[StageName, str] = {
    "read": "read the documents and index them",
    "write": "write queries",
    "review": "review the queries",
    "weights": "fit the weights of the score",
    "train": "train the student",
    "compare": "compare on held-out queries",
    "serve": "make the index that is served",
}
"""Name -> what it does, in order."""


@dataclass(slots=True)
class Stage:
    """One stage: seconds planned (None: unknown) and taken, whether it is running, and what came of it."""

    name: StageName
    planned: float | None = None
    seconds: float | None = None
    outcome: str = ""
    started: float | None = field(default=None, repr=False)

    @property
    def elapsed(self) -> float | None:
        """Seconds so far, or None before it starts."""
        if self.seconds is not None or self.started is None:
            return self.seconds
        return time.monotonic() - self.started


class Stages:
    """The stages of one call, with its deadline."""

    def __init__(self, page: Path, title: str, seconds: float) -> None:
        self.page, self.title = page, title
        self._started, self._seconds = time.monotonic(), seconds
        self.stages: dict[StageName, Stage] = {name: Stage(name) for name in STAGES}
        self._is_running = True

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._started + self._seconds - time.monotonic()

    def plan(self, **seconds: float) -> None:
        """Set the planned seconds of stages by name, log the plan, and show it."""
        for name, stage in self.stages.items():
            if name in seconds:
                stage.planned = seconds[name]
        entries = [f"{STAGES[name]} {_minutes(s.planned)}" for name, s in self.stages.items() if name in seconds]
        remarks.info("plan: %s; %s left", ", ".join(entries), _minutes(self.seconds_left))
        self.write_page()

    @contextmanager
    def run(self, name: StageName) -> Generator[Stage]:
        """Run a stage: yields it, for its ``outcome``; the page is kept up to date meanwhile."""
        stage = self.stages[name]
        stage.started = time.monotonic()
        self.write_page()
        finished = threading.Event()
        watcher = threading.Thread(target=self._keep_page, args=(finished,), daemon=True, name="d2llm fit page")
        watcher.start()
        remarks.info("fit: %s", STAGES[name])
        try:
            yield stage
        finally:
            stage.seconds = time.monotonic() - stage.started
            finished.set()
            watcher.join()
            self.write_page()
        remarks.info("fit: %s: %s, in %s", STAGES[name], stage.outcome or "finished", _minutes(stage.seconds))

    def skip(self, name: StageName, reason: str) -> None:
        """Record why a stage does not run."""
        self.stages[name].outcome = reason
        remarks.info("fit: %s: %s", STAGES[name], reason)
        self.write_page()

    def finish(self) -> None:
        """Show on the page that nothing is running any more, because the call has ended or failed."""
        self._is_running = False
        self.write_page()

    def table(self) -> Table:
        """The stages with their planned and actual minutes."""
        table = Table("stage", Column("planned"), Column("taken"), "outcome", title="Stages")
        for name, stage in self.stages.items():
            running = stage.started is not None and stage.seconds is None
            taken = None if stage.elapsed is None else _minutes(stage.elapsed) + (" so far" if running else "")
            planned = None if stage.planned is None else _minutes(stage.planned)
            table.add_row(STAGES[name], planned, taken, stage.outcome)
        return table

    def write_page(self) -> None:
        """Write the page with the present state."""
        ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + self.seconds_left))
        state, refresh = "Nothing is running.", None
        if self._is_running:
            left = _minutes(max(0.0, self.seconds_left))
            state, refresh = f"Ends at about {ends}: {left} left.", REFRESH_SECONDS
        document = Document(f"Fitting {self.title}", [Section("", [self.table()])], state, refresh)
        write_bytes(self.page, page(document).encode())

    def _keep_page(self, finished: threading.Event) -> None:
        while not finished.wait(REFRESH_SECONDS):
            self.write_page()


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if abs(seconds) < 120 else f"{seconds / 60:.0f} min"
