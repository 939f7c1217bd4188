"""Indexes of the fields that filters name, made by SQLite once a filter was slow.

Among a million passages, a filter that looks at each takes 70 to 210 ms, and 2 with an index of its field. An index has
all that the rows of a version are found by, so SQLite reads nothing else. It changes neither versions nor passages.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import TypeVar

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
MIN_PASSAGES = 100_000
"""With fewer passages, no filter is slow."""
SLOW_S = 0.05
_BUSY_S = 10.0  # wait for a writer; else the next slow filter tries again
_SAMPLED_ROWS = 1_000  # of an index, from which SQLite learns which of several is best

_making: set[tuple[Path, str]] = set()
"""Fields that a thread is at work for; which have an index, the table itself knows."""
_lock = threading.Lock()


def filtered(find: Callable[[], _Found], path: Path, fields: Collection[str], num_passages: int) -> _Found:
    """What ``find`` finds in a table at ``path``; if it was slow, another thread indexes the ``fields`` it looked at.

    Where the table cannot be written, it stays as it is.
    """
    begin = time.perf_counter()
    found = find()
    seconds = time.perf_counter() - begin
    if seconds >= SLOW_S and num_passages >= MIN_PASSAGES:
        with _lock:
            new = sorted(name for name in fields if (path, name) not in _making)
            _making.update((path, name) for name in new)
        if new:
            threading.Thread(target=_make, args=(path, new), name="d2llm index of a filter", daemon=True).start()
    return found


def _make(path: Path, fields: Collection[str]) -> None:
    begin = time.perf_counter()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", timeout=_BUSY_S, uri=True)) as connection:
            present = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'index'")}
            missing = [name for name in fields if f"filter_{name}" not in present]
            if not missing:
                return
            for name in missing:
                index = f"CREATE INDEX IF NOT EXISTS `filter_{name}` ON passages(`{name}`, born, died, d2_row)"
                connection.execute(index)
            connection.execute(f"PRAGMA analysis_limit={_SAMPLED_ROWS}")
            connection.execute("ANALYZE passages")
            connection.commit()
        _log.info("%s: indexed %s in %.1f s, because filters are slow", path, missing, time.perf_counter() - begin)
    except sqlite3.Error as error:
        _log.info("%s: fields that filters name cannot be indexed (%s)", path, error)
    finally:
        with _lock:
            _making.difference_update((path, name) for name in fields)
