"""The served student for the server's own writing: its texts take turns with those of the clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.types import Task
from d2llm.models.backbone import EncodedTexts, TextKind
from d2llm.retrieval.cosine import ForwardingStudent
from d2llm.server.model_service import ModelService


class StudentLane(ForwardingStudent):
    """A student for threads other than the event loop's; fits ``SearchStudent`` and ``ProjectingStudent``."""

    def __init__(self, models: ModelService, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(models.student)
        self._models = models
        self._student = models.student
        self._loop = loop

    @property
    def has_anchor(self) -> bool:
        """The student's."""
        return self._student.has_anchor

    @property
    def can_project(self) -> bool:
        """The student's."""
        return self._student.can_project

    def encode_queries(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """The student's vectors of queries."""
        return self._encode(texts, "query", advance)

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """The student's vectors of passages."""
        return self._encode(texts, "passage", advance)

    def anchor_queries(self, query_vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """The student's."""
        return self._student.anchor_queries(query_vectors, task)

    def score(
        self, query_vector: NDArray[np.float32], passage_vectors: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """The student's."""
        return self._student.score(query_vector, passage_vectors, task)

    def project_passages(self, passage_vectors: NDArray[np.float32]) -> Tensor:
        """The student's."""
        return self._student.project_passages(passage_vectors)

    def _encode(self, texts: Sequence[str], kind: TextKind, advance: Callable[[int], None] | None) -> EncodedTexts:
        done = asyncio.run_coroutine_threadsafe(self._models.encode(texts, kind, bounded=False), self._loop).result()
        if advance is not None:
            advance(len(texts))
        return EncodedTexts(done.vectors, done.truncated, sum(done.num_tokens), done.num_tokens)
