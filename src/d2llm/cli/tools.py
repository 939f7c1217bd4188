"""The verbs ``demo``, ``judge``, ``size``, ``doctor`` and ``methods``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PromptOption,
    RecordedDataOption,
    StudentOption,
    input_path,
    known_student,
    known_teacher,
    recorded_teacher_config,
    teacher_config,
    teacher_option,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.core.settings import STUDENT_HELP, TASK_HELP
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import Task
from d2llm.sizing.plan import SizePlan

if TYPE_CHECKING:
    from d2llm.cli.session import Session
    from d2llm.core.types import Passage
    from d2llm.sizing.training_memory import TrainingMemory


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
    from d2llm.sizing.size import size_tables, speeds_table
    from d2llm.sizing.speeds import keep_speeds
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
    from d2llm.recipe.recipe import load_recipe
    from d2llm.sizing.size import training_table
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


EXIT_PROBLEM = 1


@verb("Tools")
def doctor(
    context: typer.Context,
    student: Annotated[
        str, typer.Option(metavar="NAME_OR_FOLDER", help=STUDENT_HELP)
    ] = DEFAULT_STUDENT,  # not StudentOption: a missing student is one of the findings
    index: Annotated[Path | None, typer.Option(metavar="INDEX", help="Also check an index, with its student.")] = None,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm", help="Also compile the loops of searches and export the student's graph, once for this user."
        ),
    ] = False,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Check packages, machine, student and index; say what to do.

    Ends with exit code 1 if there is a problem; notes do not count.
    """
    from d2llm.doctor.doctor import examine
    from d2llm.doctor.findings import findings_table

    session = session_of(context)
    findings = list(examine(student=student, index=index, device=device, warm=warm))
    problems = sum(finding.level == "problem" for finding in findings)
    session.show(findings_table(findings))
    session.write_report(context, json_path, {"findings": findings, "num_problems": problems})
    if problems:
        session.complain("warning", f"{counted(problems, 'problem')}: see the last column")
        raise typer.Exit(EXIT_PROBLEM)


@verb("Distil")
def methods(
    context: typer.Context,
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", help="Show this one in full, with its settings, or all of a section: losses, backbones."
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """List methods by kind: papers, needs, what they measured.

    These are poolings, losses, pretrainings, teachers, writers, rerankers and so on, also those of other packages.
    """
    from d2llm.core.names import suggestion
    from d2llm.reports.methods import SECTIONS, describe_methods, facts_table, methods_table, settings_table

    session, sections = session_of(context), describe_methods()
    names = {name: {name, name.rpartition(".")[2], *_words(registry.what)} for name, registry in SECTIONS.items()}
    listed = [section for section in sections if kind is None or kind in names[section]]
    if kind is None or listed:
        sections = {section: sections[section] for section in listed}
        for section, found in sections.items():
            session.show(methods_table(section, found))
    else:
        known = [name for found in sections.values() for name in found] + sorted(set().union(*names.values()))
        sections = {section: {kind: found[kind]} for section, found in sections.items() if kind in found}
        if not sections:
            raise InputError(f"no method or section '{kind}'; {suggestion(kind, dict.fromkeys(known), 'there are')}")
        for section, found in sections.items():
            session.show(facts_table(section, kind, found[kind]))
            if found[kind].settings:
                session.show(settings_table(found[kind]))
    session.write_report(context, json_path, sections)


def _words(what: str) -> set[str]:
    """What things are called, one or many: loss, losses."""
    word = what.removeprefix("kind of ")
    return {word, f"{word}es" if word.endswith("s") else f"{word}s"}
