"""The verb ``mteb``: a student on tasks of mteb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import DeviceOption, JsonOption, MarkdownOption, StudentArgument
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.document import Document, Note, Section


@verb("Measure")
def mteb(
    context: typer.Context,
    student: StudentArgument,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            metavar="TASK",
            help="A task of mteb, a data set on disk, or KIND=FOLDER, as Reranking=data/wikiqa-pairs. Repeatable.",
        ),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help='All tasks of a benchmark of mteb, as "MTEB(eng, v2)".')
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where results go, as mteb writes and submits them.")
    ] = Path("mteb-results"),
    split: Annotated[str, typer.Option(help="Of data sets on disk, what is measured.")] = "test",
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Of data sets on disk, as mteb writes it.", show_default="told")
    ] = None,
    symmetric: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task whose queries look for texts that mean the same. Repeatable."),
    ] = None,
    device: DeviceOption = None,
    markdown_path: MarkdownOption = None,
    json_path: JsonOption = None,
) -> None:
    """Measure a student on tasks of mteb, by its whole score.

    A data set on disk is Retrieval, PairClassification, STS or Classification by what it holds; KIND also allows
    Reranking and Clustering. Tasks of mteb are downloaded. Finished tasks are not run again.
    """
    from d2llm.integrations.mteb_run import mteb_table, run_mteb

    session = session_of(context)
    report = run_mteb(
        student,
        tasks=tasks or (),
        benchmark=benchmark,
        out=out,
        split=split,
        language=language,
        symmetric=symmetric or (),
        device=device,
    )
    table = mteb_table(report)
    session.show(table)
    session.write_report(context, json_path, report)
    session.write_document(Document(table.title, [Section("", [table, Note(table.caption)])]), markdown_path)
