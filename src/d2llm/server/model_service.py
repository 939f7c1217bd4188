"""The student behind the server: encodes texts in batches shared by all clients, and scores passages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from d2llm.core.errors import ModelError
from d2llm.core.types import Explanation, Ranking, Task, WholeText
from d2llm.models.engines.core_workers import core_pool
from d2llm.models.late_chunking import EncodedChunks
from d2llm.models.student import Student
from d2llm.models.tokens import TOKENIZING, EncodedTexts, TextKind, TokenizedTexts
from d2llm.retrieval.cosine import ForwardingStudent
from d2llm.retrieval.protocols import expansion_fingerprint
from d2llm.server.batching import Batcher, Done
from d2llm.server.logs import note_items
from d2llm.server.ray_students import StudentReplicas
from d2llm.server.stopping import Stop

Observe = Callable[[str, float], None]
_FEW_CHARACTERS = 10_000  # tokenized in the event loop's thread, since switching threads costs more
_CHARACTERS_A_TURN = 100_000  # tokenized at a time, so that other requests do not wait long
_CHARACTERS_A_TOKEN = 4  # more or less
_TEXTS_WITH_TOKENS = 32  # encoded at a time for a write, so that queries do not wait long
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of texts.

    Attributes:
        vectors: [n, dim] as the student returns them, not of unit length.
        num_tokens: tokens of each text, after truncation.
        truncated: places of the texts that were truncated to the student's limit.
        queued: seconds spent waiting.
        worked: seconds spent encoding, including the rest of the batches.
        tokens: [tokens, token_dim], those of the tokens of a query, if they were requested.
    """

    vectors: NDArray[np.float32]
    num_tokens: tuple[int, ...]
    truncated: tuple[int, ...]
    queued: float = 0.0
    worked: float = 0.0
    tokens: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class PassageScores:
    """Scores of passages for a query.

    Attributes:
        logits: [n] logits of the IEM; ``ModelService.probabilities`` converts them to probabilities.
        num_tokens: total tokens of query and passages, after truncation.
        truncated: places of the passages that were truncated to the student's limit.
        query_truncated: whether the query was truncated.
    """

    logits: NDArray[np.float32]
    num_tokens: int
    truncated: tuple[int, ...]
    query_truncated: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    """A text in the queue: its token ids, or, if the vectors of its tokens are wanted, a query with its instruction."""

    ids: Sequence[int] = ()
    query: str | None = None
    instruction: str | None = None

    @property
    def cost(self) -> int:
        """Its number of tokens; of a query that was not tokenized yet, an estimate."""
        if self.query is None:
            return len(self.ids)
        return 2 + (len(self.query) + len(self.instruction or "")) // _CHARACTERS_A_TOKEN


class _ReadText(NamedTuple):
    """The vector of a text; of a query, also those of its tokens, their number, and whether it was truncated."""

    vector: NDArray[np.float32]
    tokens: NDArray[np.float32] | None = None
    num_tokens: int = 0
    truncated: bool = False


class ModelService:
    """One student, shared by all requests. ``name`` is its name for clients.

    On a CPU, as many batches run in parallel as there are cores; on an accelerator, one at a time. ``batch_tokens`` is
    the maximum size of a batch, by default ``Student.batch_tokens``. ``encoder`` encodes in place of the student.
    """

    def __init__(
        self,
        student: Student,
        name: str,
        *,
        queue_texts: int = 2_048,
        batch_tokens: int | None = None,
        batch_wait_seconds: float = 0.0,
        encoder: StudentReplicas | None = None,
        observe: Observe = lambda _stage, _seconds: None,
        observe_batch: Callable[[int, float], None] = lambda _size, _seconds: None,
    ) -> None:
        self.student = student
        self.name = name
        self.fingerprint = student.fingerprint
        self.token_fingerprint = student.token_fingerprint
        self.expansion_fingerprint = expansion_fingerprint(student)
        self.dim = student.vector_dim
        self.max_query_tokens = student.max_query_tokens
        self.max_passage_tokens = student.config.backbone.max_passage_tokens
        self.batch_tokens = batch_tokens or student.batch_tokens
        self._observe = observe
        self._encoder = encoder
        lanes, num_lanes = None, 1
        if encoder is not None:
            num_lanes = encoder.num_batches
        elif student.backbone.device.type == "cpu":
            # One more batch than threads waits for the next free core.
            lanes, num_lanes = core_pool(), torch.get_num_threads() + 1
        self._texts: Batcher[_Text, _ReadText] = Batcher(
            self._encode_batch,
            name="encode",
            max_queued=queue_texts,
            max_batch=self.batch_tokens,
            cost=lambda text: text.cost,
            wait_seconds=batch_wait_seconds,
            observe_batch=observe_batch,
            lanes=lanes,
            num_lanes=num_lanes,
        )
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._num_users = 0
        self._left = asyncio.Event()

    @property
    def num_queued(self) -> int:
        """Number of texts waiting to be encoded."""
        return self._texts.num_queued

    def start(self) -> None:
        """Start the workers; call it in the event loop."""
        self._texts.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted work, then stop."""
        await self._texts.stop(timeout)
        self._scoring.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End what encodes elsewhere, once no work uses it."""
        if self._encoder is not None:
            self._encoder.stop()

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Context for work that uses this service: ``retire`` waits until it has ended."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            self._left.set()

    async def retire(self) -> None:
        """Stop once nothing uses this service any more."""
        while self._num_users:
            self._left.clear()
            await self._left.wait()
        await self.stop()

    async def encode(
        self, texts: Sequence[str], kind: TextKind, *, instruction: str | None = None, bounded: bool = True
    ) -> Encoded:
        """Vectors of texts; ``instruction`` as in ``Student.encode_queries``, ``bounded`` as in ``Batcher.submit``.

        Raises:
            InputError: the instruction leaves no room for a query.
            OverloadedError: the queue is full.
            ModelError: a vector is not finite.
        """
        if bounded:  # the texts of a write are noted by the write itself
            note_items(texts)
        return await self._encode([(texts, kind)], instruction=instruction, bounded=bounded)

    async def encode_query(self, text: str, *, instruction: str | None = None, with_tokens: bool = False) -> Encoded:
        """The vector of a query; ``with_tokens`` also those of its tokens, from the same pass through the backbone.

        Raises:
            InputError: the instruction leaves no room for a query.
            OverloadedError: the queue is full.
            ModelError: a vector is not finite.
        """
        if not with_tokens:
            return await self.encode([text], "query", instruction=instruction)
        note_items([text])
        done = await self._submit([_Text(query=text, instruction=instruction)])
        (read,) = done.results
        truncated = (0,) if read.truncated else ()
        return Encoded(read.vector[None], (read.num_tokens,), truncated, done.queued, done.worked, read.tokens)

    async def score(self, query: str, passages: Sequence[str], task: Task) -> PassageScores:
        """The IEM's scores of passages for a query.

        Raises:
            OverloadedError: the queue is full.
            ModelError: a vector or score is not finite.
        """
        note_items((query, *passages))
        encoded = await self._encode([([query], "query"), (passages, "passage")])
        logits = await self.score_vectors(encoded.vectors[0], encoded.vectors[1:], task)
        truncated = tuple(place - 1 for place in encoded.truncated if place)
        return PassageScores(logits, sum(encoded.num_tokens), truncated, 0 in encoded.truncated)

    async def score_vectors(
        self, query: NDArray[np.float32], passages: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """The IEM's scores [n] of passages' vectors [n, dim] for a query's vector [dim].

        Raises:
            ModelError: a score is not finite.
        """
        logits = await self._in_thread(lambda: self.student.score(query, passages, task))
        if not np.isfinite(logits).all():
            raise ModelError("a score is not finite; check the student")
        return logits

    def probabilities(self, logits: NDArray[np.float32], task: Task) -> NDArray[np.float64]:
        """Scores [n] as numbers in [0, 1]: calibrated if the student is calibrated for this task, else the sigmoid."""
        calibration = self.student.calibration
        if task in calibration.tasks:
            return calibration.probabilities(logits, task)
        return np.asarray(expit(logits.astype(np.float64)))

    def probabilities_of(self, ranking: Ranking, task: Task, *, iem: bool) -> list[float | None]:
        """How probable it is that each passage of a ranking is relevant, by the student's own score.

        None if the student is not calibrated for this task, if the explanations, which have the parts of that score,
        were not requested, or if a teacher has scored the passage. ``iem``: whether the ranking is by the student's
        score, not by inner products alone.
        """
        has_score = iem or self.student.why_no_interaction(task) is not None
        if task not in self.student.calibration.tasks or not has_score:
            return [None] * len(ranking.passages)
        scores = [None if place.log_odds is not None else _own_score(place.explanation) for place in ranking.passages]
        known = np.array([0.0 if score is None else score for score in scores], np.float64)
        values = self.student.calibration.probabilities(known, task).tolist()
        return [None if score is None else value for score, value in zip(scores, values, strict=True)]

    def probability_kind(self, task: Task) -> str:
        """How ``probabilities`` are computed, as a short text for a header."""
        calibration = self.student.calibration
        if task in calibration.tasks:
            return f"calibrated; task={task}; base-rate={calibration.base_rate:g}"
        return f"uncalibrated; task={task}; the sigmoid of the score, ordered but not a probability"

    async def query_vectors(self, vectors: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
        """[n, dim] query vectors; inner products with passages' vectors are the score's inner-product part.

        Raises:
            InputError: the student's head has no inner-product part.
        """
        return await self._in_thread(lambda: self.student.query_vectors(vectors, task))

    async def in_lane(self, work: Callable[[], _Value]) -> _Value:
        """Run other work that uses the student's backbone, in turn with batches of texts."""
        return await self._texts.in_lane(work)

    async def _in_thread(self, work: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._scoring, work)

    async def _encode(
        self,
        parts: Sequence[tuple[Sequence[str], TextKind]],
        *,
        instruction: str | None = None,
        bounded: bool = True,
    ) -> Encoded:
        """Vectors of the texts of all parts, one part after the other; an ``instruction`` is for parts of queries."""
        num_texts = sum(len(texts) for texts, _ in parts)
        if not num_texts:
            return Encoded(np.zeros((0, self.dim), np.float32), (), ())
        if bounded:
            self._texts.require_room(num_texts)
        ids: list[Sequence[int]] = []
        lengths: list[int] = []
        truncated: list[int] = []
        for texts, kind in parts:
            for some in self._slices(texts):
                tokenized = await self._tokenize(some, kind, instruction)
                truncated += [len(ids) + place for place in tokenized.truncated]
                ids += tokenized.ids
                lengths += tokenized.lengths
        done = await self._submit([_Text(own) for own in ids], bounded=bounded)
        vectors = np.stack([read.vector for read in done.results])
        return Encoded(vectors, tuple(lengths), tuple(truncated), done.queued, done.worked)

    async def _submit(self, texts: Sequence[_Text], *, bounded: bool = True) -> Done[_ReadText]:
        done = await self._texts.submit(texts, bounded=bounded)
        self._observe("queue", done.queued)
        self._observe("encode", done.worked)
        return done

    def _slices(self, texts: Sequence[str]) -> Iterator[Sequence[str]]:
        """Parts of a request's texts, between which those of other requests are tokenized."""
        if not self.student.backbone.reads_tokens:  # an endpoint has its own ways to be fair
            yield texts
            return
        start = num_characters = 0
        for place, text in enumerate(texts):
            if num_characters + len(text) > _CHARACTERS_A_TURN and place > start:
                yield texts[start:place]
                start, num_characters = place, 0
            num_characters += len(text)
        yield texts[start:]

    async def _tokenize(self, texts: Sequence[str], kind: TextKind, instruction: str | None) -> TokenizedTexts:
        tokenize = partial(self.student.tokenize, texts, kind, instruction=instruction)
        num_characters = sum(map(len, texts)) + len(texts) * len(instruction or "")
        # A remote backbone waits for its endpoint here.
        if not self.student.backbone.reads_tokens or TOKENIZING.locked() or num_characters > _FEW_CHARACTERS:
            return await asyncio.to_thread(tokenize)
        return tokenize()

    def _encode_batch(self, texts: Sequence[_Text]) -> list[_ReadText | Exception]:
        """What was read of each text: those without token embeddings together, and queries by instruction."""
        places: dict[tuple[bool, str | None], list[int]] = {}
        for place, text in enumerate(texts):
            places.setdefault((text.query is None, text.instruction), []).append(place)
        results: dict[int, _ReadText | Exception] = {}
        for (has_ids, instruction), own in places.items():
            chosen = [texts[place] for place in own]
            read = self._read_ids(chosen) if has_ids else self._read_queries(chosen, instruction)
            results |= zip(own, map(_checked, read), strict=True)
        return [results[place] for place in range(len(texts))]

    def _read_ids(self, texts: Sequence[_Text]) -> list[_ReadText]:
        vectors = (self._encoder or self.student).encode_tokens([text.ids for text in texts])
        return list(map(_ReadText, vectors))

    def _read_queries(self, texts: Sequence[_Text], instruction: str | None) -> list[_ReadText]:
        encoder = self._encoder or self.student
        read = encoder.encode_with_tokens([text.query or "" for text in texts], "query", instruction=instruction)
        assert read.tokens is not None
        truncated = [place in read.truncated for place in range(len(texts))]
        return list(map(_ReadText, read.vectors, read.tokens.split(), read.lengths, truncated))


def _checked(read: _ReadText) -> _ReadText | ModelError:
    """What was read of a text, or the error of this text alone."""
    is_finite = np.isfinite(read.vector).all() and (read.tokens is None or np.isfinite(read.tokens).all())
    return read if is_finite else ModelError("the student's vector of a text is not finite; check the student")


class StudentLane(ForwardingStudent):
    """A student for threads other than the event loop's.

    After ``stop``, it no longer waits for what it has asked for.
    """

    def __init__(self, models: ModelService, loop: asyncio.AbstractEventLoop, stop: Stop | None = None) -> None:
        super().__init__(models.student)
        self._models = models
        self._loop = loop
        self._stop = stop or Stop()

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """Encode queries in the shared batches."""
        return self._encode(texts, "query", advance, instruction)

    def encode_passages(self, texts: Sequence[str], *, advance: Callable[[int], None] | None = None) -> EncodedTexts:
        """Encode passages in the shared batches."""
        return self._encode(texts, "passage", advance)

    def encode_with_tokens(
        self,
        texts: Sequence[str],
        kind: TextKind,
        *,
        instruction: str | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> EncodedTexts:
        """Encode texts and their tokens, some at a time, in turn with the shared batches."""
        encode = partial(self._models.student.encode_with_tokens, kind=kind, instruction=instruction, advance=advance)
        parts: list[EncodedTexts] = []
        for start in range(0, len(texts), _TEXTS_WITH_TOKENS):
            some = texts[start : start + _TEXTS_WITH_TOKENS]
            parts.append(self._in_lane(partial(encode, some)))
        return EncodedTexts.join(parts, self.vector_dim)

    def term_factors(self, queries: Sequence[str]) -> Sequence[Mapping[str, float]] | None:
        """How much the words of queries count, in turn with the shared batches."""
        return self._in_lane(lambda: self._models.student.term_factors(queries))

    def encode_chunks(
        self, texts: Iterable[tuple[WholeText, Sequence[tuple[int, int]]]], *, with_tokens: bool = False
    ) -> EncodedChunks:
        """Encode parts of texts, in turn with the shared batches."""
        return self._in_lane(lambda: self._models.student.encode_chunks(texts, with_tokens=with_tokens))

    def _in_lane(self, work: Callable[[], _Value]) -> _Value:
        return self._stop.result(self._models.in_lane(work), self._loop)

    def _encode(
        self,
        texts: Sequence[str],
        kind: TextKind,
        advance: Callable[[int], None] | None,
        instruction: str | None = None,
    ) -> EncodedTexts:
        work = self._models.encode(texts, kind, instruction=instruction, bounded=False)
        done = self._stop.result(work, self._loop)
        if advance is not None:
            advance(len(texts))
        return EncodedTexts(done.vectors, done.truncated, sum(done.num_tokens), done.num_tokens)


def _own_score(explanation: Explanation | None) -> float | None:
    """The part of a passage's score that needs no index: what it is calibrated on."""
    if explanation is None or explanation.dot is None or explanation.interaction is None:
        return None
    return explanation.dot + explanation.interaction
