"""The verbs of a server: ``serve`` over HTTP, ``mcp`` over standard input and output, and ``keys``, who may use it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from d2llm.cli.options import JsonOption, in_existing_folder, input_path, lasting_input_path, parse_assignments
from d2llm.cli.session import STANDARD_OUTPUT, session_of
from d2llm.cli.verbs import verb, verb_group
from d2llm.server.settings import AgentSettings, ServeSettings

if TYPE_CHECKING:
    from d2llm.server.settings import LoadedSettings


@verb("Serve")
def serve(
    context: typer.Context,
    options: Annotated[dict[str, Any], ServeSettings],
    index: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]INDEX",
            help="Folder of an index, which gets the folder's name unless another is given; several: each is served by "
            "its name; none: only a student is served.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", callback=input_path, help="Settings as TOML.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting; may be given several times.")
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Show all settings, and their sources, then exit.")
    ] = False,
    json_path: JsonOption = None,
) -> None:
    """Serve indexes over HTTP, with their students.

    Settings come from options, from the environment (D2LLM_SERVE_MAX_TEXTS) and from a file, in this order. Stop it
    with Ctrl-C or SIGTERM; accepted requests are still answered. SIGHUP reloads the indexes.
    """
    from d2llm.core.extras import require

    for module in ("fastapi", "uvicorn", "prometheus_client", "structlog"):
        require(module, extra="serve", purpose="a server")
    from d2llm.core.errors import InputError
    from d2llm.core.table import Table
    from d2llm.server.settings import load_settings

    session = session_of(context)
    loaded = load_settings({**options, "index": index}, file=config, assignments=parse_assignments(assignments or []))
    if show_config:
        table = Table("setting", "value", "from")
        for row in loaded.lines():
            table.add_row(*row)
        session.show(table)
        values = {"url": None, "settings": loaded.settings.model_dump(), "sources": loaded.sources}
        session.write_report(context, json_path, values)
    elif not loaded.settings.index and loaded.settings.student is None:
        raise InputError("there is nothing to serve; give the folder of an index, or --student")
    else:
        _serve(context, loaded, json_path)


def _serve(context: typer.Context, loaded: LoadedSettings, json_path: Path | None) -> None:
    from d2llm.runners.placement import find_runner
    from d2llm.server.errors import require_indexes
    from d2llm.server.logs import start_logs
    from d2llm.server.running import listen, run_app, url_of
    from d2llm.server.settings import LOOPBACK_NAMES, is_loopback
    from d2llm.server.tracing import start_tracing

    session, settings = session_of(context), loaded.settings
    bound = listen(settings.host, settings.port)
    url = url_of(bound)
    if not is_loopback(settings.host) and set(settings.host_names) <= set(LOOPBACK_NAMES):
        session.say("serve: only requests for localhost are answered; set allowed_hosts to answer for other names")

    def say_ready() -> None:
        report = {"url": url, "settings": settings.model_dump(), "sources": loaded.sources}
        session.write_report(context, json_path, report)
        indexes = [
            str(folder) if name == folder.name else f"{name}={folder}" for name, folder in settings.index.items()
        ]
        typer.echo(f"d2llm serves {', '.join(indexes) or settings.student} on {url} (page {url}/, API {url}/docs)")

    with contextlib.ExitStack() as undo:
        undo.callback(bound.close)
        require_indexes(settings.index)
        undo.callback(start_logs(settings))
        from d2llm.server.app import make_app  # takes seconds; a port in use has been reported by now
        from d2llm.server.serving import Serving

        # In the main thread, where the signal handlers that Ray installs are taken back.
        undo.enter_context(find_runner(settings.runner).connected())
        app = make_app(settings)
        if settings.otel:
            undo.callback(start_tracing(app, app.state.telemetry))

        async def reload() -> None:
            serving: Serving | None = getattr(app.state, "serving", None)
            if serving is not None:
                await serving.reload()

        run_app(app, settings, bound, app.state.lifecycle, on_ready=say_ready, on_hangup=reload)


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


_FILE = "d2llm.keys"

keys_app = verb_group(
    "keys",
    "Make and revoke the API keys of a server.",
    heading="Serve",
    epilog="Example: d2llm keys keys.json add search-page. Then: d2llm serve docs.index --keys-file keys.json",
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key, as logs show it.")]


@keys_app.callback()
def choose(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", callback=lasting_input_path, help="The file with the keys.")],
) -> None:
    """Remember the file for the verb that follows."""
    context.meta[_FILE] = file


@keys_app.command("add")
def add(
    context: typer.Context,
    name: NameArgument,
    scope: Annotated[
        Literal["read", "write", "admin"],
        typer.Option(help="read: search, encode; write: also change passages; admin: also snapshots, reload."),
    ] = "read",
    requests_per_minute: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Limit of requests per minute.", show_default="the server's")
    ] = None,
    indexes: Annotated[
        list[str] | None,
        typer.Option(
            "--index",
            metavar="NAME",
            help="An index of the server that the key may use; may be given several times.",
            show_default="all indexes",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Create a key and show it once; the file stores only its hash.

    The key is printed only; the report of --json does not have it.
    """
    from d2llm.server.keys import add_key

    in_existing_folder(_file_of(context))
    secret = add_key(_file_of(context), name, scope, requests_per_minute, indexes)
    limit = f" in {', '.join(indexes)}" if indexes else ""
    session_of(context).say(
        f"keys: '{name}' may {scope}{limit}; send it as 'Authorization: Bearer KEY'. It is not shown again:"
    )
    typer.echo(secret)
    report = {"name": name, "scope": scope, "indexes": indexes, "requests_per_minute": requests_per_minute}
    session_of(context).write_report(context, json_path, report)


@keys_app.command("list")
def show(context: typer.Context, json_path: JsonOption = None) -> None:
    """Show the keys' names, scopes, indexes and limits."""
    from d2llm.core.table import Table
    from d2llm.server.keys import read_keys

    keys = read_keys(_file_of(context))
    table = Table("name", "scope", "indexes", "requests per minute", "created")
    for key in keys:
        indexes, limit = ", ".join(key.indexes or ["all"]), f"{key.requests_per_minute or 'the server limit'}"
        table.add_row(key.name, key.scope, indexes, limit, key.created)
    session_of(context).show(table)
    session_of(context).write_report(context, json_path, [key.model_dump(exclude={"sha256"}) for key in keys])


@keys_app.command("remove")
def remove(context: typer.Context, name: NameArgument, json_path: JsonOption = None) -> None:
    """Revoke a key; running servers refuse it at once."""
    from d2llm.server.keys import remove_key

    remove_key(_file_of(context), name)
    session_of(context).say(f"keys: '{name}' is no longer accepted")
    session_of(context).write_report(context, json_path, {"name": name, "removed": True})


def _file_of(context: typer.Context) -> Path:
    return cast(Path, context.meta[_FILE])
