"""The verb ``labels`` and its subcommands: what label stores hold, one of several, and files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import JsonOption, in_existing_folder, output_file
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb_group
from d2llm.core.names import counted

labels_app = verb_group("labels", "Count, merge and export teachers' labels.", heading="Distil")
_StoreArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A label store, as `d2llm label` writes it.")]


@labels_app.command("stats")
def stats(context: typer.Context, folder: _StoreArgument, json_path: JsonOption = None) -> None:
    """Count the labels of each teacher, prompt and data set."""
    from d2llm.data.label_sets import count_labels
    from d2llm.reports.data_tables import label_table

    session = session_of(context)
    counts = count_labels(folder)
    session.show(label_table(counts))
    session.write_report(context, json_path, counts)


@labels_app.command("merge")
def merge(
    context: typer.Context,
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Label stores, for example of several machines.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="The new store.")],
    json_path: JsonOption = None,
) -> None:
    """Write the labels of several stores into a new one, each pair once.

    Of a pair that several stores have, the label of the last one counts. Old stores are kept.
    """
    from d2llm.data.label_sets import merge_labels

    session = session_of(context)
    report = merge_labels(folders, out)
    message = f"labels: {counted(report.num_pairs, 'pair')} of {counted(report.num_queries, 'query')}"
    if report.num_repeated:
        message += (
            f"; {counted(report.num_repeated, 'was', 'were')} labelled more than once, with log-odds that differ by "
        )
        message += f"{report.largest_difference:.3g} at most"
    session.say(f"{message}; in {out}")
    session.write_report(context, json_path, report)


@labels_app.command("export")
def export(
    context: typer.Context,
    folder: _StoreArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            callback=output_file,
            help="The file to write: .parquet, .jsonl or .csv; -: JSON lines to standard output.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Only labels of this teacher; a beginning is enough.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Only labels with this prompt; a beginning is enough.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Only labels of this data set.")] = None,
) -> None:
    """Write labels as one table for other programs, a row for each pair."""
    from d2llm.data.label_sets import export_labels

    num_pairs = export_labels(folder, out, teacher=teacher, prompt=prompt, dataset=dataset)
    session_of(context).say(f"labels: {counted(num_pairs, 'pair')} in {out}")
