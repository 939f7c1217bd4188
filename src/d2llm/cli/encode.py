"""The verb ``encode``: builds a new index from a whole corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2llm.cli.index_options import (
    CorpusArgument,
    FileOptions,
    chunking_of,
    warn_of_links,
    warn_of_skipped,
)
from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    RunnerOptions,
    StudentOption,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.retrieval.settings import ChunkingSettings
from d2llm.store.index_spec import IndexSpec


@verb("Search")
def encode(
    context: typer.Context,
    corpus: CorpusArgument,
    out: Annotated[Path, typer.Option(metavar="INDEX", help="Where the index goes.")],
    spec: IndexSpec,
    splitting: ChunkingSettings,
    files: FileOptions,
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
    texts = open_corpus(corpus, **files.reading)
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
    warn_of_skipped(session, report.skipped)
    warn_of_links(session, texts.links)
    session.write_report(context, json_path, report)
