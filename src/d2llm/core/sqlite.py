"""What SQLite's errors mean to whoever has to mend their cause."""

from __future__ import annotations

import sqlite3

HELD = "another program holds it locked; close that program or wait for it, then run the same command again"
"""What to do about a file that ``is_locked``."""


def is_locked(error: BaseException) -> bool:
    """Whether another connection kept a file locked for longer than SQLite was told to wait.

    By the message: Python 3.10 has no codes of SQLite's errors.
    """
    return isinstance(error, sqlite3.OperationalError) and str(error).endswith("is locked")
