"""Clients of the Model Context Protocol, for tests: the official SDK's, over both transports."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TextIO, TypeVar

from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

_Value = TypeVar("_Value")
Work = Callable[[Client], Awaitable[_Value]]


@asynccontextmanager
async def over_http(address: str, key: str | None = None, mode: Any = "auto") -> AsyncGenerator[Client]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    http_client = create_mcp_http_client(headers=headers)
    async with http_client, Client(streamable_http_client(address, http_client=http_client), mode=mode) as client:
        yield client


def ask(address: str, work: Work[_Value], key: str | None = None, mode: Any = "auto") -> _Value:
    """The result of some work with a client over HTTP."""

    async def run() -> _Value | Exception:
        async with over_http(address, key, mode) as client:
            return await _outcome(work(client))

    return _value(asyncio.run(run()))


async def _outcome(work: Awaitable[_Value]) -> _Value | Exception:
    """The result, or the error: the task groups of a client would wrap it."""
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - it is raised outside of the client
        return error


def _value(outcome: _Value | Exception) -> _Value:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def program(*arguments: object) -> StdioServerParameters:
    """``d2llm mcp``, as a client starts it."""
    path = os.pathsep.join(filter(None, sys.path))
    words = ["-m", "d2llm", "mcp", *map(str, arguments), "--set", "reload_seconds=0.1", "--dtype", "float32"]
    return StdioServerParameters(command=sys.executable, args=words, env={"PYTHONPATH": path})


def ask_program(work: Work[_Value], *arguments: object, errors: TextIO = sys.stderr, mode: Any = "auto") -> _Value:
    """The result of some work with a client of ``d2llm mcp``."""

    async def run() -> _Value | Exception:
        async with Client(stdio_client(program(*arguments), errlog=errors), mode=mode) as client:
            return await _outcome(work(client))

    return _value(asyncio.run(run()))


def result_of(result: Any) -> dict[str, Any]:
    """What a tool has returned, which is the same as text and as JSON."""
    (content,) = result.content
    assert not result.is_error, content.text
    assert json.loads(content.text) == result.structured_content
    return result.structured_content


def error_of(result: Any) -> str:
    """Why a tool has refused."""
    (content,) = result.content
    assert result.is_error, content.text
    assert result.structured_content is None
    return content.text


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """The result of a tool."""
    return result_of(await client.call_tool(tool, arguments))


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """Why a tool refuses."""
    return error_of(await client.call_tool(tool, arguments))


def called(tool: str, **arguments: Any) -> Work[dict[str, Any]]:
    """Work that is one call of a tool."""
    return lambda client: call(client, tool, **arguments)


def refusal(tool: str, **arguments: Any) -> Work[str]:
    """Work that is one call of a tool, which refuses."""
    return lambda client: refused(client, tool, **arguments)
