"""The verb ``size``: what an index and its searches, or a training, will cost, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    from d2llm.cli.session import Session
    from d2llm.core.types import Passage
    from d2llm.sizing.training_memory import TrainingMemory


_CorpusOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        exists=True,
        allow_dash=True,
        callback=input_path,
        help="Your texts, of which a sample is read.",
        show_default="the benchmarks'",
    ),
]
_TrainOption = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        callback=input_path,
        help="Compute the memory that training the student of this recipe takes.",
        show_default="none",
    ),
]


@verb("Tools")
def size(
    context: typer.Context,
    settings: Annotated[dict[str, Any], SizePlan],
    corpus: _CorpusOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine first, for about two minutes, and remember it.")
    ] = False,
    train: _TrainOption = None,
    train_on: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where to train; it need not be this machine, see --machine-memory.")
    ] = "cpu",
    json_path: JsonOption = None,
) -> None:
    """Compute what a planned index, or a training, will cost.

    Give --passages or --measure for the bytes, times, machines and costs of an index, --train for the memory of a
    training.
    """
    planned = "passages" in settings
    if not planned and not measure and train is None:
        raise InputError(
            "give --passages, such as --passages 50M, --measure to measure this machine, or --train with a recipe"
        )
    plan = SizePlan(**{"passages": settings.get("shards", 1)} | settings)
    known_student(plan.student)
    known_teacher(plan.teacher)
    session = session_of(context)
    memory = None if train is None else _training_memory(session, train, train_on, plan.machine_memory)
    if not planned and not measure:
        session.write_report(context, json_path, {"size": None, "speeds": None, "training": memory})
        return
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
    session.write_report(context, json_path, {"size": report, "speeds": measured, "training": memory})


def _training_memory(session: Session, recipe: str, device: str, memory: int | None) -> TrainingMemory:
    """Compute and show the memory of a training."""
    from d2llm.recipe.recipe_file import load_recipe
    from d2llm.sizing.tables import training_table
    from d2llm.sizing.training_memory import training_memory

    needed = training_memory(load_recipe(recipe), device=device, memory=memory)
    session.show(training_table(needed, f"Memory to train {recipe} on {device}"))
    return needed


def _sample(corpus: Path) -> list[Passage]:
    """The first passages of a corpus; a longer sample than is used, so that it can be spread."""
    from itertools import islice

    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.sizing.texts import SAMPLE_PASSAGES

    return list(islice(open_corpus([corpus]).passages, 10 * SAMPLE_PASSAGES))
