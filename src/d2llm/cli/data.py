"""The verb ``data`` and its subcommand ``check``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.options import JsonOption, input_path
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb_group
from d2llm.core.errors import InputError
from d2llm.core.shipped import DEFAULT_STUDENT

if TYPE_CHECKING:
    from d2llm.data.check_report import DataReport

_NUM_NAMED = 3
data_app = verb_group("data", "Inspect data sets.", heading="Measure")


@data_app.command("check")
def check(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            callback=input_path,
            help="A folder in BEIR layout, a folder or file of pairs, or hf://owner/name[:config].",
        ),
    ],
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Do not fail if queries or pairs are in two splits.")
    ] = False,
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME_OR_FOLDER", help="Student or model whose tokenizer and limits to use.")
    ] = DEFAULT_STUDENT,
    near: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Minimum similarity of near queries (shared trigrams); 1: none.")
    ] = 0.8,
    sample: Annotated[
        int, typer.Option(min=1, help="Number of queries and passages whose length to measure.")
    ] = 50_000,
    json_path: JsonOption = None,
) -> None:
    """Count what is in a data set and find leaks between its splits."""
    from d2llm.reports.data_tables import data_tables
    from d2llm.training.check_data import check_data

    session = session_of(context)
    report = check_data(data, tokenizer=tokenizer, near=near, sample_size=sample)
    for table in data_tables(report):
        session.show(table)
    session.write_report(context, json_path, report)
    if report.leaks and not allow_leaks:
        raise InputError(_leak_message(report))


def _leak_message(report: DataReport) -> str:
    leaks = [
        f"{leak.count} of {leak.second} in {leak.first} ({leak.kind}: "
        f"{', '.join(' = '.join(ids) for ids in leak.examples[:_NUM_NAMED])})"
        for leak in report.leaks
    ]
    return (
        f"{report.path}: {report.num_leaks} leaks between splits: {'; '.join(leaks)}. Results measured on such splits "
        "are too high: remove these from one split, or accept them with --allow-leaks"
    )
