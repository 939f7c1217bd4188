"""What d2llm's own routes ask of every request, and how they describe their errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2llm.server.errors import ForbiddenError, invalid
from d2llm.server.schemas import ErrorAnswer
from d2llm.server.services import Services
from d2llm.server.settings import ServeSettings

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The request is wrong",
        401: "No key, or an unknown one",
        403: "Not allowed",
        404: "There is no such thing",
        408: "Its body took too long",
        409: "In the way of something else",
        413: "Too large",
        415: "Of a type that is not read",
        422: "The body does not fit the schema",
        429: "Too many requests",
        500: "The server failed",
        503: "Not ready",
        507: "It cannot be stored",
    }.items()
}


def writable(services: Services) -> None:
    """Refuse to change the index where the server is not to.

    Raises:
        ForbiddenError: it is not.
    """
    if not services.settings.writable:
        raise ForbiddenError("this server does not change its index (writable = false)")


def at_most(number: int, limit: int, name: str) -> None:
    """Hold a number to the server's limit.

    Raises:
        ServingError: 400, it is beyond.
    """
    if number > limit:
        raise invalid(f"{name}: {number:,} is more than this server allows ({limit:,})", name)


def short_enough(texts: Sequence[str], limits: ServeSettings, name: str) -> None:
    """Hold texts to the server's limit.

    Raises:
        ServingError: 400, one has more characters.
    """
    for place, text in enumerate(texts):
        if len(text) > limits.max_text_chars:
            where = name if len(texts) == 1 else f"{name}.{place}"
            raise invalid(f"{where}: {len(text):,} characters; this server takes {limits.max_text_chars:,}", where)
