"""The verb ``judge``: a teacher's scores of a few passages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PromptOption,
    RecordedDataOption,
    input_path,
    recorded_teacher_config,
    teacher_config,
    teacher_option,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.settings import TASK_HELP
from d2llm.core.types import Task


@verb("Tools", shows_answers=True)
def judge(
    context: typer.Context,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.")],
    passages: Annotated[list[str], typer.Argument(metavar="PASSAGE", help="Texts to score.")],
    teacher: Annotated[
        str | None,
        teacher_option(
            metavar="NAME_OR_FOLDER", help="A model, or a folder that tune-teacher wrote.", show_default="smollm2"
        ),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=input_path, help="Take the grades from these lists (JSON Lines) instead."
        ),
    ] = None,
    data: RecordedDataOption = None,
    task: Annotated[Task, typer.Option(help=TASK_HELP)] = "asymmetric",
    prompt: PromptOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Ask a teacher how likely a passage is to answer a query."""
    from d2llm.models.teachers.pair_teacher import load_teacher
    from d2llm.reports.search_tables import pair_table

    for text in (query, *passages):
        if not text.strip():
            raise InputError(f"{text!r} has no text; give a query and passages with words in them")
    session = session_of(context)
    config = recorded_teacher_config(teacher, prompt, recorded, data) or teacher_config("smollm2", prompt)
    model = load_teacher(config, device=device, dtype=dtype)
    log_odds: list[float] = model.score_pairs([(query, passage) for passage in passages], task).log_odds.tolist()
    session.show(pair_table(query, passages, log_odds))
    scores = [{"passage": text, "log_odds": value} for text, value in zip(passages, log_odds, strict=True)]
    session.write_report(context, json_path, {"teacher": model.fingerprint, "scores": scores})
