"""The verb ``export``: a student as files that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from d2llm.cli.options import LOOK, JsonOption
from d2llm.cli.session import session_of


def export(
    context: typer.Context,
    student: Annotated[
        str,
        typer.Argument(metavar="STUDENT", help="A student's folder, or the name of a shipped one.", show_default=False),
    ],
    to: Annotated[
        Literal["onnx", "openvino", "numpy"],
        typer.Option(
            "--to",
            help="onnx, openvino: graphs from tokens to a vector and from vectors to scores; numpy: the head alone, as "
            "arrays and one Python file.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go.", show_default=False)],
    int8: Annotated[
        bool, typer.Option("--int8", help="Products of eight bits where a text is read: smaller, faster, less exact.")
    ] = False,
    json_path: JsonOption = None,
) -> None:
    """Write a student as files for programs without d2llm.

    What is written is float32, whatever this machine computes with, and with --int8 the text's products of eight bits.
    """
    from d2llm.models.export.export import export
    from d2llm.models.student import Student

    session = session_of(context)
    report = export(Student.load(student, device="cpu", dtype="float32"), out, to, int8=int8)
    session.say(f"export: {', '.join(report.files)} in {out}, {report.num_bytes:,} bytes, {report.precision}")
    session.write_report(context, json_path, report)


def register(app: typer.Typer) -> None:
    """Add this verb to the program."""
    app.command("export", rich_help_panel=LOOK)(export)
