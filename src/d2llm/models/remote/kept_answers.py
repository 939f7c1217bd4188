"""Answers of an endpoint that are on disk as soon as they are there, until what is made of them is stored.

A process that is killed (SIGKILL, power) leaves its file behind; the next one that does the same work takes it over,
and asks only for what it lacks. An error or Ctrl-C needs none of this: what came before it is stored at once.
"""

from __future__ import annotations

import json
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

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json

_SYNC_SECONDS = 1.0  # the most that can be lost if the machine goes down; a killed process loses nothing
_in_use: ContextVar[KeptAnswers | None] = ContextVar("answers", default=None)


class KeptAnswers:
    """The answers that a process received and has not stored, and those that killed processes left in the folder.

    Each process has a file of its own, which it locks. Nothing is read or written before the first request, so work
    that asks no endpoint leaves nothing behind. ``purpose`` is what the answers are for: others do not get them.
    """

    def __init__(self, folder: Path, purpose: str) -> None:
        self._folder, self._purpose = folder, purpose
        self._path = folder / _new_name()
        self._left: dict[str, list[dict[str, Any]]] = {}  # by killed processes, and not asked for yet
        self._lock: filelock.BaseFileLock | None = None
        self._guard = threading.Lock()
        self._synced = 0.0

    @contextmanager
    def used(self) -> Generator[None]:
        """All requests of completions in this block, from this thread, use these answers."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)
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
        with self._guard, _errors_of(self._path):
            if self._lock is not None:  # else the work has ended
                self._append([(self._name(request), answer)])

    def clear(self) -> None:
        """Forget the answers received so far: what was made of them is stored.

        Raises:
            InputError: the file cannot be written.
        """
        with self._guard, _errors_of(self._path):
            if self._lock is not None:
                self._write_anew()

    def _name(self, request: Mapping[str, Any]) -> str:
        return fingerprint_json([self._purpose, request])

    def _open(self) -> None:
        if self._lock is not None:
            return
        with _errors_of(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_of(self._path)
            self._lock.acquire()
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


def kept_answers() -> KeptAnswers | None:
    """The answers that requests from this thread use, if any."""
    return _in_use.get()


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
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values: Any = json.loads(line)
            answers.append((values["request"], dict(values["answer"])))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}:{number}: is not an answer of an endpoint ({error!r}); delete the line, and it is asked again"
            ) from error
    return answers


@contextmanager
def _errors_of(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: answers of the endpoint cannot be kept ({error.strerror or error}). Free some space, or make the "
            "folder writable, and run the same command again to continue"
        ) from error
