"""The verb ``size``: what an index and its searches will cost, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2llm.cli.options import (
    JsonOption,
    input_path,
    known_student,
    known_teacher,
    teacher_config,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.sizing.plan import SizePlan

if TYPE_CHECKING:
    from d2llm.core.types import Passage


@verb("Tools")
def size(
    context: typer.Context,
    settings: Annotated[dict[str, Any], SizePlan],
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            exists=True,
            allow_dash=True,
            callback=input_path,
            help="Your texts, of which a sample is read.",
            show_default="the benchmarks'",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine first, for about two minutes, and remember it.")
    ] = False,
    json_path: JsonOption = None,
) -> None:
    """Compute bytes, times, machines and costs of a planned index.

    Give --passages, or --measure, or both.
    """
    planned = "passages" in settings
    if not planned and not measure:
        raise InputError("give --passages, such as --passages 50M, or --measure to measure this machine")
    plan = SizePlan(**{"passages": settings.get("shards", 1)} | settings)
    known_student(plan.student)
    known_teacher(plan.teacher)
    session = session_of(context)
    from d2llm.models.student import Student
    from d2llm.models.teachers.pair_teacher import load_teacher
    from d2llm.sizing.measure import made_up_passages, measure_speeds
    from d2llm.sizing.size import size as size_of
    from d2llm.sizing.speeds import keep_speeds
    from d2llm.sizing.tables import size_tables, speeds_table
    from d2llm.sizing.texts import read_text_facts

    student = Student.load(plan.student)
    sample = None if corpus is None else _sample(corpus)
    speeds, report = None, None
    if measure:
        teacher = plan.teacher
        teachers = {} if teacher is None else {teacher: lambda: load_teacher(teacher_config(teacher, None))}
        passages = sample or made_up_passages(student)
        speeds = measure_speeds(student, passages, task=plan.task, teachers=teachers)
        session.say(f"kept in {keep_speeds(speeds)}")
        session.show(speeds_table(speeds))
    if planned:
        texts = None if sample is None else read_text_facts(sample, student, str(corpus))
        report = size_of(plan, student=student, texts=texts)
        for table in size_tables(report):
            session.show(table)
        for remark in report.remarks:
            session.complain("note", remark)
    measured = None if speeds is None else speeds.model_dump(mode="json")
    session.write_report(context, json_path, {"size": report, "speeds": measured})


def _sample(corpus: Path) -> list[Passage]:
    """The first passages of a corpus; a longer sample than is used, so that it can be spread."""
    from itertools import islice

    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.sizing.texts import SAMPLE_PASSAGES

    return list(islice(open_corpus([corpus]).passages, 10 * SAMPLE_PASSAGES))
