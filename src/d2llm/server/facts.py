"""What is known of a request besides its content: begun by the outermost middleware, filled in on the way, logged."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestFacts:
    """What the log line of a request says.

    Attributes:
        request_id: the client's own or a new one.
        key_name: of the API key that it came with.
        num_items: how many texts and passages it is about.
        texts: these; ``log_texts`` shows them.
    """

    request_id: str
    key_name: str | None = None
    num_items: int | None = None
    texts: list[str] = field(default_factory=list[str])


_current: ContextVar[RequestFacts | None] = ContextVar("request_facts", default=None)


def begin_facts(request_id: str) -> RequestFacts:
    """The facts of a request that begins in this context; tasks that it starts share them."""
    facts = RequestFacts(request_id)
    _current.set(facts)
    return facts


def current_facts() -> RequestFacts:
    """The facts of the request in this context; outside of one, some that nobody reads."""
    return _current.get() or RequestFacts("")


def note_items(texts: Sequence[str]) -> None:
    """Say that the request in this context is about ``texts``, too."""
    facts = current_facts()
    facts.num_items = (facts.num_items or 0) + len(texts)
    facts.texts.extend(texts)
