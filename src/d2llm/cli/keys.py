"""The verb ``keys`` and its subcommands: who may use a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from d2llm.cli.options import JsonOption, in_existing_folder, lasting_input_path
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb_group

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
