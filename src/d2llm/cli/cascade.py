"""A teacher behind a search: the verb ``index ... calibrate``, and what ``search --teacher`` needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.index import MakerOption, folder_of, index_app
from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PromptOption,
    QueryTaskOption,
    known_teacher,
    teacher_config,
)
from d2llm.cli.session import session_of
from d2llm.core.types import Task

if TYPE_CHECKING:
    from d2llm.core.types import CascadeReport
    from d2llm.retrieval.cascade import Cascade
    from d2llm.retrieval.index import Index


def calibrate(
    context: typer.Context,
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            callback=known_teacher,
            help="A teacher: a folder, a name, or KIND:MODEL.",
            show_default=False,
        ),
    ],
    queries: Annotated[
        Path,
        typer.Option(
            "--queries",
            metavar="FILE",
            help="queries.jsonl or queries.jsonl.gz like those to come; no judgements are needed.",
            show_default=False,
        ),
    ],
    num_queries: Annotated[
        int, typer.Option("--num-queries", min=1, help="Take so many, at random (always the same).")
    ] = 40,
    prompt: PromptOption = None,
    student: MakerOption = None,
    task: QueryTaskOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Measure how far its student errs against a teacher, for `search --teacher`.

    The teacher reads ten of the first fifty passages of each query. What comes out is kept beside the index.
    """
    import random

    from d2llm.data.beir import read_queries
    from d2llm.models.teachers.judge import load_judge
    from d2llm.retrieval.calibrate import measure_error, write_error
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.row_evidence import weights_for

    session = session_of(context)
    asked = list(read_queries(queries).values())
    chosen = random.Random(0).sample(asked, min(num_queries, len(asked)))
    index = Index.open(folder_of(context), student, device=device, dtype=dtype)
    judge = load_judge(teacher_config(teacher, prompt), device=device, dtype=dtype)
    error = measure_error(index.view, index.student, judge, chosen, task=task)
    named = task or index.view.task
    evidence = weights_for(index.view, index.student, named)
    file = write_error(folder_of(context), judge, named, error, evidence)
    session.say(
        f"calibrate: a passage's log-odds are {error.slope:.3g} times the student's score, within {error.sigma:.2f} "
        f"(standard deviation, of {error.num_pairs:,} pairs); kept in {file}"
    )
    session.write_report(context, json_path, error)


def load_cascade(
    index: Index,
    task: Task,
    teacher: str,
    prompt: str | None,
    teacher_passages: int | None,
    teacher_ms: float | None,
    device: str | None,
    dtype: str | None,
) -> Cascade:
    """The cascade that the options of a search name; the student's error is the one kept beside the index."""
    from d2llm.models.teachers.judge import load_judge
    from d2llm.retrieval.calibrate import read_error
    from d2llm.retrieval.cascade import Cascade
    from d2llm.retrieval.row_evidence import weights_for

    judge = load_judge(teacher_config(teacher, prompt), device=device, dtype=dtype)
    error = read_error(index.folder, judge, task, weights_for(index.view, index.student, task))
    return Cascade(judge, error, teacher_passages, teacher_ms)


def cascade_line(report: CascadeReport) -> str:
    """What a teacher did to a ranking, in one line."""
    moves = ", ".join(f"{before} -> {now}" for before, now in report.moved)
    cut = f", {report.num_truncated} of them in part" if report.num_truncated else ""
    cut += ", until its time was up" if report.out_of_time else ""
    return (
        f"teacher: the student was unsure of {len(report.unsure)} passages; {len(report.read)} were read{cut}, in "
        f"{1e3 * report.seconds:,.0f} ms; " + (f"places: {moves}" if moves else "no place changed")
    )


def register(app: typer.Typer) -> None:
    """Add this verb to those of an index."""
    del app
    index_app.command("calibrate")(calibrate)
