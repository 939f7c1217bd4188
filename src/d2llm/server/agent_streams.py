"""``d2llm mcp``: the Model Context Protocol over standard input and output.

Programs give a server some seconds to greet them and to list its tools, and longer to answer a call. So no models are
imported for these; the rest (``mcp.py``) is imported, and the indexes are loaded, while the client already asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any

from mcp import types
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server

from d2llm import __version__
from d2llm.server.agent_arguments import INSTRUCTIONS, AgentTool, tools_of
from d2llm.server.settings import ServeSettings


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
        server = make_server(lambda: asyncio.shield(starting), tuple(settings.index), may_write=settings.writable)
        try:
            await server.run(read_stream, write_stream, server.create_initialization_options())
        finally:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
