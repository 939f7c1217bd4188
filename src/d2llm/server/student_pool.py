"""The students of all indexes: each is loaded once, for as long as an index that it made is served."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable

from d2llm.server.model_service import ModelService
from d2llm.store.index_store import IndexStore


class StudentPool:
    """Loaded students by fingerprint, each shared by the indexes that it made.

    Whoever opens an index calls ``take``, in any thread, and later ``leave``. ``load`` loads the student of an index.
    """

    def __init__(self, load: Callable[[IndexStore], ModelService]) -> None:
        self._load = load
        self._students: dict[str, ModelService] = {}
        self._num_uses: Counter[str] = Counter()
        self._counting, self._loading = threading.Lock(), threading.Lock()  # the first is never held for long

    @property
    def students(self) -> tuple[ModelService, ...]:
        """All loaded students."""
        with self._counting:
            return tuple(self._students.values())

    def take(self, store: IndexStore) -> ModelService:
        """The student that made an index; it is loaded unless another index uses it.

        Raises:
            D2LLMError: it cannot be loaded, or is not the one that made the index.
        """
        fingerprint = store.manifest["student"]
        student = self._share(fingerprint)
        if student is not None:
            return student
        with self._loading:  # one at a time: another thread may be loading the same one
            return self._share(fingerprint) or self._add(self._load(store))

    async def leave(self, student: ModelService) -> None:
        """End a use that ``take`` began; after the last one the student finishes its requests and stops."""
        with self._counting:
            self._num_uses[student.fingerprint] -= 1
            if self._num_uses[student.fingerprint]:
                return
            del self._students[student.fingerprint], self._num_uses[student.fingerprint]
        await student.retire()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted work of all students, then stop them."""
        await asyncio.gather(*(student.stop(timeout) for student in self.students))

    def _share(self, fingerprint: str) -> ModelService | None:
        with self._counting:
            student = self._students.get(fingerprint)
            if student is not None:
                self._num_uses[fingerprint] += 1
            return student

    def _add(self, student: ModelService) -> ModelService:
        with self._counting:
            self._students[student.fingerprint] = student
            self._num_uses[student.fingerprint] = 1
        return student
