"""Progress of anything that takes over two seconds: a bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Advance(Protocol):
    """Call with the number of items finished since the last call, and a short note to show beside the bar."""

    def __call__(self, count: int, note: str = "", /) -> None:
        """``count`` items are finished; ``note`` replaces the note shown, unless empty."""
        ...


LINE_SECONDS = 30.0
"""Between two lines of a log."""
_remarks = logging.getLogger("d2llm.remarks")
_shown: ContextVar[Progress | None] = ContextVar("shown progress", default=None)


@contextmanager
def progress_bar(description: str, total: int | None, *, show: bool | None = None) -> Generator[Advance]:
    """A bar with rate and remaining time on standard error; where that is no terminal, a logged line twice a minute.

    Work that is part of other work with a bar has its own bar below that one, as long as it lasts.

    Args:
        description: what is being done.
        total: how many items there are; None: nobody knows, so what is finished is shown.
        show: True: a bar, also where there is no terminal. False: neither bar nor lines.
    """
    if show is False:
        yield ignore
        return
    if not (sys.stderr.isatty() or show):
        yield _lines(description, total)
        return
    around = _shown.get()
    if around is not None:  # a terminal has room for one display
        task = around.add_task(description, total=total, note="")
        try:
            yield _advance_of(around, task)
        finally:
            around.remove_task(task)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        before = _shown.set(progress)
        try:
            yield _advance_of(progress, progress.add_task(description, total=total, note=""))
        finally:
            _shown.reset(before)


def _advance_of(progress: Progress, task: TaskID) -> Advance:
    def advance(count: int, note: str = "", /) -> None:
        progress.advance(task, count)
        if note:
            progress.update(task, note=note)

    return advance


def _lines(description: str, total: int | None) -> Advance:
    """Logs how far the work is, no more often than every ``LINE_SECONDS``; what is quicker than that says nothing."""
    started = logged = time.monotonic()
    finished = 0
    remark = ""

    def advance(count: int, note: str = "", /) -> None:
        nonlocal logged, finished, remark
        finished += count
        remark = note or remark
        now = time.monotonic()
        if now - logged < LINE_SECONDS:
            return
        logged = now
        seconds = now - started
        share = ""
        if total:
            until = f", {_duration(seconds * (total - finished) / finished)} left" if finished else ""
            share = f" of {total:,} ({finished / total:.0%}) after {_duration(seconds)}{until}"
        _remarks.info("%s: %s%s%s", description, f"{finished:,}", share, f", {remark}" if remark else "")

    return advance


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def ignore(count: int, note: str = "", /) -> None:
    """Progress that is not shown."""
    del count, note
