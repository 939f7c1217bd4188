"""The students of all indexes: each is loaded once, for as long as an index that it made is served."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from d2llm.server.model_service import ModelService
from d2llm.store.shards import Storage

_Key = tuple[str, str | None, str | None]
"""Fingerprints of a student, of its projection of tokens and of its document expansion."""


class StudentPool:
    """Loaded students, each shared by the indexes that it made.

    Two students that differ in the projection of tokens or in the words that they add to passages are two, because an
    index stores what these make. An index without either takes any.

    Whoever opens an index calls ``take``, in any thread, and later ``leave``. ``load`` loads the student of an index.
    """

    def __init__(self, load: Callable[[Storage], ModelService]) -> None:
        self._load = load
        self._students: dict[_Key, ModelService] = {}
        self._num_uses: Counter[_Key] = Counter()
        self._counting, self._loading = threading.Lock(), threading.Lock()  # the first is never held for long

    @property
    def students(self) -> tuple[ModelService, ...]:
        """All loaded students."""
        with self._counting:
            return tuple(self._students.values())

    def take(self, store: Storage) -> ModelService:
        """The student that made an index; it is loaded unless another index uses it.

        Raises:
            D2LLMError: it cannot be loaded, or is not the one that made the index.
        """
        manifest = store.manifest
        required = manifest["student"], manifest["token_projection"], manifest["document_expansion"]
        student = self._share(required)
        if student is not None:
            return student
        with self._loading:  # one at a time: another thread may be loading the same one
            return self._share(required) or self._add(self._load(store))

    async def leave(self, student: ModelService) -> None:
        """End a use that ``take`` began; after the last one the student finishes its requests and stops."""
        with self._counting:
            key = _key(student)
            self._num_uses[key] -= 1
            if self._num_uses[key]:
                return
            del self._students[key], self._num_uses[key]
        await student.retire()

    def _share(self, required: _Key) -> ModelService | None:
        with self._counting:
            for key, student in self._students.items():
                if all(wanted in (None, known) for wanted, known in zip(required, key, strict=True)):
                    self._num_uses[key] += 1
                    return student
            return None

    def _add(self, student: ModelService) -> ModelService:
        with self._counting:
            key = _key(student)  # may be known, if the index wanted what its student no longer has
            self._num_uses[key] += 1
            return self._students.setdefault(key, student)


def _key(student: ModelService) -> _Key:
    return student.fingerprint, student.token_fingerprint, student.expansion_fingerprint
