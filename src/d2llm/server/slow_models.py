"""The models that work for one request at a time: the teacher, a reranker with a model of its own, and the writer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from d2llm.core.errors import InputError, MismatchError, ModelError
from d2llm.core.types import ExpansionMethod, QueryRewriting
from d2llm.models.teachers.pair_teacher import PairTeacher, load_teacher
from d2llm.models.writers.writer import Assignment, Writer, WrittenQueries, load_writer
from d2llm.recipe import RemoteWriterConfig, WriterConfig, WriterEndpointConfig
from d2llm.recipe.recipe import named_teacher, named_writer
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.reranker import OpenReranker, Reranker, TeacherReranker, open_reranker
from d2llm.retrieval.rewriting import Rewriter
from d2llm.retrieval.settings import Turn
from d2llm.server.batching import CallQueue
from d2llm.server.settings import ServeSettings

_log = logging.getLogger(__name__)
_SEARCHES_A_READING = 256  # the teacher's queue is this many times shorter than the student's
_SEARCHES_AN_EXPANSION = 64  # and the writer's
_PATIENCE_MINUTES = 0.1  # with an endpoint that fails: then the plain query is searched
_TIMEOUT_SECONDS = 60.0


class SlowModels:
    """Those of a server, shared by its indexes, with their queues; ``load`` loads those that the settings name.

    Attributes:
        teacher: if there is one, else None.
        reranker: the one of the settings, or None; the teacher brings others.
        writer: expands queries, or None.
        reading: runs what uses the teacher or the reranker.
        writing: runs what uses the writer.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.teacher: PairTeacher | None = None
        self.reranker: OpenReranker | None = None
        self.writer: Writer | None = None
        self._rewriter: Rewriter | None = None
        self.reading = CallQueue("teacher", settings.queue_texts // _SEARCHES_A_READING)
        self.writing = CallQueue("writer", settings.queue_texts // _SEARCHES_AN_EXPANSION)

    def load(self) -> None:
        """Load the models.

        Raises:
            D2LLMError: one of them cannot be loaded.
        """
        settings, where = self._settings, {"device": self._settings.device, "dtype": self._settings.dtype}
        if settings.teacher is not None:
            self.teacher = load_teacher(named_teacher(settings.teacher, prompt=settings.prompt), **where)
        if settings.reranker is not None:
            self.reranker = open_reranker(settings.reranker, teacher=self.teacher, **where)
        if settings.writer is not None:
            self.writer = _DiscreetWriter(load_writer(_writer_config(settings, settings.writer), **where))
            self._rewriter = Rewriter(self.writer)

    def start(self) -> None:
        """Start answering requests; call it in the event loop."""
        self.reading.start()
        self.writing.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted work, then stop."""
        await asyncio.gather(self.reading.stop(timeout), self.writing.stop(timeout))

    def require_teacher(self) -> PairTeacher:
        """The teacher.

        Raises:
            InputError: there is none.
        """
        if self.teacher is None:
            raise InputError("this server has no teacher; start it with --teacher, or rescore with 'iem' or 'none'")
        return self.teacher

    def find_reranker(self, kind: str, **teacher_limits: Any) -> OpenReranker:
        """The reranker of a kind: that of the settings, or one that only needs the teacher, with these settings.

        Raises:
            InputError: there is none.
        """
        if self.reranker is not None and self.reranker.settings.kind == kind:
            return self.reranker
        try:
            cls = Reranker.kinds.find(kind)
            if not issubclass(cls, TeacherReranker):
                raise InputError(f"this server has no reranker '{kind}'; start it with --reranker {kind}")
            settings = cls(**teacher_limits)
        except ValueError as error:
            raise InputError(f"the reranker '{kind}' cannot be used: {error}") from error
        return settings.with_teacher(self.require_teacher())

    def usable_rerankers(self, fit: Callable[[OpenReranker], object]) -> list[str]:
        """The kinds of rerankers of which ``fit`` raises no ``InputError`` or ``MismatchError``."""
        kinds: list[str] = []
        for kind in Reranker.kinds.kinds if self.teacher is not None or self.reranker is not None else ():
            with suppress(InputError, MismatchError):
                fit(self.find_reranker(kind))
                kinds.append(kind)
        return kinds

    def find_expansion(self, method: ExpansionMethod, num_texts: int | None = None) -> Expansion:
        """An expansion by the writer.

        Raises:
            InputError: there is no writer.
        """
        if self.writer is None:
            raise InputError("this server has no writer to expand queries; start it with --writer, or leave out expand")
        return Expansion(self.writer, method, num_texts)

    async def rewrite(self, question: str, history: Sequence[Turn]) -> QueryRewriting:
        """The last question of a conversation as a query that can be understood alone.

        Raises:
            InputError: there is no writer, or it cannot rewrite queries.
            OverloadedError: too many requests wait for the writer.
        """
        if self._rewriter is None:
            raise InputError(
                "this server has no writer to rewrite the query; start it with --writer, or leave out history and send "
                "a query that can be understood alone"
            )
        if (rewriting := self._rewriter.kept(question, history)) is None:
            rewriting, _ = await self.writing.run(partial(self._rewriter.rewrite, question, history))
        return rewriting


class _DiscreetWriter:
    """A writer whose failures go to the log, because they may name an address; clients learn only that it failed."""

    def __init__(self, writer: Writer) -> None:
        self.fingerprint = writer.fingerprint
        self._writer = writer

    def write(
        self, assignments: Sequence[Assignment], *, advance: Callable[[int], None] | None = None
    ) -> list[WrittenQueries]:
        """What the writer writes.

        Raises:
            InputError: the writer cannot expand queries, or a query is longer than it can read.
            ModelError: the writer failed.
        """
        try:
            return self._writer.write(assignments, advance=advance)
        except ModelError as error:
            _log.error("the writer failed: %s", error)
            raise ModelError("the writer failed; the server's log says why") from error


def _writer_config(settings: ServeSettings, model: str) -> WriterConfig:
    if settings.writer_endpoint is None:
        return named_writer(model)
    remote = WriterEndpointConfig(
        url=settings.writer_endpoint,
        api_key_env=settings.writer_key_env,
        patience_minutes=_PATIENCE_MINUTES,
        timeout_seconds=_TIMEOUT_SECONDS,
    )
    return RemoteWriterConfig(model=model, remote=remote)
