"""The verb ``serve``: serves indexes and their students over HTTP.

A server's settings are one class (``server/settings.py``). The most common settings have their own options; all others
are given as ``--set NAME=VALUE``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2llm.cli.options import JsonOption, input_path, parse_assignments
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.server.settings import ServeSettings

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

    for module in ("fastapi", "uvicorn", "prometheus_client", "structlog", "limits"):
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
