"""Progress bars for anything that takes over two seconds; silent when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Call with the number of items finished since the last call, and a short note to show beside the bar."""

    def __call__(self, count: int, note: str = "", /) -> None:
        """``count`` items are finished; ``note`` replaces the note shown, unless empty."""
        ...


@contextmanager
def progress_bar(description: str, total: int | None, *, show: bool | None = None) -> Generator[Advance]:
    """Show a bar with rate and remaining time on standard error; ``show=None`` means: if that is a terminal.

    ``total`` None: nobody knows, so it shows what is finished.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield _ignore
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
        task = progress.add_task(description, total=total, note="")

        def advance(count: int, note: str = "", /) -> None:
            progress.advance(task, count)
            if note:
                progress.update(task, note=note)

        yield advance


def _ignore(count: int, note: str = "", /) -> None:
    del count, note
