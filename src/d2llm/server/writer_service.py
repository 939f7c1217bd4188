"""The language model that expands queries on a server: its queue, and what clients learn about its failures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from d2llm.core.errors import ModelError
from d2llm.models.writers.writer import Assignment, Writer, WrittenQueries, load_writer
from d2llm.recipe import RemoteWriterConfig, WriterEndpointConfig
from d2llm.recipe.recipe_file import named_writer
from d2llm.server.batching import Batcher, Done
from d2llm.server.settings import ServeSettings

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_SEARCHES_AN_EXPANSION = 64  # the writer's queue is this many times shorter than the student's
_PATIENCE_MINUTES = 0.1  # with an endpoint that fails: then the plain query is searched
_TIMEOUT_SECONDS = 60.0


class WriterService:
    """One writer, shared by all indexes, which works for one request at a time.

    It is a ``Writer``. The message of a failure goes to the log, because it may name the endpoint's address; clients
    learn only that the writer failed.

    Args:
        writer: expands queries.
        name: its name for clients.
        queue: number of texts that wait for the student; fewer searches wait for the writer.
    """

    def __init__(self, writer: Writer, name: str, *, queue: int = 2_048) -> None:
        self.name = name
        self.fingerprint = writer.fingerprint
        self._writer = writer
        self._searches: Batcher[Callable[[], Any], Any] = Batcher(
            lambda works: [work() for work in works],
            name="writer",
            max_queued=max(1, queue // _SEARCHES_AN_EXPANSION),
            max_batch=1,
        )

    def start(self) -> None:
        """Start answering requests; call it in the event loop."""
        self._searches.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted searches, then stop."""
        await self._searches.stop(timeout)

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

    async def search(self, work: Callable[[], _Value]) -> tuple[_Value, float]:
        """The result of a search that uses the writer, and the seconds that it waited.

        Raises:
            OverloadedError: too many searches wait for the writer.
        """
        done = cast("Done[_Value]", await self._searches.submit([work]))
        return done.results[0], done.queued


def load_writer_service(settings: ServeSettings) -> WriterService | None:
    """Load the writer named in the settings; None if there is none.

    Raises:
        D2LLMError: as for ``load_writer``.
    """
    if settings.writer is None:
        return None
    if settings.writer_endpoint is None:
        config = named_writer(settings.writer)
    else:
        remote = WriterEndpointConfig(
            url=settings.writer_endpoint,
            api_key_env=settings.writer_key_env,
            patience_minutes=_PATIENCE_MINUTES,
            timeout_seconds=_TIMEOUT_SECONDS,
        )
        config = RemoteWriterConfig(model=settings.writer, remote=remote)
    writer = load_writer(config, device=settings.device, dtype=settings.dtype)
    return WriterService(writer, settings.writer, queue=settings.queue_texts)
