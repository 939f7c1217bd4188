"""One writer at a time: the write lock of an index, and the cleanup after a killed writer."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import filelock

from d2llm.core.errors import IndexLockedError, StorageError
from d2llm.store.storage import storage_errors
from d2llm.store.table_files import TableFiles

LOCK_NAME = "write.lock"


class WriteLock:
    """The lock of the index in a folder. It is an operating system lock, so a killed writer releases it."""

    def __init__(self, folder: Path, files: TableFiles, check: Callable[[], None]) -> None:
        """Args: ``check`` is called after the lock is acquired, before anything is changed."""
        self._folder = folder
        self._files = files
        self._check = check
        self._lock = filelock.FileLock(folder / LOCK_NAME, timeout=0)

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock; may be nested. Errors: ``IndexStore.writing``."""
        with storage_errors(self._folder):
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                raise IndexLockedError(f"{self._folder}: another process is writing to it; try again later") from error
        try:
            if self._lock.lock_counter > 1:
                yield
                return
            self._check()
            with storage_errors(self._folder):
                self._files.begin()
            try:
                yield
            finally:
                with storage_errors(self._folder):
                    self._files.end()
        finally:
            self._lock.release()

    def finish(self) -> None:
        """For readers: complete the work of a killed writer. Does nothing while a writer is still running."""
        if self._lock.is_locked or not self._files.is_unfinished():
            return
        try:
            with self.held():
                pass
        except IndexLockedError:
            pass
        except StorageError:
            self._files.after_crash = True  # without write permission, every reader compares everything
