"""Answers of an endpoint that are on disk as soon as they are there, until what is made of them is stored.

A process that is killed (SIGKILL, power) leaves its file behind; the next one that does the same work takes it over,
and asks only for what it lacks. So does a process whose endpoint failed, or that was interrupted, if it has not stored
what it had by then.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import filelock
from platformdirs import user_cache_path

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json

_log = logging.getLogger(__name__)

_SYNC_SECONDS = 1.0  # the most that can be lost if the machine goes down; a killed process loses nothing
_in_use: ContextVar[KeptAnswers | None] = ContextVar("answers", default=None)


class KeptAnswers:
    """The answers that a process received and has not stored, and those that killed processes left in the folder.

    Each process has a file of its own, which it locks. Nothing is read or written before the first request, so work
    that asks no endpoint leaves nothing behind. ``purpose`` is what the answers are for: others do not get them. If the
    folder cannot be written, it is an ``InputError``, or a warning if that ``is_required`` not to be.
    """

    def __init__(self, folder: Path, purpose: str, *, is_required: bool = True) -> None:
        self._folder, self._purpose, self._is_required = folder, purpose, is_required
        self._path = folder / _new_name()
        self._left: dict[str, list[dict[str, Any]]] = {}  # by killed processes, and not asked for yet
        self._lock: filelock.BaseFileLock | None = None
        self._guard = threading.Lock()
        self._synced = 0.0
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
        """An answer to a request that a killed process left; each is given once."""
        with self._guard:
            self._open()
            left = self._left.get(self._name(request))
            return left.pop(0) if left else None

    def add(self, request: Mapping[str, Any], answer: dict[str, Any]) -> None:
        """Write an answer to the disk.

        Raises:
            InputError: it cannot be written (disk full).
        """
        with self._guard, self._writing():
            if self._lock is not None:  # else the work has ended
                self._append([(self._name(request), answer)])

    def clear(self) -> None:
        """Forget the answers received so far: what was made of them is stored.

        Raises:
            InputError: the file cannot be written.
        """
        self.is_broken_off = False
        with self._guard, self._writing():
            if self._lock is not None:
                self._write_anew()

    def _name(self, request: Mapping[str, Any]) -> str:
        return fingerprint_json([self._purpose, request])

    def _open(self) -> None:
        if self._lock is not None or self._has_failed:
            return
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            own_lock = _lock_of(self._path)
            own_lock.acquire()
            self._lock = own_lock
            for path in sorted(self._folder.glob("*.jsonl")):
                lock = _lock_of(path)
                try:
                    lock.acquire()
                except filelock.Timeout:  # its process is alive
                    continue
                try:
                    left = _read(path) if path.exists() else []
                    if left:
                        self._append(left)
                except BaseException:
                    lock.release()
                    raise
                for name, answer in left:
                    self._left.setdefault(name, []).append(answer)
                _remove(path, lock)

    def _append(self, answers: list[tuple[str, dict[str, Any]]]) -> None:
        lines = [json.dumps({"request": name, "answer": answer}) + "\n" for name, answer in answers]
        with self._path.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def _write_anew(self) -> None:
        self._path.unlink(missing_ok=True)
        left = [(name, answer) for name, answers in self._left.items() for answer in answers]
        if left:
            self._append(left)

    def _close(self) -> None:
        if self._lock is None:
            return
        lock, path = self._lock, self._path
        self._lock, self._path, self._left = None, self._folder / _new_name(), {}
        if path.exists():
            lock.release()
            return
        _remove(path, lock)
        with suppress(OSError):  # others use it
            self._folder.rmdir()

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            problem = f"{self._path}: answers of the endpoint cannot be kept ({error.strerror or error})"
            if self._is_required:
                raise InputError(
                    f"{problem}. Free some space, or make the folder writable, and run the same command again to "
                    "continue"
                ) from error
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


def _new_name() -> str:
    return f"{secrets.token_hex(8)}.jsonl"


def _lock_of(path: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(path.with_suffix(".lock"), timeout=0)


def _remove(path: Path, lock: filelock.BaseFileLock) -> None:
    path.unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # another process looks at it, and finds no answers
        path.with_suffix(".lock").unlink()


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The answers in a file; a last line that was not finished is none."""
    content = path.read_bytes()
    answers: list[tuple[str, dict[str, Any]]] = []
    for line_number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values: Any = json.loads(line)
            answers.append((values["request"], dict(values["answer"])))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}:{line_number}: is not an answer of an endpoint ({error!r}); delete the line: it is asked again"
            ) from error
    return answers
