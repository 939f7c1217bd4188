"""The verbs that search: encode and search."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from d2llm.cli.index_options import (
    ChunkOption,
    CopiesOption,
    CorpusArgument,
    FormatOption,
    LateOption,
    NewTaskOption,
    OverlapOption,
    WholeOption,
    WindowOption,
    WindowVectorsOption,
)
from d2llm.cli.index_writing import Splitting
from d2llm.cli.options import (
    SEARCH,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    PromptOption,
    QueryTaskOption,
    StudentOption,
    known_student,
    known_teacher,
)
from d2llm.cli.session import session_of
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.core.types import Grouping

if TYPE_CHECKING:
    from d2llm.core.types import Certificate, Query, Ranking
    from d2llm.retrieval.protocols import SearchStudent
    from d2llm.retrieval.settings import SearchSettings
    from d2llm.store.stored_vectors import VectorCopies


class SourceChoice(str, Enum):
    """``SourceName`` as an option that may be given several times."""

    vectors = "vectors"
    ann = "ann"
    bm25 = "bm25"


_NAMED = 5  # of the queries that are too long
_QUICK_QUERIES = 32  # so many are answered before a progress bar is of use


def encode(
    context: typer.Context,
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option("--out", metavar="INDEX", help="Where the index goes.", show_default=False)],
    student: StudentOption = DEFAULT_STUDENT,
    task: NewTaskOption = "asymmetric",
    vectors: FormatOption = "bfloat16",
    vector_copies: CopiesOption = 2,
    window_vectors: WindowVectorsOption = "auto",
    chunk_tokens: ChunkOption = None,
    chunk_overlap: OverlapOption = None,
    late: LateOption = False,
    late_window: WindowOption = None,
    whole: WholeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "torch",
    json_path: JsonOption = None,
) -> None:
    """Turn a whole corpus into a new index, at once.

    It appears when it is complete; d2llm index changes it. Stopped, it goes on where it was when the same command is
    given again.
    """
    from d2llm.models.student import Student
    from d2llm.retrieval.chunking import default_chunking
    from d2llm.retrieval.encode import encode
    from d2llm.retrieval.student_source import source_of

    session = session_of(context)
    splitting = Splitting(chunk_tokens, chunk_overlap, late, late_window, whole)
    model = Student.load(student, device=device, dtype=dtype, engine=engine)
    report = encode(
        corpus,
        model,
        out,
        task=task,
        vector_format=vectors,
        vector_copies=cast("VectorCopies", vector_copies),
        window_vectors=window_vectors,
        chunking=splitting.chunking(model) or default_chunking(model),
        student_source=source_of(student),
        overwrite=overwrite,
        show_progress=session.show_progress,
    )
    session.say(
        f"encode: {report.num_documents:,} texts in {report.num_passages:,} passages, {report.num_truncated:,} "
        f"truncated; {report.seconds:,.1f} s, {report.bytes_per_passage:,.0f} bytes each "
        f"({report.vector_bytes_per_passage:,} of vector), in {out}"
    )
    session.write_report(context, json_path, report)


def search(
    context: typer.Context,
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="What index or encode made, or a snapshot.", show_default=False)
    ],
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
            callback=known_student,
            help="The student that made the index, if it is no longer where it was then.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many passages to show.")] = 10,
    filter: Annotated[  # noqa: A002 - the word of the field
        str | None,
        typer.Option(
            "--filter",
            metavar="CONDITION",
            help="Only passages whose metadata fit, as in \"year >= 2020 AND language = 'en'\".",
            show_default=False,
        ),
    ] = None,
    num_candidates: Annotated[
        int, typer.Option("--num-candidates", min=1, help="Passages that get the full score; more is slower and surer.")
    ] = 1000,
    source: Annotated[
        list[SourceChoice] | None,
        typer.Option(
            "--source",
            help="Who proposes passages for the full score, several united; ann: quicker, see d2llm index.",
            show_default="vectors, and bm25 where the student's score counts words",
        ),
    ] = None,
    hybrid: Annotated[
        float | None,
        typer.Option(
            "--hybrid",
            metavar="SHARE",
            min=0,
            max=1,
            help="Fuse the student's ranking with BM25's, which also proposes; BM25's share, as in --hybrid 0.5.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="The exact ranking of all passages, proved.")] = False,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            "--budget-ms", min=0, help="With --exact: stop in time and say what is proved.", show_default=False
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each passage stands where it does.")] = False,
    group: Annotated[
        Grouping,
        typer.Option("--group", help="Rank documents by their best passage, or by the sum of their three best."),
    ] = "passage",
    neighbours: Annotated[
        int, typer.Option("--neighbours", min=0, help="Also show so many passages before and after, of the document.")
    ] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            callback=known_teacher,
            help="Reads again what the student is unsure of; `d2llm index INDEX calibrate` comes first.",
            show_default=False,
        ),
    ] = None,
    teacher_passages: Annotated[
        int, typer.Option("--teacher-passages", min=0, help="It reads at most so many for a query.")
    ] = 20,
    teacher_ms: Annotated[
        float | None,
        typer.Option("--teacher-ms", min=0, help="It reads for so long at most.", show_default=False),
    ] = None,
    prompt: PromptOption = None,
    task: QueryTaskOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "torch",
    json_path: JsonOption = None,
) -> None:
    """Find the passages of an index that answer a query, best first."""
    from d2llm.cli.cascade import cascade_line, load_cascade
    from d2llm.core.errors import InputError
    from d2llm.models.attribution import why_no_interaction
    from d2llm.models.student import Student
    from d2llm.reports.search_tables import explanation_table, ranking_list
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.search import search
    from d2llm.retrieval.settings import SearchSettings

    session = session_of(context)
    asked = _questions(texts or [], queries)
    settings = SearchSettings(
        task=task,
        top_k=top_k,
        num_candidates=num_candidates,
        filter=filter,
        sources=tuple(one.value for one in source) if source else None,
        hybrid=hybrid,
        exact=exact,
        budget_ms=budget_ms,
        explain=explain,
        group=group,
        neighbours=neighbours,
    )
    settings.check()
    if teacher is None and teacher_ms is not None:
        raise InputError("--teacher-ms is the time of a teacher; name one with --teacher, or leave it out")
    opened = Index.open(index, student, device=device, dtype=dtype, engine=engine, lean=True)
    if not len(opened.view):
        raise InputError(f"{index}: holds no passages; add some with d2llm index {index} upsert CORPUS")
    model = opened.student
    cascade = None
    if teacher is not None:
        cascade = load_cascade(
            opened, task or opened.view.task, teacher, prompt, teacher_passages, teacher_ms, device, dtype
        )
    show = session.show_progress if len(asked) > _QUICK_QUERIES else False
    rankings = search(opened.view, model, asked, settings, cascade=cascade, show_progress=show)
    for ranking in rankings:
        session.show(ranking_list(ranking))
        if not ranking.passages:
            session.complain("warning", f"no passage was found for {ranking.query.text!r}{_why_none(settings)}")
        if explain:
            session.show(explanation_table(ranking))
            reason = why_no_interaction(model, task or opened.view.task) if isinstance(model, Student) else None
            if reason is not None:
                session.say(f"search: {reason}")
        if ranking.cascade is not None:
            session.say(cascade_line(ranking.cascade))
        if ranking.certificate is not None:
            session.say(_proof(ranking.certificate, len(ranking.passages)))
    if (remark := _too_long(rankings, model)) is not None:
        session.complain("warning", remark)
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


def _too_long(rankings: list[Ranking], student: SearchStudent) -> str | None:
    """What to say of queries that were cut; None where none was."""
    cut = [ranking.query for ranking in rankings if ranking.truncated]
    if not cut:
        return None
    limit = getattr(student, "max_query_tokens", None)
    read = "the student reads" if limit is None else f"the {limit} tokens that the student reads"
    named = ", ".join(repr(query.id) for query in cut[:_NAMED]) + (", ..." if len(cut) > _NAMED else "")
    count = f"{len(cut):,} of {len(rankings):,} queries {'is' if len(cut) == 1 else 'are'}"
    return (
        f"{count} longer than {read} ({named}): what stands behind has no part in the student's scores. Ask a shorter "
        "question, or several"
    )


def _why_none(settings: SearchSettings) -> str:
    if settings.filter is not None:
        return ": no passage fits the filter" + (" and has a word of it" if settings.sources == ("bm25",) else "")
    return ": no passage has a word of it" if settings.sources == ("bm25",) else ""


def _proof(certificate: Certificate, num_places: int) -> str:
    of_all = certificate.num_scored + certificate.num_left
    proved = "all" if certificate.proved == num_places else f"the first {certificate.proved}"
    return (
        f"exact: {proved} of {num_places} places are proved; {certificate.num_scored:,} of {of_all:,} passages got the "
        f"full score"
        + (
            f", none of the others can have more than {certificate.highest_bound_left:.3f}"
            if certificate.num_left
            else ""
        )
    )
