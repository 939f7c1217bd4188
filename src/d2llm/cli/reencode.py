"""The verb ``index INDEX reencode``."""

from __future__ import annotations

from typing import Annotated

import typer

from d2llm.cli.index import folder_of, index_app
from d2llm.cli.options import DeviceOption, DtypeOption, EngineOption, JsonOption, student_option
from d2llm.cli.session import session_of
from d2llm.core.names import counted


@index_app.command("reencode")
def reencode(
    context: typer.Context,
    student: Annotated[str, student_option(help="The new student.")],
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Give the index another student, while the old one is still searched and served.

    All passages are encoded into a folder beside the index, which takes its place when it is complete. If interrupted,
    the same command continues where it stopped.
    """
    from d2llm.retrieval.reencode import reencode as encode_again

    report = encode_again(folder_of(context), student, device=device, dtype=dtype, engine=engine)
    session_of(context).say(
        f"reencode: {counted(report.num_passages, 'passage')}, {report.num_encoded:,} encoded now by {student}; "
        f"{report.num_caught_up:,} had changed meanwhile"
    )
    session_of(context).write_report(context, json_path, report)
