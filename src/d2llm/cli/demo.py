"""The verb ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import JsonOption, StudentOption
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.shipped import DEFAULT_STUDENT


@verb("Tools")
def demo(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Keep the indexes here.", show_default="the user's cache folder"),
    ] = None,
    student: StudentOption = DEFAULT_STUDENT,
    json_path: JsonOption = None,
) -> None:
    """Search your Python's documentation, as a demonstration.

    Takes a few minutes. The texts are read from the standard library on this machine; nothing is downloaded.
    """
    from d2llm.demo.demo import run_demo

    session = session_of(context)
    report = run_demo(folder, student=student)
    session.write_report(context, json_path, report)
