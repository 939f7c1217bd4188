"""The verb ``index`` and its own verbs: an index that lives and changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from d2llm.apps.index_options import (
    ChunkOption,
    CopiesOption,
    CorpusArgument,
    FieldOption,
    FormatOption,
    IdsArgument,
    IdsFileOption,
    LateOption,
    MakerOption,
    NewTaskOption,
    OverlapOption,
    PlainOption,
    WindowOption,
)
from d2llm.apps.index_writing import write_documents, write_passages
from d2llm.apps.options import DEFAULT_STUDENT, SEARCH, DeviceOption, DtypeOption, EngineOption, JsonOption
from d2llm.apps.session import session_of
from d2llm.core.types import Task

if TYPE_CHECKING:
    from d2llm.core.types import EngineName
    from d2llm.index.stored_vectors import VectorCopies
    from d2llm.pipeline.index import Index

_FOLDER = "d2llm.index"

index_app = typer.Typer(
    name="index",
    help="Keep a corpus that changes, its versions and snapshots.",
    no_args_is_help=True,
    epilog="As in: d2llm index docs.index upsert corpus.jsonl. Then: d2llm search docs.index 'a question'",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@index_app.callback()
def choose(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.", show_default=False)],
) -> None:
    """Remember which index is meant."""
    context.meta[_FOLDER] = folder


@index_app.command("add")
def add(
    context: typer.Context,
    corpus: CorpusArgument,
    student: MakerOption = None,
    task: NewTaskOption = "asymmetric",
    vectors: FormatOption = "bfloat16",
    vector_copies: CopiesOption = 2,
    field: FieldOption = None,
    no_metadata: PlainOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "torch",
    json_path: JsonOption = None,
) -> None:
    """Add passages, none of which is there; makes the index where there is none.

    Stopped, give upsert to go on: what is there already is not encoded again.
    """
    index = _open_or_create(context, student, task, vectors, vector_copies, field, device, dtype, engine)
    write_passages(context, index, corpus, only_new=True, no_metadata=no_metadata, json_path=json_path)


@index_app.command("upsert")
def upsert(
    context: typer.Context,
    corpus: CorpusArgument,
    student: MakerOption = None,
    task: NewTaskOption = "asymmetric",
    vectors: FormatOption = "bfloat16",
    vector_copies: CopiesOption = 2,
    field: FieldOption = None,
    no_metadata: PlainOption = False,
    chunk_tokens: ChunkOption = None,
    chunk_overlap: OverlapOption = 0,
    late: LateOption = False,
    late_window: WindowOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "torch",
    json_path: JsonOption = None,
) -> None:
    """Add passages, and change those that are there; makes the index where there is none.

    Only new and changed texts are encoded. Stopped, it goes on where it was when given again.
    """
    from d2llm.core.errors import InputError
    from d2llm.models.student import Student
    from d2llm.pipeline.chunking import Chunker

    if chunk_tokens is None and (late or chunk_overlap or late_window is not None):
        raise InputError("--chunk-overlap, --late and --late-window are for texts that are split; give --chunk-tokens")
    index = _open_or_create(context, student, task, vectors, vector_copies, field, device, dtype, engine)
    if chunk_tokens is None:
        write_passages(context, index, corpus, only_new=False, no_metadata=no_metadata, json_path=json_path)
    else:
        chunker = Chunker(
            cast(Student, index.student), chunk_tokens, chunk_overlap, late=late, window_tokens=late_window
        )
        write_documents(context, index, corpus, chunker, no_metadata=no_metadata, json_path=json_path)


@index_app.command("delete")
def delete(
    context: typer.Context, ids: IdsArgument = None, ids_file: IdsFileOption = None, json_path: JsonOption = None
) -> None:
    """Delete passages by id."""
    from d2llm.pipeline.index import Index

    asked = _ids(ids, ids_file)
    num_deleted = Index.open(folder_of(context)).delete(asked)
    session_of(context).say(f"index: {num_deleted:,} of {len(asked):,} passages deleted from {folder_of(context)}")
    session_of(context).write_report(context, json_path, {"num_asked": len(asked), "num_deleted": num_deleted})


@index_app.command("get")
def get(
    context: typer.Context, ids: IdsArgument = None, ids_file: IdsFileOption = None, json_path: JsonOption = None
) -> None:
    """Show passages by id."""
    from d2llm.apps.index_tables import passage_panel
    from d2llm.pipeline.index import Index

    asked = _ids(ids, ids_file)
    passages = Index.open(folder_of(context)).get(asked)
    for passage in passages:
        session_of(context).show(passage_panel(passage))
    if len(passages) < len(set(asked)):
        session_of(context).complain("warning", f"{len(set(asked)) - len(passages)} of the ids are not in the index")
    session_of(context).write_report(context, json_path, {"passages": passages})


@index_app.command("stats")
def stats(context: typer.Context, json_path: JsonOption = None) -> None:
    """Say what it holds, and how many bytes it takes."""
    from d2llm.apps.index_tables import stats_table
    from d2llm.pipeline.index import Index

    found = Index.open(folder_of(context)).stats()
    session_of(context).show(stats_table(found))
    session_of(context).write_report(context, json_path, found)


@index_app.command("compact")
def compact(
    context: typer.Context,
    keep_minutes: Annotated[
        float, typer.Option("--keep-minutes", min=0, help="Leave younger versions to the readers that have them open.")
    ] = 60.0,
    dense: Annotated[
        bool | None,
        typer.Option(
            "--dense/--no-dense", help="Write the vectors anew without holes.", show_default="if a quarter are holes"
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Free the space of what was deleted or changed."""
    from datetime import timedelta

    from d2llm.pipeline.index import Index

    before, after = Index.open(folder_of(context)).compact(timedelta(minutes=keep_minutes), dense=dense)
    session_of(context).say(
        f"index: {before:,} bytes before, {after:,} after; versions of the last {keep_minutes:g} minutes are kept"
    )
    session_of(context).write_report(context, json_path, {"bytes_before": before, "bytes_after": after})


@index_app.command("ann")
def ann(
    context: typer.Context,
    recall: Annotated[
        float, typer.Option("--recall", min=0, max=1, help="The share of the exact candidates that it is to find.")
    ] = 0.95,
    depth: Annotated[int, typer.Option("--depth", min=1, help="The number of candidates of a search.")] = 1000,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries",
            metavar="FILE",
            help="queries.jsonl or queries.jsonl.gz to measure recall with.",
            show_default="passages of the index, each to find others",
        ),
    ] = None,
    student: MakerOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Build an approximate index for large corpora; `search --source ann` uses it.

    Passages that come later are found all the same; build it again when they are many.
    """
    from d2llm.apps.index_tables import ann_remark
    from d2llm.data.beir import read_queries
    from d2llm.pipeline.build_ann import build_ann
    from d2llm.pipeline.index import Index

    session = session_of(context)
    index = Index.open(folder_of(context), student, device=device, dtype=dtype)
    texts = None if queries is None else [query.text for query in read_queries(queries).values()]
    report = build_ann(
        index.store, index.student, recall=recall, depth=depth, queries=texts, show_progress=session.show_progress
    )
    session.say(ann_remark(report))
    session.write_report(context, json_path, report)


@index_app.command("snapshot")
def snapshot(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.", show_default=False)],
    drop: Annotated[bool, typer.Option("--drop", help="Forget the snapshot of this name.")] = False,
) -> None:
    """Keep what it holds now under a name; `stats` lists them.

    A snapshot is a folder that search takes, in snapshots/ of the index.
    """
    from d2llm.pipeline.index import Index

    index = Index.open(folder_of(context))
    if drop:
        index.store.drop_snapshot(name)
        session_of(context).say(f"index: the snapshot {name!r} is gone")
    else:
        session_of(context).say(f"index: {len(index):,} passages are kept in {index.snapshot(name)}")


@index_app.command("restore")
def restore(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the snapshot.", show_default=False)],
) -> None:
    """Put a snapshot's passages in the place of the index's."""
    from d2llm.pipeline.index import Index

    num_passages = Index.open(folder_of(context)).restore(name)
    session_of(context).say(f"index: it holds the {num_passages:,} passages of the snapshot {name!r} again")


@index_app.command("verify")
def verify(
    context: typer.Context,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Make damaged indices and vectors anew, and take other damaged files from snapshots.",
        ),
    ] = False,
    go_back: Annotated[
        bool,
        typer.Option(
            "--go-back",
            help="With --repair, where passages are damaged: return to the last version that is whole.",
        ),
    ] = False,
    student: MakerOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Read everything and say what is not as it was written."""
    from d2llm.pipeline.index import Index

    session = session_of(context)
    index = Index.open(folder_of(context), student, device=device, dtype=dtype)
    report = index.verify(repair=repair, go_back=go_back, show_progress=session.show_progress)
    for problem in report.problems:
        session.complain("problem", problem)
    left = index.verify().problems if repair and report.problems else report.problems
    after = f", {len(left)} after the repair" if repair and report.problems else ""
    session.say(
        f"index: {report.num_passages:,} passages and {report.num_snapshots} snapshots looked at, "
        f"{len(report.problems)} problems{after}"
    )
    session.write_report(context, json_path, report)
    if left:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add this verb to the program."""
    app.add_typer(index_app, rich_help_panel=SEARCH)


def folder_of(context: typer.Context) -> Path:
    """The index that the verb is about."""
    return cast(Path, context.meta[_FOLDER])


def _open_or_create(
    context: typer.Context,
    student: str | None,
    task: Task,
    vectors: str,
    vector_copies: int,
    fields: list[str] | None,
    device: str | None,
    dtype: str | None,
    engine: EngineName,
) -> Index:
    from d2llm.core.errors import InputError
    from d2llm.core.files import MANIFEST_NAME
    from d2llm.index.schema import MetadataSchema
    from d2llm.pipeline.index import Index

    folder = folder_of(context)
    if not (folder / MANIFEST_NAME).is_file():
        declared = MetadataSchema.parse(fields or []).fields
        return Index.create(
            folder, student or DEFAULT_STUDENT, task=task, vector_format=vectors,
            vector_copies=cast("VectorCopies", vector_copies), metadata=declared, device=device, dtype=dtype,
            engine=engine,
        )  # fmt: skip
    for_a_new_one = {
        "--field": fields,
        "--vectors": vectors != "bfloat16",
        "--vector-copies": vector_copies != 2,
        "--task": task != "asymmetric",
    }
    for option, given in for_a_new_one.items():
        if given:
            raise InputError(f"{folder}: is there already, and {option} is for a new index; leave it out")
    return Index.open(folder, student, device=device, dtype=dtype, engine=engine)


def _ids(ids: list[str] | None, file: Path | None) -> list[str]:
    from d2llm.core.errors import InputError
    from d2llm.data.lines import read_lines

    asked = list(ids or [])
    if file is not None:
        asked += [text for _, text in read_lines(file) if text]
    if not asked:
        raise InputError("there is no id; write ids behind the verb, or give a file with --ids")
    return asked
