"""Server logs: one line per request, as text or JSON, without queries and passages unless enabled.

The outermost middleware creates the facts of a request, and they are filled in on the way.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TextIO, cast

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.types import EventDict, Processor

from d2llm.server.settings import ServeSettings

_LOGGERS = ("d2llm", "uvicorn", "opentelemetry")
_access = cast(
    structlog.stdlib.BoundLogger,
    structlog.wrap_logger(
        logging.getLogger("d2llm.access"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[structlog.stdlib.filter_by_level, ProcessorFormatter.wrap_for_formatter],
    ),
)


@dataclass(slots=True)
class RequestFacts:
    """Contents of a request's log line.

    Attributes:
        request_id: the client's id, or a generated one.
        key_name: name of the API key that was sent.
        index_name: name of the index that was used.
        num_items: number of texts and passages in the request.
        texts: these texts; logged only with ``log_texts``.
    """

    request_id: str
    key_name: str | None = None
    index_name: str | None = None
    num_items: int | None = None
    texts: list[str] = field(default_factory=list[str])


_current: ContextVar[RequestFacts | None] = ContextVar("request_facts", default=None)


def begin_facts(request_id: str) -> RequestFacts:
    """Create the facts of a request in this context; tasks that it starts share them."""
    facts = RequestFacts(request_id)
    _current.set(facts)
    return facts


def current_facts() -> RequestFacts:
    """The facts of the request in this context; outside of a request, a placeholder."""
    return _current.get() or RequestFacts("")


def note_items(texts: Sequence[str]) -> None:
    """Add ``texts`` to the facts of the request in this context."""
    facts = current_facts()
    facts.num_items = (facts.num_items or 0) + len(texts)
    facts.texts.extend(texts)


def log_request(facts: RequestFacts, route: str, method: str, status: int, seconds: float, *, texts: bool) -> None:
    """Log an answered request; ``texts`` adds its queries and passages.

    Successful health checks are logged at DEBUG level, since orchestrators send one every few seconds.
    """
    _access.log(
        logging.DEBUG if route == "/health" and status < HTTPStatus.BAD_REQUEST else logging.INFO,
        "request",
        request_id=facts.request_id,
        method=method if method.isalpha() and len(method) < 10 else "OTHER",
        route=route,
        status=status,
        milliseconds=round(1e3 * seconds, 1),
        key=facts.key_name,
        index=facts.index_name,
        num_items=facts.num_items,
        **({"texts": facts.texts} if texts else {}),
    )


def start_logs(settings: ServeSettings, stream: TextIO | None = None) -> Callable[[], None]:
    """Send the logs of d2llm, uvicorn and OpenTelemetry to ``stream``, by default stderr; returns an undo function."""
    out = stream or sys.stderr
    renderer: Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    if settings.log_format == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=0)
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        ProcessorFormatter(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _ErrorRenderer(messages=settings.log_texts),
                ProcessorFormatter.remove_processors_meta,
                renderer,
            ],
        )
    )
    before = [
        (logger, logger.handlers[:], logger.level, logger.propagate) for logger in map(logging.getLogger, _LOGGERS)
    ]
    for logger, *_ in before:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)

    def stop() -> None:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)

    return stop


class _ErrorRenderer:
    """Renders an exception in a log record as its traceback and types.

    Messages of exceptions may quote a query or passage, so they are left out unless ``messages`` is set; error texts of
    the operating system (no space left on device) are kept.
    """

    def __init__(self, *, messages: bool) -> None:
        self._messages = messages

    def __call__(self, logger: Any, name: str, event: EventDict) -> EventDict:
        del logger, name
        error = event.pop("exc_info", None)
        if isinstance(error, tuple):
            error = cast("tuple[Any, ...]", error)[1]
        if isinstance(error, BaseException):
            event["exception"] = "".join(self._traceback_lines(error)).rstrip()
        return event

    def _traceback_lines(self, error: BaseException) -> list[str]:
        if self._messages:
            return traceback.format_exception(error)
        chain = [error]
        while (earlier := chain[-1].__cause__ or chain[-1].__context__) and earlier not in chain:
            chain.append(earlier)
        lines: list[str] = []
        for link in reversed(chain):
            lines += ["Traceback (most recent call last):\n", *traceback.format_tb(link.__traceback__)]
            reason = f": {link.strerror}" if isinstance(link, OSError) and link.strerror else ""
            lines.append(f"{type(link).__qualname__}{reason}\n")
        return lines
