"""The verbs that search: encode and search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.apps.options import (
    DEFAULT_STUDENT,
    SEARCH,
    DeviceOption,
    DtypeOption,
    JsonOption,
    NumberFormat,
    StudentOption,
)
from d2llm.apps.session import session_of
from d2llm.core.types import Task

if TYPE_CHECKING:
    from d2llm.core.types import Query
    from d2llm.index.folder import FolderIndex

_QUICK_QUERIES = 32  # so many are answered before a progress bar is of use


def encode(
    context: typer.Context,
    corpus: Annotated[
        Path,
        typer.Argument(
            metavar="CORPUS",
            help="corpus.jsonl or corpus.jsonl.gz, or a folder that holds one.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="INDEX", help="Where the index goes.", show_default=False)],
    student: StudentOption = DEFAULT_STUDENT,
    task: Annotated[
        Task,
        typer.Option("--task", help="What searches on it ask: an answer (asymmetric), or the same said (symmetric)."),
    ] = "asymmetric",
    vector_dtype: Annotated[
        NumberFormat, typer.Option("--vector-dtype", help="Number format of the stored vectors.")
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Turn a corpus into an index that can be searched.

    Stopped, it goes on where it was when the same command is given again.
    """
    from d2llm.models.student import Student
    from d2llm.pipeline.encode import encode

    session = session_of(context)
    model = Student.load(student, device=device, dtype=dtype)
    report = encode(
        corpus,
        model,
        out,
        task=task,
        dtype=vector_dtype,
        student_source=str(Path(student).resolve()) if Path(student).is_dir() else student,
        overwrite=overwrite,
        show_progress=session.show_progress,
    )
    session.say(
        f"encode: {report.num_passages:,} passages in {report.seconds:,.1f} s, {report.num_truncated:,} truncated, "
        f"{report.vector_bytes_per_passage:,} bytes of vector each, in {out}"
    )
    session.write_report(context, json_path, report)


def search(
    context: typer.Context,
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="What encode made.", show_default=False)],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="QUERY", help="What to look for.", show_default=False)
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option("--queries", metavar="FILE", help="queries.jsonl or queries.jsonl.gz to ask as well."),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="NAME_OR_FOLDER",
            help="The student that made the index, if it is no longer where it was then.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many passages to show.")] = 5,
    num_candidates: Annotated[
        int, typer.Option("--candidates", min=1, help="Passages that get the full score; more is slower and surer.")
    ] = 1000,
    exact: Annotated[bool, typer.Option("--exact", help="Give every passage the full score.")] = False,
    task: Annotated[
        Task | None, typer.Option("--task", help="What the queries ask.", show_default="the index's")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Find the passages of an index that answer a query, best first."""
    from d2llm.apps.tables import ranking_table
    from d2llm.index.folder import FolderIndex
    from d2llm.models.student import Student
    from d2llm.pipeline.search import search

    session = session_of(context)
    asked = _questions(texts or [], queries)
    opened = FolderIndex.open(index)
    model = Student.load(student or _student_of(opened), device=device, dtype=dtype)
    rankings = search(
        opened,
        model,
        asked,
        task=task,
        top_k=top_k,
        num_candidates=num_candidates,
        exact=exact,
        show_progress=session.show_progress if len(asked) > _QUICK_QUERIES else False,
    )
    for ranking in rankings:
        session.show(ranking_table(ranking))
    session.write_report(context, json_path, {"student": model.fingerprint, "rankings": rankings})


def register(app: typer.Typer) -> None:
    """Add these verbs to the program."""
    for verb in (encode, search):
        app.command(verb.__name__, rich_help_panel=SEARCH)(verb)


def _questions(texts: list[str], file: Path | None) -> list[Query]:
    from d2llm.core.errors import InputError
    from d2llm.core.types import Query
    from d2llm.data.beir import read_queries

    if not texts and file is None:
        raise InputError("there is no query; write one behind the index, or give a file with --queries")
    asked = [Query(str(number), text) for number, text in enumerate(texts, start=1)]
    return asked + (list(read_queries(file).values()) if file is not None else [])


def _student_of(index: FolderIndex) -> str:
    """The student that the index remembers.

    Raises:
        InputError: it remembers none, or a folder that is no longer there.
    """
    from d2llm.core.errors import InputError

    source = index.student_source
    if source is None:
        raise InputError(f"{index.folder}: the index does not know where its student is; name it with --student")
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise InputError(f"{index.folder}: its student was in {source}, which is not there; name it with --student")
    return source
