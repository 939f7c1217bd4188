"""The services that a route may use, checks shared by d2llm's own routes, and descriptions of their errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from starlette.responses import Response

from d2llm.core.names import did_you_mean
from d2llm.core.types import Passage
from d2llm.server.access import no_index, wrong_index
from d2llm.server.errors import NotFoundError, Problem, ServingError, invalid, shortened
from d2llm.server.keys import ApiKey
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.logs import current_facts
from d2llm.server.response_schemas import ErrorResponse
from d2llm.server.served_index import ServedIndex
from d2llm.server.serving import Services, Serving
from d2llm.server.settings import ServeSettings


class Catalog:
    """The indexes that a request may use: those of its key, or of these only the one that its address names.

    Attributes:
        serving: what the server serves.
        allowed: the names of the indexes that the key may use.
        names: the names of the indexes that the request may use.
    """

    def __init__(self, serving: Serving, key: ApiKey | None, address_name: str | None, stack: ExitStack) -> None:
        """``stack`` ends with the request.

        Raises:
            NotFoundError: the address names an index that is not served.
            ServingError: 403, the key is for other indexes.
        """
        self.serving = serving
        self._key = key
        self._stack = stack
        self.allowed = tuple(name for name in serving.indexes if key is None or key.allows_index(name))
        if key is not None and key.indexes is not None and not self.allowed:
            raise ServingError(no_index(key))
        if address_name is not None and address_name not in self.allowed:
            offer = f"there is {', '.join(self.allowed)}" if self.allowed else "this server has none"
            raise NotFoundError(f"there is no index {address_name!r}; {offer}")
        self.names = self.allowed if address_name is None else (address_name,)

    def select(self, name: str | None = None, field: str | None = None) -> Services:
        """The services of an index, in use until the request ends; without a name, of the only one.

        Raises:
            ServingError: 400, no index is named and there are several; ``field`` could have named it.
        """
        if name is None and len(self.names) > 1:
            example = self.names[0]
            remedy = f"before the path, as in /indexes/{example}/v1/search" + (f", or in {field!r}" if field else "")
            raise invalid(
                f"no index is named, and there are several: {', '.join(self.names)}; name one {remedy}", field
            )
        services = self.serving.now(name or next(iter(self.names), None))
        if services.index is not None:
            current_facts().index_name = services.index.name
        self._stack.enter_context(services.models.in_use())
        return services

    @property
    def model_names(self) -> dict[str, str | None]:
        """The indexes by the names that ``model`` may have in other vendors' interfaces; None: the student alone.

        These are the names of the indexes on a server of several, and the student's if the request may use only one.
        """
        names: dict[str, str | None] = {}
        if len(self.serving.indexes) > 1:
            names |= {name: name for name in self.names}
        if len(self.names) == 1 or self.serving.alone is not None:
            name = next(iter(self.names), None)
            names[self.serving.now(name).models.name] = name
        return names

    def problem_of_model(self, name: str, offered: Sequence[str]) -> Problem:
        """Why a model cannot be used; what the key may not use is not confirmed to exist."""
        if self._key is not None and self._key.indexes is not None:
            return wrong_index(self._key, name)
        return Problem(404, "not_found", f"the model {name!r} does not exist; there is {', '.join(offered)}", "model")


# Coroutines because FastAPI runs plain functions in a thread, which costs more than the functions themselves. They call
# each other, not by ``Depends``: FastAPI takes as long to resolve each as most of them to run.


async def catalog_of(request: Request) -> Catalog:
    """The indexes that a request may use.

    Raises:
        NotFoundError: its address names an index that is not served.
    """
    state = request.scope["state"]
    serving = cast(Serving, request.app.state.serving)
    return Catalog(serving, state.get("api_key"), state.get("index_name"), state["resources"])


TheCatalog = Annotated[Catalog, Depends(catalog_of)]


async def services_of(request: Request) -> Services:
    """The services of the index that a request is for.

    Raises:
        ServingError: it names none, and may use several.
    """
    return (await catalog_of(request)).select()


TheServices = Annotated[Services, Depends(services_of)]


def require_index(services: Services) -> ServedIndex:
    """The index of these services.

    Raises:
        NotFoundError: only a student is served.
    """
    if services.index is None:
        raise NotFoundError("this server has no index; start it with `d2llm serve INDEX`")
    return services.index


def require_writable(services: Services) -> ServedIndex:
    """The index of these services, to be changed.

    Raises:
        NotFoundError: only a student is served.
        ServingError: 403, the server is read-only.
    """
    index = require_index(services)
    if not index.settings.writable:
        raise ServingError(Problem(403, "forbidden", "this server does not change its index (writable = false)"))
    return index


async def index_of(request: Request) -> ServedIndex:
    """The index that a request is for.

    Raises:
        NotFoundError: only a student is served.
        ServingError: it names none, and may use several.
    """
    return require_index(await services_of(request))


TheIndex = Annotated[ServedIndex, Depends(index_of)]


async def writable_index_of(request: Request) -> ServedIndex:
    """The index, for a request that changes it.

    Raises:
        ServingError: 403, the server is read-only.
    """
    return require_writable(await services_of(request))


WritableIndex = Annotated[ServedIndex, Depends(writable_index_of)]


class StrictRoute(BodyRoute):
    """A route of d2llm's own interface, which refuses query parameters that it does not have, as it does fields."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, after the names of the query parameters have been checked."""
        handle, known = super().get_route_handler(), [field.alias for field in self.dependant.query_params]

        async def check_and_handle(request: Request) -> Response:
            for name in request.query_params:
                offer = f"; there are: {', '.join(known)}" if known else "; this address takes none"
                problem = f"there is no such parameter{did_you_mean(name, known) or offer}"
                if name in known:
                    problem = "is given several times; give it once"
                if name not in known or len(request.query_params.getlist(name)) > 1:
                    field = f"query.{shortened(name)}"
                    raise ServingError(Problem(422, "invalid_request", f"{field}: {problem}", field))
            return await handle(request)

        return check_and_handle


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The request is invalid",
        401: "The key is missing or unknown",
        403: "Not allowed",
        404: "Not found",
        408: "The body took too long to arrive",
        409: "Conflict",
        413: "Too large",
        415: "The type of the body is not supported",
        422: "The body does not fit the schema",
        429: "Too many requests",
        500: "The server failed",
        503: "Not ready",
        507: "The index cannot be written",
    }.items()
}


def at_most(value: int, limit: int, name: str, setting: str) -> None:
    """Check a number against the server's limit, which is its ``setting``.

    Raises:
        ServingError: 400, the number is too large.
    """
    if value > limit:
        raise invalid(f"{name}: {value:,} is more than this server allows ({limit:,}, its setting {setting})", name)


def few_enough(count: int, limits: ServeSettings, name: str) -> None:
    """Check the number of a request's texts against the server's limit.

    Raises:
        ServingError: 400, there are too many.
    """
    if count > limits.max_texts:
        raise invalid(
            f"{name}: {count:,} is more than this server takes in a request ({limits.max_texts:,}, its setting "
            "max_texts); send them in parts",
            name,
        )


def few_enough_characters(documents: Iterable[Passage], limits: ServeSettings, name: str) -> None:
    """Check the lengths of documents, which are split, against the server's limit.

    Raises:
        ServingError: 400, a document has too many characters.
    """
    for index, document in enumerate(documents):
        if len(document.text) > limits.max_document_chars:
            where = f"{name}.{index}.text"
            raise invalid(
                f"{where}: {len(document.text):,} characters; this server splits texts of up to "
                f"{limits.max_document_chars:,} (max_document_chars); send it in parts",
                where,
            )


def short_enough(texts: Sequence[str], limits: ServeSettings, name: str) -> None:
    """Check the lengths of texts against the server's limit.

    Raises:
        ServingError: 400, a text has too many characters.
    """
    for index, text in enumerate(texts):
        if len(text) > limits.max_text_chars:
            where = name if len(texts) == 1 else f"{name}.{index}"
            raise invalid(
                f"{where}: {len(text):,} characters; this server accepts {limits.max_text_chars:,} (max_text_chars)",
                where,
            )
