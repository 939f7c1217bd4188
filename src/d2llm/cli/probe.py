"""The verb ``probe``: what a student's vectors know of a text, and what they can rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.index_options import warn_of_skipped
from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    MarkdownOption,
    StudentArgument,
    TaskOption,
    input_path,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Measure")
def probe(
    context: typer.Context,
    student: StudentArgument,
    corpus: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CORPUS]...",
            callback=input_path,
            help="Texts to probe with: a corpus, or documents. Without: generated sets alone.",
        ),
    ] = None,
    texts: Annotated[int, typer.Option(min=200, help="Sentences of the corpus to probe with, at most.")] = 2000,
    persons: Annotated[int, typer.Option(min=5, help="Passages of LIMIT of which each two answer one query.")] = 30,
    distractors: Annotated[int, typer.Option(min=0, help="Passages of LIMIT that answer no query.")] = 270,
    scenes: Annotated[int, typer.Option(min=20, help="Passages of the granularity set.")] = 200,
    task: TaskOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sentences, classes and generated sets.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    html_path: HtmlOption = None,
    markdown_path: MarkdownOption = None,
    json_path: JsonOption = None,
) -> None:
    """Measure what a student's vectors know, without annotated data.

    From the vectors of CORPUS's sentences, a linear classifier reads length, words and their order (probing tasks of
    SentEval). Two generated sets show what the vectors can rank: LIMIT, whose queries are answered by every pair of
    some passages, and one whose queries name the gist of a passage, a thing in it, or a detail.
    """
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.evaluation.probe import probe
    from d2llm.models.protocols import task_for
    from d2llm.models.student import Student
    from d2llm.reports.leaderboard import probe_document, probe_tables

    session = session_of(context)
    opened = open_corpus(corpus, with_metadata=False) if corpus else None
    model = Student.load(student, device=device, dtype=dtype)
    report = probe(
        model,
        None if opened is None else opened.passages,
        name=student,
        fingerprint=model.fingerprint,
        task=task_for(model, task),
        num_texts=texts,
        num_persons=persons,
        num_distractors=distractors,
        num_scenes=scenes,
        seed=seed,
    )
    if opened is not None:
        warn_of_skipped(session, opened.skipped)
    for table in probe_tables(report):
        session.show(table)
    session.write_report(context, json_path, report)
    session.write_document(probe_document(report), markdown_path, html_path)
