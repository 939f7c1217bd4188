"""The verb ``leaderboard``: many evaluations in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import HtmlOption, JsonOption, MarkdownOption, input_path
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Measure")
def leaderboard(
    context: typer.Context,
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...",
            callback=input_path,
            help="Files that d2llm evaluate --json wrote, or folders of such files.",
        ),
    ],
    markdown_path: MarkdownOption = None,
    html_path: HtmlOption = None,
    json_path: JsonOption = None,
) -> None:
    """Show evaluations of several sets and students in one table.

    Each system gets its mean over the data sets, and the number of sets on which it differs significantly from the
    baseline. Reports of different students can be mixed.
    """
    from rich.text import Text

    from d2llm.evaluation.leaderboard import read_leaderboard
    from d2llm.reports.leaderboard import leaderboard_document, leaderboard_tables

    board = read_leaderboard(reports)
    session = session_of(context)
    for table in leaderboard_tables(board):
        session.show(table)
    if board.notes:
        session.show(Text("\n".join(board.notes)))
    session.write_report(context, json_path, board)
    session.write_document(leaderboard_document(board), markdown_path, html_path)
