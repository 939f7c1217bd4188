"""The Model Context Protocol: the tools of agents (``agent_tools.py``) over standard streams and over HTTP.

Over HTTP, each request is complete in itself, so it passes the same keys, limits and checks as any other, and several
servers may share the clients. Nothing is sent but answers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from mcp import types
from mcp.server.context import ServerRequestContext
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from d2llm.server import agent_tools
from d2llm.server.agent_streams import make_server
from d2llm.server.agent_tools import SCHEME, Agent
from d2llm.server.errors import MAX_SHOWN, NotReadyError, log_failure, problem_for_client, shortened, without_paths
from d2llm.server.running import Lifecycle
from d2llm.server.services import Catalog, catalog_of
from d2llm.server.settings import ServeSettings

_POLL_SECONDS = 0.05
_JSON = "application/json"
_Context = ServerRequestContext[Any, Any]
OpenAgent = Callable[[], AbstractAsyncContextManager[Agent]]
"""Who asks, while a request is answered."""


class AgentProtocol:
    """Answers the requests of the protocol."""

    def __init__(self, open_agent: OpenAgent, private: Sequence[Path] = ()) -> None:
        """``open_agent`` says who asks, at each request; clients do not see ``private`` paths in errors."""
        self._open_agent = open_agent
        self._private = private

    async def call_tool(self, _: _Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        """The result of a tool; or what is wrong, which the language model reads."""
        try:
            async with self._open_agent() as agent:
                result = await agent_tools.call_tool(agent, params.name, params.arguments or {})
        except Exception as error:  # noqa: BLE001 - whatever happened, the client gets an answer
            return types.CallToolResult(content=[types.TextContent(text=self._message_of(error))], is_error=True)
        return types.CallToolResult(content=[types.TextContent(text=_json(result))], structured_content=result)

    async def list_resources(
        self, _: _Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        """A page of documents."""
        async with self._agent() as agent:
            documents, cursor = await agent_tools.list_resources(agent, params.cursor if params else None)
        resources = [
            types.Resource(
                uri=document.uri,
                name=document.document_id,
                description=f"Document of the index {document.index}; passages: {document.num_passages:,}",
                mime_type=_JSON,
            )
            for document in documents
        ]
        return types.ListResourcesResult(resources=resources, next_cursor=cursor)

    async def list_resource_templates(
        self, _: _Context, __: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        """The form of a document's address."""
        address = f"{SCHEME}{{index}}/{{document_id}}"
        template = types.ResourceTemplate(
            uri_template=address, name="document", description="A document by its id.", mime_type=_JSON
        )
        return types.ListResourceTemplatesResult(resource_templates=[template])

    async def read_resource(self, _: _Context, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        """A document."""
        async with self._agent() as agent:
            document = await agent_tools.read_resource(agent, params.uri)
        content = types.TextResourceContents(uri=params.uri, mime_type=_JSON, text=_json(document))
        return types.ReadResourceResult(contents=[content])

    @asynccontextmanager
    async def _agent(self) -> AsyncGenerator[Agent]:
        """Who asks, where errors are those of the protocol."""
        try:
            async with self._open_agent() as agent:
                yield agent
        except Exception as error:  # whatever happened, the client gets an answer
            raise MCPError(types.INVALID_PARAMS, self._message_of(error)) from error

    def _message_of(self, error: Exception) -> str:
        if isinstance(error, ValidationError):
            error = RequestValidationError(error.errors())
        problem = problem_for_client(error)
        log_failure("a request of an agent", error, problem.status)
        return without_paths(shortened(problem.message, MAX_SHOWN), self._private)


def _json(result: object) -> str:
    return json.dumps(result, ensure_ascii=False)


async def answer(scope: Scope, receive: Receive, send: Send, settings: ServeSettings, private: Sequence[Path]) -> None:
    """Answer one HTTP request; the middleware has checked its key, and its index if the address names one.

    Without keys, agents only read: what a document tells one to do must not change the index.

    Raises:
        ServingError: the key or the address is for an index that is not served.
    """
    request = Request(scope, receive)
    catalog, key = await catalog_of(request), scope["state"].get("api_key")
    may_write = settings.writable and key is not None and key.allows("write")

    @asynccontextmanager
    async def open_agent() -> AsyncGenerator[Agent]:
        yield Agent(catalog, may_write)

    async def answers() -> AgentProtocol:
        return AgentProtocol(open_agent, private)

    manager = StreamableHTTPSessionManager(
        make_server(answers, catalog.names, may_write=may_write),
        stateless=True,
        json_response=True,
        max_request_body_size=settings.max_body_bytes,
    )
    async with manager.run():
        await manager.handle_request(scope, receive, send)


async def start_for_streams(app: FastAPI, settings: ServeSettings, stack: AsyncExitStack) -> AgentProtocol:
    """What answers the one client of ``d2llm mcp``; the indexes of ``app`` are loaded until ``stack`` ends.

    Calls wait for them.
    """
    lifecycle: Lifecycle = app.state.lifecycle

    @asynccontextmanager
    async def open_agent() -> AsyncGenerator[Agent]:
        while lifecycle.state == "starting":
            await asyncio.sleep(_POLL_SECONDS)
        if lifecycle.state != "ready":
            raise NotReadyError(f"nothing can be searched: {lifecycle.message or 'this server stops'}")
        with ExitStack() as used:
            yield Agent(Catalog(app.state.serving, None, None, used), settings.writable)

    await stack.enter_async_context(app.router.lifespan_context(app))
    return AgentProtocol(open_agent)
