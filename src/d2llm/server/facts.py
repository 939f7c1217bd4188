"""Facts about a request for the log: created by the outermost middleware, filled in on the way."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestFacts:
    """Contents of a request's log line.

    Attributes:
        request_id: the client's id, or a generated one.
        key_name: name of the API key that was sent.
        num_items: number of texts and passages in the request.
        texts: these texts; logged only with ``log_texts``.
    """

    request_id: str
    key_name: str | None = None
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
