"""What keeps an index well: the verbs ``index ... compact``, ``ann``, ``snapshot``, ``restore`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.index import folder_of, index_app
from d2llm.cli.index_options import MakerOption
from d2llm.cli.options import DeviceOption, DtypeOption, JsonOption
from d2llm.cli.session import session_of


def compact(
    context: typer.Context,
    keep_minutes: Annotated[
        float, typer.Option("--keep-minutes", min=0, help="Leave younger versions to the readers that have them open.")
    ] = 60.0,
    dense: Annotated[
        bool | None,
        typer.Option(
            "--dense/--no-dense", help="Write the vectors anew without holes.", show_default="if a quarter are holes"
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Free the space of what was deleted or changed."""
    from datetime import timedelta

    from d2llm.retrieval.index import Index

    before, after = Index.open(folder_of(context)).compact(timedelta(minutes=keep_minutes), dense=dense)
    session_of(context).say(
        f"index: {before:,} bytes before, {after:,} after; versions of the last {keep_minutes:g} minutes are kept"
    )
    session_of(context).write_report(context, json_path, {"bytes_before": before, "bytes_after": after})


def ann(
    context: typer.Context,
    recall: Annotated[
        float, typer.Option("--recall", min=0, max=1, help="The share of the exact candidates that it is to find.")
    ] = 0.95,
    depth: Annotated[int, typer.Option("--depth", min=1, help="The number of candidates of a search.")] = 1000,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries",
            metavar="FILE",
            help="queries.jsonl or queries.jsonl.gz to measure recall with.",
            show_default="passages of the index, each to find others",
        ),
    ] = None,
    student: MakerOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Build an approximate index for large corpora; `search --source ann` uses it.

    Passages that come later are found all the same; build it again when they are many.
    """
    from d2llm.data.beir import read_queries
    from d2llm.reports.search_tables import ann_remark
    from d2llm.retrieval.build_ann import build_ann
    from d2llm.retrieval.index import Index

    session = session_of(context)
    index = Index.open(folder_of(context), student, device=device, dtype=dtype)
    texts = None if queries is None else [query.text for query in read_queries(queries).values()]
    report = build_ann(
        index.store, index.student, recall=recall, depth=depth, queries=texts, show_progress=session.show_progress
    )
    session.say(ann_remark(report))
    session.write_report(context, json_path, report)


def snapshot(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.", show_default=False)],
    drop: Annotated[bool, typer.Option("--drop", help="Forget the snapshot of this name.")] = False,
) -> None:
    """Keep what it holds now under a name; `stats` lists them.

    A snapshot is a folder that search takes, in snapshots/ of the index.
    """
    from d2llm.retrieval.index import Index

    index = Index.open(folder_of(context))
    if drop:
        index.store.drop_snapshot(name)
        session_of(context).say(f"index: the snapshot {name!r} is gone")
    else:
        session_of(context).say(f"index: {len(index):,} passages are kept in {index.snapshot(name)}")


def restore(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the snapshot.", show_default=False)],
) -> None:
    """Put a snapshot's passages in the place of the index's."""
    from d2llm.retrieval.index import Index

    num_passages = Index.open(folder_of(context)).restore(name)
    session_of(context).say(f"index: it holds the {num_passages:,} passages of the snapshot {name!r} again")


def verify(
    context: typer.Context,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Make damaged indices and vectors anew, and take other damaged files from snapshots.",
        ),
    ] = False,
    go_back: Annotated[
        bool,
        typer.Option(
            "--go-back",
            help="With --repair, where passages are damaged: return to the last version that is whole.",
        ),
    ] = False,
    student: MakerOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Read everything and say what is not as it was written."""
    from d2llm.retrieval.index import Index

    session = session_of(context)
    index = Index.open(folder_of(context), student, device=device, dtype=dtype)
    report = index.verify(repair=repair, go_back=go_back, show_progress=session.show_progress)
    for problem in report.problems:
        session.complain("problem", problem)
    left = index.verify().problems if repair and report.problems else report.problems
    after = f", {len(left)} after the repair" if repair and report.problems else ""
    session.say(
        f"index: {report.num_passages:,} passages and {report.num_snapshots} snapshots looked at, "
        f"{len(report.problems)} problems{after}"
    )
    session.write_report(context, json_path, report)
    if left:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add these verbs to those of an index."""
    del app
    for verb in (compact, ann, snapshot, restore, verify):
        index_app.command(verb.__name__)(verb)
