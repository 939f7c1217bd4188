"""The verb ``size``: what an index and its searches will cost, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.options import (
    JsonOption,
    StudentOption,
    TaskOption,
    input_path,
    known_teacher,
    teacher_config,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.errors import InputError
from d2llm.core.shipped import DEFAULT_STUDENT

if TYPE_CHECKING:
    from d2llm.core.types import Passage
    from d2llm.sizing.plan import SizePlan


@dataclass(frozen=True)
class IndexOptions:
    """Options about the index to be built."""

    passages: Annotated[
        str | None, typer.Option(metavar="N", help="How many passages: 20000, 10k, 50M, 2.5B.", show_default="none")
    ] = None
    tokens: Annotated[str, typer.Option(metavar="N", help="Mean tokens of a passage.")] = "128"
    student: StudentOption = DEFAULT_STUDENT
    task: TaskOption = None
    vectors: Annotated[str, typer.Option(metavar="FORMAT", help="How vectors are stored.")] = "bfloat16"
    vector_copies: Annotated[int, typer.Option(metavar="N", min=1, max=2, help="Copies of each vector.")] = 2
    window_vectors: Annotated[str, typer.Option(metavar="FORMAT", help="Window vectors: auto, none or a format.")] = (
        "auto"
    )
    token_vectors: Annotated[str, typer.Option(metavar="FORMAT", help="Token embeddings: auto, none or a format.")] = (
        "auto"
    )


@dataclass(frozen=True)
class SearchOptions:
    """Options about searches and the machines that answer them."""

    qps: Annotated[
        float | None,
        typer.Option(metavar="N", help="Queries a second, for the number of machines.", show_default="none"),
    ] = None
    recall: Annotated[
        float, typer.Option(metavar="FRACTION", help="Fraction of the exact first ten that a search must find.")
    ] = 0.99
    num_candidates: Annotated[str, typer.Option(metavar="N", help="Passages that get the full score.")] = "1000"
    shards: Annotated[str, typer.Option(metavar="N", help="At least so many shards; smaller ones answer sooner.")] = "1"
    machine_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Memory of one machine: 64GiB.", show_default="what is free on this one"),
    ] = None
    machine_cores: Annotated[
        str | None, typer.Option(metavar="N", help="Cores of one machine.", show_default="those of this one")
    ] = None


@dataclass(frozen=True)
class LabelOptions:
    """Options about labelling."""

    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", callback=known_teacher, help="Teacher that labels pairs.", show_default="none"),
    ] = None
    queries: Annotated[str, typer.Option(metavar="N", help="Queries whose candidates the teacher labels.")] = "10k"
    candidates: Annotated[str, typer.Option(metavar="N", help="Candidates that it labels for each.")] = "20"


@dataclass(frozen=True)
class PriceOptions:
    """Prices, in any currency."""

    core_hour_price: Annotated[float | None, typer.Option(metavar="PRICE", help="Price of a core for an hour.")] = None
    memory_price: Annotated[
        float | None, typer.Option(metavar="PRICE", help="Price of a GiB of memory for a month.")
    ] = None
    disk_price: Annotated[float | None, typer.Option(metavar="PRICE", help="Price of a GiB of disk for a month.")] = (
        None
    )


@verb("Tools")
def size(
    context: typer.Context,
    index: IndexOptions,
    search: SearchOptions,
    labels: LabelOptions,
    prices: PriceOptions,
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
    if index.passages is None and not measure:
        raise InputError("give --passages, such as --passages 50M, or --measure to measure this machine")
    plan = None if index.passages is None else _plan(index.passages, index, search, labels, prices)
    if plan is not None:
        plan.check()
    session = session_of(context)
    from d2llm.models.student import Student
    from d2llm.models.teachers.judge import load_judge
    from d2llm.sizing.measure import made_up_passages, measure_speeds
    from d2llm.sizing.size import size as size_of
    from d2llm.sizing.speeds import keep_speeds
    from d2llm.sizing.tables import size_tables, speeds_table
    from d2llm.sizing.texts import read_text_facts

    student = Student.load(index.student)
    sample = None if corpus is None else _sample(corpus)
    speeds, report = None, None
    if measure:
        teacher = labels.teacher
        teachers = {} if teacher is None else {teacher: lambda: load_judge(teacher_config(teacher, None))}
        passages = sample or made_up_passages(student)
        speeds = measure_speeds(student, passages, task=index.task, teachers=teachers)
        session.say(f"kept in {keep_speeds(speeds)}")
        session.show(speeds_table(speeds))
    if plan is not None:
        texts = None if sample is None else read_text_facts(sample, student, str(corpus))
        report = size_of(plan, student=student, texts=texts)
        for table in size_tables(report):
            session.show(table)
        for remark in report.remarks:
            session.complain("note", remark)
    measured = None if speeds is None else speeds.model_dump(mode="json")
    session.write_report(context, json_path, {"size": report, "speeds": measured})


def _plan(
    passages: str, index: IndexOptions, search: SearchOptions, labels: LabelOptions, prices: PriceOptions
) -> SizePlan:
    from d2llm.sizing.plan import SizePlan, parse_bytes, parse_count

    memory, cores = search.machine_memory, search.machine_cores
    return SizePlan(
        passages=parse_count(passages, "--passages"),
        tokens=parse_count(index.tokens, "--tokens"),
        qps=search.qps,
        recall=search.recall,
        student=index.student,
        task=index.task,
        vector_format=index.vectors,
        vector_copies=1 if index.vector_copies == 1 else 2,
        window_vectors=index.window_vectors,
        token_vectors=index.token_vectors,
        num_candidates=parse_count(search.num_candidates, "--num-candidates"),
        teacher=labels.teacher,
        queries=parse_count(labels.queries, "--queries"),
        candidates=parse_count(labels.candidates, "--candidates"),
        shards=parse_count(search.shards, "--shards"),
        machine_memory=None if memory is None else parse_bytes(memory, "--machine-memory"),
        machine_cores=None if cores is None else parse_count(cores, "--machine-cores"),
        core_hour_price=prices.core_hour_price,
        memory_price=prices.memory_price,
        disk_price=prices.disk_price,
    )


def _sample(corpus: Path) -> list[Passage]:
    """The first passages of a corpus; a longer sample than is used, so that it can be spread."""
    from itertools import islice

    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.sizing.texts import SAMPLE_PASSAGES

    return list(islice(open_corpus([corpus]).passages, 10 * SAMPLE_PASSAGES))
