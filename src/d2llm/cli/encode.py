"""The verbs that write a whole index: ``encode``, ``shard`` and ``index INDEX reencode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2llm.cli.index import folder_of, index_app
from d2llm.cli.index_options import CorpusArgument, chunking_of, warn_of_skipped
from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    RunnerOptions,
    StudentOption,
    student_option,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.names import counted
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.data.settings import ReadingSettings
from d2llm.retrieval.settings import ChunkingSettings
from d2llm.store.index_spec import IndexSpec


@verb("Search")
def encode(
    context: typer.Context,
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="INDEX", help="Where the index goes.")],
    spec: IndexSpec,
    splitting: ChunkingSettings,
    files: ReadingSettings,
    workers: RunnerOptions,
    student: StudentOption = DEFAULT_STUDENT,
    shards: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Make a sharded index of N shards.", show_default="not sharded"),
    ] = None,
    prune: Annotated[
        float,
        typer.Option(
            metavar="FRACTION",
            min=0,
            max=1,
            help="Leave out this fraction of the passages, those least likely to answer any query (fit-scores "
            "--quality).",
        ),
    ] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Build a new index from a whole corpus.

    The index appears when it is complete; d2llm index can change it later. If interrupted, run the same command again
    to continue, with any runner.
    """
    from d2llm.core.manifest import source_of
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.student import Student
    from d2llm.reports.search_tables import encode_remark
    from d2llm.retrieval.chunking import default_chunking
    from d2llm.retrieval.encode import encode

    session = session_of(context)
    runner = workers.find()
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "engine": engine}
    # The workers of a cluster encode; here the student only splits texts, and this machine may lack their device.
    model = Student.load(student, **(loading if runner.is_local else dict[str, Any](device="cpu")))
    chunking = chunking_of(splitting, model) or default_chunking(model)
    texts = open_corpus(corpus, files)
    report = encode(
        texts,
        model,
        out,
        spec,
        chunking=chunking,
        num_shards=shards,
        prune=prune,
        student_source=source_of(student),
        overwrite=overwrite,
        runner=runner,
        **loading,
    )
    session.say(encode_remark(report))
    warn_of_skipped(session, report.skipped, texts.links)
    session.write_report(context, json_path, report)


@verb("Search")
def shard(
    context: typer.Context,
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder; it is not changed.")],
    shards: Annotated[int, typer.Option(metavar="N", min=1, help="Number of shards.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the sharded index goes.")],
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Put the shards into object storage, such as s3://bucket/docs; FOLDER then only says where they are.",
            show_default="in FOLDER",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Copy an index into shards, which are searched as one.

    Nothing is encoded, and searches give the same results. A sharded index of a corpus is also made by encode --shards.
    If interrupted, run the same command again to continue.
    """
    from d2llm.retrieval.shard import shard

    session = session_of(context)
    report = shard(index, out, shards, remote=remote)
    resumed = f" ({report.num_resumed:,} of them by an earlier call)" if report.num_resumed else ""
    session.say(
        f"shard: {counted(report.num_passages, 'passage')} copied{resumed} into {counted(report.num_shards, 'shard')} "
        f"of {report.fewest:,} to {report.most:,}; {report.num_bytes:,} bytes, {report.seconds:,.1f} s, in {out}"
        + ("" if remote is None else f" and {remote}")
    )
    session.write_report(context, json_path, report)


@index_app.command("reencode")
def reencode(
    context: typer.Context,
    student: Annotated[str, student_option(help="The new student.")],
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Give the index another student, while the old one is still searched and served.

    All passages are encoded into a folder beside the index, which takes its place when it is complete. If interrupted,
    the same command continues where it stopped.
    """
    from d2llm.retrieval.reencode import reencode as encode_again

    report = encode_again(folder_of(context), student, device=device, dtype=dtype, engine=engine)
    session_of(context).say(
        f"reencode: {counted(report.num_passages, 'passage')}, {report.num_encoded:,} encoded now by {student}; "
        f"{report.num_caught_up:,} had changed meanwhile"
    )
    session_of(context).write_report(context, json_path, report)
