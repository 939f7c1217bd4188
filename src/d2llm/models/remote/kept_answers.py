"""Answers of an endpoint that are on disk as soon as they are there, until what is made of them is stored.

A process that is killed (SIGKILL, power) leaves them behind; the next one that does the same work takes them, and asks
only for what it lacks. So does a process whose endpoint failed, or that was interrupted, if it has not stored what it
had by then.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.sqlite import HELD, is_locked

_log = logging.getLogger(__name__)

_BUSY_SECONDS = 60.0  # how long to wait for another process that writes
_PAGES_AT_RISK = 16  # the most that can be lost if the machine goes down; a killed process loses nothing
_in_use: ContextVar[KeptAnswers | None] = ContextVar("answers", default=None)


class KeptAnswers:
    """The answers that processes received and have not stored, in an SQLite file in a folder.

    Nothing is read or written before the first request, so work that asks no endpoint leaves nothing behind.
    ``purpose`` is what the answers are for: others do not get them. If the folder cannot be written, it is an
    ``InputError``, or a warning if that ``is_required`` not to be.
    """

    def __init__(self, folder: Path, purpose: str, *, is_required: bool = True) -> None:
        self._path, self._purpose, self._is_required = folder / "answers.db", purpose, is_required
        self._connection: sqlite3.Connection | None = None
        self._in_hand: set[int] = set()  # rows of answers that were received or taken, and are not stored
        self._guard = threading.Lock()
        self._has_failed = False
        self.is_broken_off = False
        """Whether the endpoint failed, the work was interrupted, or its results could not be stored, after these
        answers. Other errors may be about the answers themselves, so these are asked for again."""

    @classmethod
    def of_command(cls) -> KeptAnswers:
        """Those of a command that stores nothing of what it is told; they are in the user's cache folder."""
        return cls(user_cache_path("d2llm") / "answers", "command", is_required=False)

    @contextmanager
    def used(self) -> Generator[None]:
        """All requests of completions in this block, from this thread, use these answers.

        They are forgotten at its end, unless they are broken off.
        """
        try:
            with using(self):
                yield
        except (OSError, KeyboardInterrupt):
            self.is_broken_off = True
            raise
        finally:
            if not self.is_broken_off:
                self.clear()
            with self._guard:
                self._close()

    def take(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """An answer to a request that another process left; each is given once.

        Raises:
            InputError: the file cannot be read or written.
        """
        with self._guard, self._writing():
            if self._connection is None and not self._has_failed:
                self._connection = self._open()
            if self._connection is not None:
                same = "SELECT id, answer FROM answers WHERE request = ? ORDER BY id"
                for row, answer in self._connection.execute(same, (self._name(request),)):
                    if row not in self._in_hand:
                        self._in_hand.add(row)
                        return json.loads(answer)
        return None

    def add(self, request: Mapping[str, Any], answer: dict[str, Any]) -> None:
        """Write an answer to the disk.

        Raises:
            InputError: it cannot be written (disk full).
        """
        with self._guard, self._writing():
            if self._connection is not None:  # else the work has ended
                values = self._name(request), json.dumps(answer)
                added = self._connection.execute("INSERT INTO answers (request, answer) VALUES (?, ?)", values)
                self._in_hand.add(added.lastrowid or 0)

    def clear(self) -> None:
        """Forget the answers received so far: what was made of them is stored.

        Raises:
            InputError: the file cannot be written.
        """
        self.is_broken_off = False
        with self._guard, self._writing():
            if self._connection is not None:
                self._connection.execute("BEGIN")
                self._connection.executemany("DELETE FROM answers WHERE id = ?", ((row,) for row in self._in_hand))
                self._connection.execute("COMMIT")
                self._in_hand.clear()

    def _name(self, request: Mapping[str, Any]) -> str:
        return fingerprint_json([self._purpose, request])

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"wal_autocheckpoint={_PAGES_AT_RISK}"):
            connection.execute(f"PRAGMA {pragma}")
        columns = "id INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL, answer TEXT NOT NULL"
        connection.execute(f"CREATE TABLE IF NOT EXISTS answers ({columns})")
        connection.execute("CREATE INDEX IF NOT EXISTS by_request ON answers(request)")
        return connection

    def _close(self) -> None:
        connection, self._connection, self._in_hand = self._connection, None, set()
        if connection is None:
            return
        with suppress(sqlite3.Error, OSError):  # others use the file
            if connection.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None:
                connection.execute("PRAGMA busy_timeout=0")
                connection.execute("PRAGMA journal_mode=DELETE")  # fails if another process has it open
                self._path.unlink()
                self._path.parent.rmdir()
        connection.close()

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            problem = f"{self._path}: answers of the endpoint cannot be kept ({reason})"
            if self._is_required:
                advice = (
                    "free some space, make the folder writable, or delete the file if it is damaged, and run the same "
                    "command again to continue"
                )
                raise InputError(f"{problem}; {HELD if is_locked(error) else advice}") from error
            if not self._has_failed:
                _log.warning("%s; if this process is killed, they are asked for again", problem)
            self._has_failed = True


def kept_answers() -> KeptAnswers | None:
    """The answers that requests from this thread use, if any."""
    return _in_use.get()


@contextmanager
def using(answers: KeptAnswers | None) -> Generator[None]:
    """Requests in this block use these answers; None: they are sent in any case, and their answers not kept."""
    token = _in_use.set(answers)
    try:
        yield
    finally:
        _in_use.reset(token)
