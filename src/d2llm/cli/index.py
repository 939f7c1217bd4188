"""The verb ``index`` and its own verbs: an index that lives and changes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, cast

import typer

from d2llm.cli.index_options import (
    ChunkOption,
    CopiesOption,
    CorpusArgument,
    DocumentsOption,
    FieldOption,
    FormatOption,
    IdsArgument,
    IdsFileOption,
    LateOption,
    LenientOption,
    MakerOption,
    NewTaskOption,
    OverlapOption,
    PlainOption,
    WholeOption,
    WindowOption,
    WindowVectorsOption,
)
from d2llm.cli.index_writing import Loading, Making, Splitting, write_corpus
from d2llm.cli.options import SEARCH, DeviceOption, DtypeOption, EngineOption, JsonOption
from d2llm.cli.session import session_of

_FOLDER = "d2llm.store"
_NAMED = 20  # of the ids that are not there

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
    window_vectors: WindowVectorsOption = "auto",
    field: FieldOption = None,
    no_metadata: PlainOption = False,
    lenient_metadata: LenientOption = False,
    chunk_tokens: ChunkOption = None,
    chunk_overlap: OverlapOption = None,
    late: LateOption = False,
    late_window: WindowOption = None,
    whole: WholeOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "torch",
    json_path: JsonOption = None,
) -> None:
    """Add texts, none of which is there; makes the index where there is none.

    Stopped, give upsert to go on: what is there already is not encoded again.
    """
    write_corpus(
        context,
        folder_of(context),
        corpus,
        making=Making(task, vectors, vector_copies, window_vectors, field or ()),
        splitting=Splitting(chunk_tokens, chunk_overlap, late, late_window, whole),
        loading=Loading(student, device, dtype, engine),
        only_new=True,
        no_metadata=no_metadata,
        lenient_metadata=lenient_metadata,
        json_path=json_path,
    )


@index_app.command("upsert")
def upsert(
    context: typer.Context,
    corpus: CorpusArgument,
    student: MakerOption = None,
    task: NewTaskOption = "asymmetric",
    vectors: FormatOption = "bfloat16",
    vector_copies: CopiesOption = 2,
    window_vectors: WindowVectorsOption = "auto",
    field: FieldOption = None,
    no_metadata: PlainOption = False,
    lenient_metadata: LenientOption = False,
    chunk_tokens: ChunkOption = None,
    chunk_overlap: OverlapOption = None,
    late: LateOption = False,
    late_window: WindowOption = None,
    whole: WholeOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "torch",
    json_path: JsonOption = None,
) -> None:
    """Add texts, and change those that are there; makes the index where there is none.

    Long texts are split into passages, the same way each time. Only new and changed texts are encoded. Stopped,
    it goes on where it was when given again.
    """
    write_corpus(
        context,
        folder_of(context),
        corpus,
        making=Making(task, vectors, vector_copies, window_vectors, field or ()),
        splitting=Splitting(chunk_tokens, chunk_overlap, late, late_window, whole),
        loading=Loading(student, device, dtype, engine),
        only_new=False,
        no_metadata=no_metadata,
        lenient_metadata=lenient_metadata,
        json_path=json_path,
    )


@index_app.command("delete")
def delete(
    context: typer.Context,
    ids: IdsArgument = None,
    ids_file: IdsFileOption = None,
    document: DocumentsOption = None,
    json_path: JsonOption = None,
) -> None:
    """Delete passages by id, or whole documents."""
    from d2llm.retrieval.index import Index

    (asked, documents), index = _ids(ids, ids_file, document), Index.open(folder_of(context))
    missing, missing_documents = index.missing(asked), [name for name in documents if not index.get_document(name)]
    num_deleted = (index.delete(asked) if asked else 0) + (index.delete_documents(documents) if documents else 0)
    num_there = len(documents) - len(missing_documents)
    of_documents = f"; {num_there:,} of {len(documents):,} documents were there" if documents else ""
    of_asked = f" of {len(asked):,}" if not documents else ""
    session_of(context).say(
        f"index: {num_deleted:,}{of_asked} passages deleted from {folder_of(context)}{of_documents}"
    )
    report = {
        "num_asked": len(asked),
        "num_deleted": num_deleted,
        "missing": missing,
        "missing_documents": missing_documents,
    }
    session_of(context).write_report(context, json_path, report)
    _complain_of_missing(context, missing, missing_documents)


@index_app.command("get")
def get(
    context: typer.Context,
    ids: IdsArgument = None,
    ids_file: IdsFileOption = None,
    document: DocumentsOption = None,
    json_path: JsonOption = None,
) -> None:
    """Show passages by id, or all those of a document, in its order."""
    from d2llm.reports.search_tables import passage_lines
    from d2llm.retrieval.index import Index

    (asked, documents), index = _ids(ids, ids_file, document), Index.open(folder_of(context))
    passages, missing = index.get(asked), index.missing(asked)
    missing_documents: list[str] = []
    for name in documents:
        passages += (found := index.get_document(name))
        missing_documents += [] if found else [name]
    for passage in passages:
        session_of(context).show(passage_lines(passage))
    report = {"passages": passages, "missing": missing, "missing_documents": missing_documents}
    session_of(context).write_report(context, json_path, report)
    _complain_of_missing(context, missing, missing_documents)


@index_app.command("list")
def list_ids(
    context: typer.Context,
    documents: Annotated[
        bool, typer.Option("--documents", help="Documents, with their numbers of passages, in place of passages.")
    ] = False,
    cursor: Annotated[
        str, typer.Option("--cursor", metavar="ID", help="Those behind this id.", show_default="from the beginning")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 100,
    json_path: JsonOption = None,
) -> None:
    """List ids in order, one a line; a page at a time, as an index may hold millions."""
    from d2llm.retrieval.index import Index

    session, index = session_of(context), Index.open(folder_of(context))
    found = index.list_documents(cursor, limit + 1) if documents else index.list_passages(cursor, limit + 1)
    page = found[:limit]
    for one in page:
        session.show(one if isinstance(one, str) else f"{one.id}\t{one.num_passages}")
    last = page[-1] if page else None
    next_cursor = (last if isinstance(last, str) or last is None else last.id) if len(found) > limit else None
    if next_cursor is not None:
        session.say(f"index: there are more; go on with --cursor {shlex.quote(next_cursor)}")
    name = "documents" if documents else "ids"
    session.write_report(context, json_path, {name: page, "next_cursor": next_cursor})


@index_app.command("stats")
def stats(context: typer.Context, json_path: JsonOption = None) -> None:
    """Say what it holds, and how many bytes it takes."""
    from d2llm.reports.search_tables import stats_table
    from d2llm.retrieval.index import Index

    found = Index.open(folder_of(context)).stats()
    session_of(context).show(stats_table(found))
    session_of(context).write_report(context, json_path, found)


def register(app: typer.Typer) -> None:
    """Add this verb to the program."""
    app.add_typer(index_app, rich_help_panel=SEARCH)


def folder_of(context: typer.Context) -> Path:
    """The index that the verb is about."""
    return cast(Path, context.meta[_FOLDER])


def _complain_of_missing(context: typer.Context, missing: list[str], documents: list[str]) -> None:
    """Name what is not there, and end with exit code 1."""
    for what, absent in (("", missing), ("documents ", documents)):
        if absent:
            named = ", ".join(map(repr, absent[:_NAMED]))
            named += f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
            session_of(context).complain("warning", f"{what}not in {folder_of(context)}: {named}")
    if missing or documents:
        raise typer.Exit(1)


def _ids(ids: list[str] | None, file: Path | None, documents: list[str] | None) -> tuple[list[str], list[str]]:
    """The ids of passages and of documents that are meant."""
    from d2llm.core.errors import InputError
    from d2llm.data.lines import read_lines

    asked = list(ids or [])
    if file is not None:
        asked += [text for _, text in read_lines(file) if text]
    if not asked and not documents:
        raise InputError("there is no id; write ids behind the verb, give a file with --ids, or --document ID")
    return asked, list(dict.fromkeys(documents or []))
