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
from d2llm.models.document_expansion import LearnedWords
from d2llm.models.engines.core_workers import core_pool
from d2llm.models.late_chunking import EncodedChunks
from d2llm.models.protocols import expansion_fingerprint
from d2llm.models.score_features import FeatureWeights
from d2llm.models.student import Student
from d2llm.models.text_scores import ScoringCorpus, TextQuery, TextScorer, window_texts, word_weights
from d2llm.models.tokens import TOKENIZING, EncodedTexts, TextKind, TokenizedTexts, TokenVectors
from d2llm.retrieval.cosine import ForwardingStudent
from d2llm.server.batching import Batcher, Done, Stop
from d2llm.server.logs import note_items
from d2llm.server.ray_students import StudentReplicas
from d2llm.store.word_segment import LEARNED

Observe = Callable[[str, float], None]
_FEW_CHARACTERS = 10_000  # tokenized in the event loop's thread, since switching threads costs more
_CHARACTERS_A_TURN = 100_000  # tokenized at a time, so that other requests do not wait long
_Value = TypeVar("_Value")
WordWeights = tuple[NDArray[np.uint64], NDArray[np.float32]]
"""The words [n] of a text, as numbers below 2**32, and their weights [n]."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of texts.

    Attributes:
        vectors: [n, dim] as the student returns them, not of unit length.
        num_tokens: tokens of each text, after truncation.
        truncated: places of the texts that were truncated to the student's limit.
        queued: seconds spent waiting.
        worked: seconds spent encoding, including the rest of the batches.
        tokens: [tokens, token_dim] of each text, those of its tokens, if they were requested.
    """

    vectors: NDArray[np.float32]
    num_tokens: tuple[int, ...]
    truncated: tuple[int, ...]
    queued: float = 0.0
    worked: float = 0.0
    tokens: Sequence[NDArray[np.float32]] | None = None

    def texts(self, first: int, token_dim: int | None) -> EncodedTexts:
        """The texts from ``first`` on, as a student returns them; ``token_dim`` is the width of a token's vector."""
        truncated = tuple(index - first for index in self.truncated if index >= first)
        lengths = self.num_tokens[first:]
        tokens = None if self.tokens is None else TokenVectors.join(self.tokens[first:], token_dim or 0)
        return EncodedTexts(self.vectors[first:], truncated, sum(lengths), lengths, tokens)


@dataclass(frozen=True, slots=True)
class PassageScores:
    """Scores of passages for a query, or for a query each.

    Attributes:
        scores: [n]; ``ModelService.probabilities`` converts them to probabilities.
        queries: [n] the query of each.
        num_tokens: total tokens of queries and passages, after truncation.
        truncated: places of the passages that were truncated to the student's limit.
        truncated_queries: places of the queries that were.
        corpus: by what their words were weighted.
    """

    scores: NDArray[np.float32]
    queries: Sequence[str]
    num_tokens: int
    truncated: tuple[int, ...]
    truncated_queries: tuple[int, ...]
    corpus: ScoringCorpus


class _Text(NamedTuple):
    """A text in the queue: its token ids, and, if the vectors of its tokens are wanted, its kind and its first token.

    The tokens before that are those of an instruction.
    """

    ids: Sequence[int]
    kind: TextKind | None = None
    start: int = 0


class _ReadText(NamedTuple):
    """The vector of a text; on request those of its tokens."""

    vector: NDArray[np.float32]
    tokens: NDArray[np.float32] | None = None


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
            cost=lambda text: len(text.ids),
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
        if self.student.backbone.reads_tokens:
            # The first batch makes the tokenizer's threads; without memory for them it would wait for ever.
            self.student.tokenize(["two", "texts"], "query")
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
        self,
        texts: Sequence[str],
        kind: TextKind,
        *,
        instruction: str | None = None,
        with_tokens: bool = False,
        bounded: bool = True,
    ) -> Encoded:
        """Vectors of texts, and ``with_tokens`` those of their tokens, from the same pass through the backbone.

        ``instruction`` is as in ``Student.encode_queries``, ``bounded`` as in ``Batcher.submit``.

        Raises:
            InputError: the instruction leaves no room for a query.
            OverloadedError: the queue is full.
            ModelError: a vector is not finite.
        """
        if bounded:  # the texts of a write are noted by the write itself
            note_items(texts)
        return await self._encode([(texts, kind)], instruction=instruction, with_tokens=with_tokens, bounded=bounded)

    async def score(self, queries: Sequence[str], passages: Sequence[str], corpus: ScoringCorpus) -> PassageScores:
        """The scores of passages, as in ``Student.rank``: for the only query, or each for the query in its place.

        Each distinct query is read once.

        Raises:
            OverloadedError: the queue is full.
            ModelError: a vector or score is not finite.
        """
        note_items((*queries, *passages))
        scorer = TextScorer(self.student, corpus)
        rows_of: dict[str, list[int]] = {}
        for row in range(len(passages)):
            rows_of.setdefault(queries[row % len(queries)], []).append(row)
        distinct = [*rows_of]
        encoded = await self._encode([(distinct, "query"), (passages, "passage")], with_tokens=scorer.with_tokens)
        windows = None
        if scorer.with_windows:
            some, counts = window_texts(passages)
            windows = TokenVectors((await self._encode([(some, "passage")], bounded=False)).vectors, counts)
        factors = await self._factors(scorer, distinct)

        def score() -> NDArray[np.float32]:
            num = len(distinct)
            texts = scorer.rows_of(passages, encoded.texts(num, self.student.token_dim), windows)
            scores = np.zeros(len(passages), np.float32)
            for position, (text, rows) in enumerate(rows_of.items()):
                tokens = None if encoded.tokens is None else encoded.tokens[position]
                query = TextQuery(text, encoded.vectors[position], tokens, factors[position])
                scores[rows] = scorer.score(query, texts, np.array(rows, np.int64))
            return scores

        scores = _finite(await self._in_thread(score))
        cut = {position for position in encoded.truncated if position < len(distinct)}
        cut_queries = (
            tuple(position for position, text in enumerate(queries) if distinct.index(text) in cut) if cut else ()
        )
        cut_passages = tuple(position - len(distinct) for position in encoded.truncated if position >= len(distinct))
        query_of = [queries[row % len(queries)] for row in range(len(passages))]
        return PassageScores(scores, query_of, sum(encoded.num_tokens), cut_passages, cut_queries, corpus)

    async def read_query(self, text: str, corpus: ScoringCorpus) -> tuple[TextQuery, bool]:
        """A query to score passages of an index, and whether it was truncated.

        Raises:
            OverloadedError: the queue is full.
            ModelError: a vector is not finite.
        """
        scorer = TextScorer(self.student, corpus)
        encoded = await self.encode([text], "query", with_tokens=scorer.with_tokens)
        (factors,) = await self._factors(scorer, [text])
        tokens = None if encoded.tokens is None else encoded.tokens[0]
        return TextQuery(text, encoded.vectors[0], tokens, factors), bool(encoded.truncated)

    async def word_weights(self, texts: Sequence[str], kind: TextKind, corpus: ScoringCorpus) -> list[WordWeights]:
        """The words of texts, by the first 32 bits of their hashes, with weights (``text_scores.word_weights``).

        Raises:
            OverloadedError: the queue is full.
            ModelError: a vector is not finite.
        """
        factors: Sequence[Mapping[str, float] | None] = [None] * len(texts)
        added: Sequence[Mapping[str, float]] = [{}] * len(texts)
        expansion = self.student.document_expansion
        if kind == "query":
            factors = await self._factors(TextScorer(self.student, corpus), texts)
        elif expansion is not None:
            vectors = (await self.encode(texts, kind)).vectors
            added = await self._in_thread(lambda: expansion.words(vectors, texts))

        def weigh() -> list[WordWeights]:
            none = np.zeros(self.dim, np.float32)
            weighed: list[WordWeights] = []
            for text, factor, words in zip(texts, factors, added, strict=True):
                hashes, weights = word_weights(corpus, TextQuery(text, none, None, factor), kind, words)
                shortened = np.where(hashes < LEARNED, hashes, hashes >> np.uint64(32))
                indices, positions = np.unique(shortened, return_inverse=True)
                weighed.append((indices, np.bincount(positions, weights, len(indices)).astype(np.float32)))
            return weighed

        return await self._in_thread(weigh)

    async def _factors(self, scorer: TextScorer, queries: Sequence[str]) -> Sequence[Mapping[str, float] | None]:
        """How much the terms of each query count; None if all count alike."""
        if self.student.term_weights is None and not isinstance(self.student.document_expansion, LearnedWords):
            return [None] * len(queries)
        return await self.in_lane(lambda: scorer.factors(queries)) or [None] * len(queries)

    async def score_vectors(
        self, query: NDArray[np.float32], passages: NDArray[np.float32], task: Task
    ) -> NDArray[np.float32]:
        """The IEM's scores [n] of passages' vectors [n, dim] for a query's vector [dim].

        Raises:
            ModelError: a score is not finite.
        """
        return _finite(await self._in_thread(lambda: self.student.score(query, passages, task)))

    def probabilities(self, scored: PassageScores) -> NDArray[np.float64]:
        """Scores [n] as numbers in [0, 1]: calibrated if the student is calibrated for them, else the sigmoid."""
        corpus = scored.corpus
        if self._is_calibrated(corpus.task, corpus.weights):
            queries = scored.queries if corpus.weights else None
            return self.student.calibration.probabilities(scored.scores, corpus.task, queries=queries)
        return np.asarray(expit(scored.scores.astype(np.float64)))

    def _is_calibrated(self, task: Task, weights: FeatureWeights) -> bool:
        """Whether the scores with these weights are: those of the vectors, and those with all features."""
        calibration = self.student.calibration
        if not weights:
            return task in calibration.tasks
        return task in calibration.with_features and weights == self.student.feature_weights(task)

    def probabilities_of(self, ranking: Ranking, task: Task, *, iem: bool) -> list[float | None]:
        """How probable it is that each passage of a ranking is relevant, by the student's own score.

        None if the student is not calibrated for this task, if the explanations, which have the parts of that score,
        were not requested, or if a teacher has scored the passage. ``iem``: whether the ranking is by the student's
        score, not by inner products alone.
        """
        has_score = iem or self.student.why_no_interaction(task) is not None
        if task not in self.student.calibration.tasks or not has_score:
            return [None] * len(ranking.passages)
        scores = [
            None if result.log_odds is not None else _own_score(result.explanation) for result in ranking.passages
        ]
        known = np.array([0.0 if score is None else score for score in scores], np.float64)
        values = self.student.calibration.probabilities(known, task).tolist()
        return [None if score is None else value for score, value in zip(scores, values, strict=True)]

    def probability_kind(self, task: Task, weights: FeatureWeights | None = None) -> str:
        """How ``probabilities`` are computed from scores with these weights, by default the student's, for a header."""
        if self._is_calibrated(task, self.student.feature_weights(task) if weights is None else weights):
            return f"calibrated; task={task}; base-rate={self.student.calibration.base_rate:g}"
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
        groups: Sequence[tuple[Sequence[str], TextKind]],
        *,
        instruction: str | None = None,
        with_tokens: bool = False,
        bounded: bool = True,
    ) -> Encoded:
        """What is read of the texts of all groups, one after the other; an ``instruction`` is for groups of queries."""
        num_texts = sum(len(texts) for texts, _ in groups)
        if not num_texts:
            return Encoded(np.zeros((0, self.dim), np.float32), (), (), tokens=() if with_tokens else None)
        if bounded:
            self._texts.require_room(num_texts)
        items: list[_Text] = []
        lengths: list[int] = []
        truncated: list[int] = []
        for texts, kind in groups:
            for some in self._slices(texts):
                tokenized = await self._tokenize(some, kind, instruction)
                truncated += [len(items) + index for index in tokenized.truncated]
                lengths += tokenized.lengths
                starts = [0] * len(some)
                if with_tokens and instruction is not None:
                    starts = self.student.backbone.first_own_tokens(some, instruction)
                wanted = kind if with_tokens else None
                items += [_Text(ids, wanted, start) for ids, start in zip(tokenized.ids, starts, strict=True)]
        done = await self._submit(items, bounded=bounded)
        vectors = np.stack([read.vector for read in done.results])
        tokens = [read.tokens for read in done.results if read.tokens is not None] if with_tokens else None
        return Encoded(vectors, tuple(lengths), tuple(truncated), done.queued, done.worked, tokens)

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
        for index, text in enumerate(texts):
            if num_characters + len(text) > _CHARACTERS_A_TURN and index > start:
                yield texts[start:index]
                start, num_characters = index, 0
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
        """What was read of each text: those without token embeddings together, the others by kind."""
        by_kind: dict[TextKind | None, list[int]] = {}
        for index, text in enumerate(texts):
            by_kind.setdefault(text.kind, []).append(index)
        results: dict[int, _ReadText | Exception] = {}
        for kind, positions in by_kind.items():
            read = self._read([texts[index] for index in positions], kind)
            results |= zip(positions, map(_checked, read), strict=True)
        return [results[index] for index in range(len(texts))]

    def _read(self, texts: Sequence[_Text], kind: TextKind | None) -> Iterable[_ReadText]:
        encoder, ids = self._encoder or self.student, [text.ids for text in texts]
        if kind is None:
            return map(_ReadText, encoder.encode_tokens(ids))
        return map(_ReadText, *encoder.encode_token_rows(ids, kind, [text.start for text in texts]))


def _finite(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(scores).all():
        raise ModelError("a score is not finite; check the student")
    return scores


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
        """Encode texts and their tokens in the shared batches."""
        return self._encode(texts, kind, advance, instruction, with_tokens=True)

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
        *,
        with_tokens: bool = False,
    ) -> EncodedTexts:
        work = self._models.encode(texts, kind, instruction=instruction, with_tokens=with_tokens, bounded=False)
        done = self._stop.result(work, self._loop)
        if advance is not None:
            advance(len(texts))
        return done.texts(0, self.token_dim)


def _own_score(explanation: Explanation | None) -> float | None:
    """The part of a passage's score that needs no index: what it is calibrated on."""
    if explanation is None or explanation.dot is None or explanation.interaction is None:
        return None
    return explanation.dot + explanation.interaction
