"""The verb ``shard``: copies an index into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import JsonOption
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.names import counted


@verb("Search")
def shard(
    context: typer.Context,
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder; it is not changed.")],
    shards: Annotated[int, typer.Option(metavar="N", min=1, help="Number of shards.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the sharded index goes.")],
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Put the shards into object storage, such as s3://bucket/docs; FOLDER then only says where they are.",
            show_default="in FOLDER",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Copy an index into shards, which are searched as one.

    Nothing is encoded, and searches give the same results. A sharded index of a corpus is also made by encode --shards.
    If interrupted, run the same command again to continue.
    """
    from d2llm.retrieval.shard import shard

    session = session_of(context)
    report = shard(index, out, shards, remote=remote)
    resumed = f" ({report.num_resumed:,} of them by an earlier call)" if report.num_resumed else ""
    session.say(
        f"shard: {counted(report.num_passages, 'passage')} copied{resumed} into {counted(report.num_shards, 'shard')} "
        f"of {report.fewest:,} to {report.most:,}; {report.num_bytes:,} bytes, {report.seconds:,.1f} s, in {out}"
        + ("" if remote is None else f" and {remote}")
    )
    session.write_report(context, json_path, report)
