"""The verb ``mcp``: gives agents tools to search indexes, over standard input and output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2llm.cli.options import JsonOption, input_path, parse_assignments
from d2llm.cli.session import STANDARD_OUTPUT, session_of
from d2llm.cli.verbs import verb
from d2llm.server.settings import AgentSettings


@verb("Serve")
def mcp(
    context: typer.Context,
    options: Annotated[dict[str, Any], AgentSettings],
    index: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]INDEX", help="Folder of an index, which gets the folder's name unless another is given."
        ),
    ],
    config: Annotated[Path | None, typer.Option(metavar="FILE", callback=input_path, help="Settings as TOML.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of serve; may be given several times."),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Let an agent search indexes, by the Model Context Protocol.

    Claude, VS Code, Cursor and others start this program and talk to it over standard input and output. Settings are
    those of serve; d2llm serve speaks the protocol too, at /mcp.
    """
    from d2llm.core.extras import require

    require("mcp", extra="mcp", purpose="the Model Context Protocol")
    import asyncio
    import contextlib

    from d2llm.server.errors import require_indexes
    from d2llm.server.settings import load_settings

    session = session_of(context)
    session.take(STANDARD_OUTPUT, "the protocol")
    flags = {"writable": AgentSettings.model_fields["writable"].default, **options, "index": index}
    loaded = load_settings(flags, file=config, assignments=parse_assignments(assignments or []))
    settings = loaded.settings
    with contextlib.ExitStack() as undo:
        require_indexes(settings.index)
        from d2llm.server.agent_streams import serve_streams
        from d2llm.server.logs import start_logs

        session.write_report(context, json_path, {"settings": settings.model_dump(), "sources": loaded.sources})
        undo.callback(start_logs(settings))
        asyncio.run(serve_streams(settings))
