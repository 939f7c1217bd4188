"""``d2llm mcp``: the Model Context Protocol over standard input and output.

Programs give a server some seconds to greet them and to list its tools, and longer to answer a call. So no models are
imported for these; the rest (``mcp.py``) is imported, and the indexes are loaded, while the client already asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any, cast

import anyio
from mcp import types
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from d2llm import __version__
from d2llm.core.json_values import parse_json
from d2llm.server.agent_arguments import INSTRUCTIONS, AgentTool, tools_of
from d2llm.server.settings import ServeSettings

_log = logging.getLogger(__name__)


def make_server(protocol: Callable[[], Awaitable[object]], names: Sequence[str], *, may_write: bool) -> Server[Any]:
    """A server that greets clients and lists tools by itself; other requests wait for ``protocol``, which answers them.

    Args:
        protocol: is awaited by each of these requests; an ``mcp.AgentProtocol``.
        names: the indexes that the client may use.
        may_write: whether it may change them.
    """

    async def list_tools(_: Any, __: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_tool(tool, names) for tool in tools_of(may_write=may_write)])

    def answered(request: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def answer(context: Any, params: Any) -> Any:
            return await getattr(await protocol(), request)(context, params)

        return answer

    return Server(
        "d2llm",
        version=__version__,
        title="d2llm",
        instructions=INSTRUCTIONS,
        get_tool_input_schema=lambda _: None,  # no argument is also a header
        on_list_tools=list_tools,
        on_call_tool=answered("call_tool"),
        on_list_resources=answered("list_resources"),
        on_list_resource_templates=answered("list_resource_templates"),
        on_read_resource=answered("read_resource"),
    )


def _tool(tool: AgentTool, names: Sequence[str]) -> types.Tool:
    hints = types.ToolAnnotations(
        read_only_hint=not tool.writes, destructive_hint=tool.writes, idempotent_hint=True, open_world_hint=False
    )
    schema = tool.schema(names)
    return types.Tool(
        name=tool.name, title=tool.title, description=tool.description, input_schema=schema, annotations=hints
    )


async def serve_streams(settings: ServeSettings) -> None:
    """Serve over standard input and output until the client closes the input.

    The protocol has standard output alone: what else is written there goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no thread that waits for input keeps the process
    async with stdio_server() as (read_stream, write_stream), AsyncExitStack() as stack:

        async def start() -> object:
            protocol = await asyncio.to_thread(import_module, "d2llm.server.mcp")
            serving = await asyncio.to_thread(import_module, "d2llm.server.app")
            return await protocol.start_for_streams(serving.make_app(settings), settings, stack)

        starting = asyncio.create_task(start(), name="start")
        sending, readable = anyio.create_memory_object_stream[SessionMessage | Exception]()
        reading = asyncio.create_task(_pass_on(read_stream, sending.send, write_stream.send), name="read")
        reading.add_done_callback(lambda _: sending.close())
        server = make_server(lambda: asyncio.shield(starting), tuple(settings.index), may_write=settings.writable)
        try:
            await server.run(readable, write_stream, server.create_initialization_options())
        finally:
            for task in (starting, reading):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _pass_on(
    received: AsyncIterable[SessionMessage | Exception],
    send: Callable[[SessionMessage], Awaitable[None]],
    answer: Callable[[SessionMessage], Awaitable[None]],
) -> None:
    """Pass messages on, and refuse requests that cannot be read: the SDK drops them, and their clients would wait.

    What has no id cannot be answered, and is logged.
    """
    async for message in received:
        if not isinstance(message, Exception):
            await send(message)
        elif isinstance(message, ValidationError) and (request := _id_of(message)) is not None:
            problem = message.errors()[0]
            code = types.PARSE_ERROR if problem["type"] == "json_invalid" else types.INVALID_REQUEST
            error = types.ErrorData(code=code, message=f"the message cannot be read: {problem['msg']}")
            await answer(SessionMessage(types.JSONRPCError(jsonrpc="2.0", id=request, error=error)))
        else:
            _log.warning("a message of the client cannot be read, and has no id to be answered by: %s", message)


def _id_of(error: ValidationError) -> str | int | None:
    """The id of a request that is no valid JSON to pydantic, as with half of a surrogate pair, or has another form."""
    for problem in error.errors():
        message = problem["input"]
        if problem["type"] == "json_invalid":
            with contextlib.suppress(ValueError):
                message = parse_json(message)
        if isinstance(message, dict):
            fields = cast("dict[str, Any]", message)
            if "method" in fields and type(fields.get("id")) in (str, int):
                return fields["id"]
    return None
