"""Progress of work that takes more than two seconds: a bar in a terminal, or an occasional line in a log.

``showing_progress`` says once, for everything that is called inside it, whether there is any.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from d2llm.core.time_limit import check_time, seconds_left

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID


Advance = Callable[[int], None]
"""Called with the number of items finished since the last call."""


class Bar(Protocol):
    """Call with the number of items finished since the last call, and a short note to show beside the bar."""

    def __call__(self, count: int, note: str = "", /) -> None:
        """Report ``count`` more finished items; ``note`` replaces the note shown, unless it is empty."""
        ...


LINE_SECONDS = 30.0
"""Minimum time between two log lines."""
_WORK = "_d2llm_work"
"""The attribute of an error for ``work_of``."""
BAR_SECONDS = 2.0
"""Work that takes less time shows no bar."""
remarks = logging.getLogger("d2llm.remarks")
"""Messages for users of the command line about what is done; they are not warnings."""
_setting: ContextVar[bool | None] = ContextVar("whether to show progress", default=None)
_display: ContextVar[Progress | None] = ContextVar("the display of the outermost bar", default=None)


@contextmanager
def showing_progress(show: bool | None) -> Generator[None]:
    """Set whether progress is shown by what runs inside this block.

    Args:
        show: True: bars, even without a terminal. False: neither bars nor log lines. None: as outside the block, where
            a terminal shows bars by default, and the log has lines otherwise.

    Example:
        >>> from d2llm import Index, showing_progress
        >>> with showing_progress(False), Index.create("tea.index", "d2llm-minilm") as index:
        ...     report = index.upsert([{"id": "tea", "text": "Green tea needs water of 80 °C."}])
    """
    token = _setting.set(_setting.get() if show is None else show)
    try:
        yield
    finally:
        _setting.reset(token)


@contextmanager
def progress_bar(description: str, total: int | None, *, done: int = 0, seconds: float = math.inf) -> Generator[Bar]:
    """Show a bar with rate and remaining time on standard error or, without a terminal, log a line twice a minute.

    A nested task shows its own bar below the outer one. Work with a time limit (``core.time_limit``) stops where it
    reports its progress. The remaining time is at most that until the limit.

    Args:
        description: what is being done.
        total: number of items; None: unknown, so only the number of finished items is shown.
        done: items that an earlier run finished; they say nothing about this run's rate and remaining time.
        seconds: the work ends by itself after this time, however many items are finished by then.
    """
    with _shown(description, total, done, min(seconds, seconds_left())) as show:

        def advance(count: int, note: str = "", /) -> None:
            show(count, note)
            check_time()

        try:
            yield advance
        except Exception as error:
            vars(error).setdefault(_WORK, description)
            raise


def work_of(error: BaseException) -> str:
    """What was being done when an error was raised: the description of the innermost bar; "" without one."""
    return str(vars(error).get(_WORK, ""))


@contextmanager
def _shown(description: str, total: int | None, done: int, limit: float) -> Generator[Bar]:
    """Show the progress, as the setting says; yields a function that does not look at the time limit.

    ``limit``: how long the work may take, in seconds.
    """
    show = _setting.get()
    if show is False:
        yield ignore
        return
    if not (sys.stderr.isatty() or show):
        yield _lines(description, total, done, limit)
        return
    outer = _display.get()
    if outer is not None:  # a terminal has room for only one display
        task = outer.add_task(description, total=total, completed=done, note="", ends=time.monotonic() + limit)
        try:
            yield _advance_of(outer, task)
        finally:
            outer.remove_task(task)
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
    from rich.text import Text

    class TimeLeftColumn(TimeRemainingColumn):
        """The time until the work is finished, or until its limit."""

        def render(self, task: Task) -> Text:
            left = max(0.0, task.fields["ends"] - time.monotonic())
            needed = task.time_remaining
            if task.finished or math.isinf(left) or (needed is not None and needed <= left):
                return super().render(task)
            return Text(str(timedelta(seconds=int(left))), style="progress.remaining")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress, ends = Progress(*columns, console=Console(stderr=True)), time.monotonic() + limit
    token = _display.set(progress)
    try:
        yield _advance_of(progress, progress.add_task(description, total=total, completed=done, note="", ends=ends))
    finally:
        if progress.live.is_started:
            progress.stop()
        _display.reset(token)


def _advance_of(progress: Progress, task: TaskID) -> Bar:
    started = time.monotonic()

    def advance(count: int, note: str = "", /) -> None:
        if not progress.live.is_started and time.monotonic() - started >= BAR_SECONDS:
            progress.start()
        progress.advance(task, count)
        if note:
            progress.update(task, note=note)

    return advance


def _lines(description: str, total: int | None, done: int, limit: float) -> Bar:
    """Log the progress at most every ``LINE_SECONDS``; work that takes less time logs nothing."""
    started = logged = time.monotonic()
    finished = done
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
        of_total = ""
        if total:
            needed = seconds * (total - finished) / (finished - done) if finished > done else math.inf
            needed = min(needed, max(0.0, limit - seconds))
            left = f", {_duration(needed)} left" if math.isfinite(needed) else ""
            of_total = f" of {total:,} ({finished / total:.0%}) after {_duration(seconds)}{left}"
        remarks.info("%s: %s%s%s", description, f"{finished:,}", of_total, f", {remark}" if remark else "")

    return advance


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def ignore(count: int, note: str = "", /) -> None:
    """Discard progress."""
    del count, note
