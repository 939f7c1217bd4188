"""The student behind the server: texts become vectors in batches shared by all clients, pairs become scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from d2llm.apps.server.batching import Batcher
from d2llm.apps.server.facts import note_items
from d2llm.core.errors import ModelError
from d2llm.core.types import Task
from d2llm.models.core_workers import core_pool
from d2llm.models.student import Student

TextKind = Literal["query", "passage"]
Observe = Callable[[str, float], None]
_CHARACTERS_A_TOKEN = 4  # about; a batch is made up before its texts are tokenized
_AROUND = 4  # tokens that a model adds, and a short text's rounding
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of texts.

    Attributes:
        vectors: [n, dim] as the student gives them, not of unit length.
        num_tokens: of each text, as far as it was read.
        truncated: places of the texts that were cut to the student's limit.
        queued: seconds that it waited.
        worked: seconds that it took, with what else was in its batches.
    """

    vectors: NDArray[np.float32]
    num_tokens: tuple[int, ...]
    truncated: tuple[int, ...]
    queued: float = 0.0
    worked: float = 0.0


@dataclass(frozen=True, slots=True)
class Scored:
    """A query's scores with passages.

    Attributes:
        logits: [n] of the IEM; their sigmoid is a probability.
        num_tokens: of query and passages together, as far as they were read.
        truncated: places of the passages that were cut to the student's limit.
        query_truncated: whether the query was.
    """

    logits: NDArray[np.float32]
    num_tokens: int
    truncated: tuple[int, ...]
    query_truncated: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    kind: TextKind
    cost: int


@dataclass(frozen=True, slots=True)
class _Vector:
    vector: NDArray[np.float32]
    num_tokens: int
    truncated: bool


class ModelService:
    """One student, shared by all requests. ``name`` is what clients call it.

    On a CPU as many batches are encoded side by side as there are cores, each as large as the student's own; an
    accelerator has one at a time. ``batch_tokens`` is how large, by default ``Student.batch_tokens``.
    """

    def __init__(
        self,
        student: Student,
        name: str,
        *,
        queue_texts: int = 2_048,
        batch_tokens: int | None = None,
        batch_wait_seconds: float = 0.0,
        observe: Observe = lambda _stage, _seconds: None,
        observe_batch: Callable[[int, float], None] = lambda _size, _seconds: None,
    ) -> None:
        self.student = student
        self.name = name
        self.fingerprint = student.fingerprint
        self.dim = student.vector_dim
        backbone = student.config.backbone
        self.max_query_tokens = backbone.max_query_tokens
        self.max_passage_tokens = backbone.max_passage_tokens
        self.batch_tokens = batch_tokens or student.batch_tokens
        self._observe = observe
        on_cpu = student.backbone.device.type == "cpu"
        self._texts: Batcher[_Text, _Vector] = Batcher(
            self._encode_batch,
            name="encode",
            max_queued=queue_texts,
            max_batch=self.batch_tokens,
            cost=lambda text: text.cost,
            wait_seconds=batch_wait_seconds,
            observe_batch=observe_batch,
            lanes=core_pool() if on_cpu else None,
            num_lanes=torch.get_num_threads() + 1 if on_cpu else 1,
        )
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="score")

    @property
    def num_queued(self) -> int:
        """Texts that wait to be encoded."""
        return self._texts.num_queued

    def start(self) -> None:
        """Begin to work; call it in the event loop."""
        self._texts.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish what was admitted."""
        await self._texts.stop(timeout)
        self._scoring.shutdown(wait=False, cancel_futures=True)

    async def encode(self, texts: Sequence[str], kind: TextKind, *, bounded: bool = True) -> Encoded:
        """Vectors of texts; ``bounded`` as in ``Batcher.submit``.

        Raises:
            OverloadedError: the queue is full.
            ModelError: a vector is not finite.
        """
        note_items(texts)
        return await self._encode([self._text(text, kind) for text in texts], bounded=bounded)

    async def score(self, query: str, passages: Sequence[str], task: Task = "asymmetric") -> Scored:
        """The IEM's scores of a query with passages.

        Raises:
            OverloadedError: the queue is full.
            ModelError: a vector or score is not finite.
        """
        note_items((query, *passages))
        texts = [self._text(query, "query"), *(self._text(passage, "passage") for passage in passages)]
        encoded = await self._encode(texts)
        logits = await self.score_vectors(encoded.vectors[0], encoded.vectors[1:], task)
        truncated = tuple(place - 1 for place in encoded.truncated if place)
        return Scored(logits, sum(encoded.num_tokens), truncated, 0 in encoded.truncated)

    async def score_vectors(
        self, query: NDArray[np.float32], passages: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """The IEM's scores [n] of a query's vector [dim] with passages' [n, dim].

        Raises:
            ModelError: a score is not finite.
        """
        logits = await self._in_thread(lambda: self.student.score(query, passages, task))
        if not np.isfinite(logits).all():
            raise ModelError("a score is not finite; check the student")
        return logits

    async def anchor_queries(self, vectors: NDArray[np.float32], task: Task = "asymmetric") -> NDArray[np.float32]:
        """[n, dim] whose inner products with passages' vectors are the score's inner-product part.

        Raises:
            InputError: the student's head has none.
        """
        return await self._in_thread(lambda: self.student.anchor_queries(vectors, task))

    async def in_lane(self, work: Callable[[], _Value]) -> _Value:
        """Run something else that uses the student's backbone, in turn with batches of texts."""
        return await self._texts.in_lane(work)

    async def _in_thread(self, work: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._scoring, work)

    def _text(self, text: str, kind: TextKind) -> _Text:
        limit = self.max_query_tokens if kind == "query" else self.max_passage_tokens
        return _Text(text, kind, min(limit, len(text) // _CHARACTERS_A_TOKEN + _AROUND))

    async def _encode(self, texts: Sequence[_Text], *, bounded: bool = True) -> Encoded:
        if not texts:
            return Encoded(np.zeros((0, self.dim), np.float32), (), ())
        done = await self._texts.submit(texts, bounded=bounded)
        self._observe("queue", done.queued)
        self._observe("encode", done.worked)
        return Encoded(
            np.stack([one.vector for one in done.results]),
            tuple(one.num_tokens for one in done.results),
            tuple(place for place, one in enumerate(done.results) if one.truncated),
            done.queued,
            done.worked,
        )

    def _encode_batch(self, texts: Sequence[_Text]) -> list[_Vector]:
        found: dict[int, _Vector] = {}
        for kind in ("query", "passage"):
            places = [place for place, text in enumerate(texts) if text.kind == kind]
            if not places:
                continue
            encode = self.student.encode_queries if kind == "query" else self.student.encode_passages
            encoded = encode([texts[place].text for place in places])
            if not np.isfinite(encoded.vectors).all():
                raise ModelError("the student's vector of a text is not finite; check the student")
            cut = set(encoded.truncated)
            for at, place in enumerate(places):
                found[place] = _Vector(encoded.vectors[at], encoded.lengths[at], at in cut)
        return [found[place] for place in range(len(texts))]
