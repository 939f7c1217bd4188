"""The stages of a fit: what runs, how long it should take, and a page that shows it while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from d2llm.core.document import Document, Section
from d2llm.core.files import write_bytes
from d2llm.core.progress import remarks
from d2llm.core.table import Column, Table
from d2llm.reports.html import page

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
        ends = datetime.now().astimezone() + timedelta(seconds=self.seconds_left)
        state, refresh = "Nothing is running.", None
        if self._is_running:
            left = _minutes(max(0.0, self.seconds_left))
            state, refresh = f"Ends at about {ends:%Y-%m-%d %H:%M}: {left} left.", REFRESH_SECONDS
        document = Document(f"Fitting {self.title}", [Section("", [self.table()])], state, refresh)
        write_bytes(self.page, page(document).encode())

    def _keep_page(self, finished: threading.Event) -> None:
        while not finished.wait(REFRESH_SECONDS):
            self.write_page()


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if abs(seconds) < 120 else f"{seconds / 60:.0f} min"
