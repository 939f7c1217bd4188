"""The verb ``index`` and its own verbs: an index that lives and changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

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
    WholeOption,
    WindowOption,
)
from d2llm.apps.index_writing import Loading, Making, Splitting, write_corpus
from d2llm.apps.options import SEARCH, DeviceOption, DtypeOption, EngineOption, JsonOption
from d2llm.apps.session import session_of

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
        making=Making(task, vectors, vector_copies, field or ()),
        splitting=Splitting(chunk_tokens, chunk_overlap, late, late_window, whole),
        loading=Loading(student, device, dtype, engine),
        only_new=True,
        no_metadata=no_metadata,
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
    field: FieldOption = None,
    no_metadata: PlainOption = False,
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

    Long texts are split into passages, in the same way at every time. Only new and changed texts are encoded. Stopped,
    it goes on where it was when given again.
    """
    write_corpus(
        context,
        folder_of(context),
        corpus,
        making=Making(task, vectors, vector_copies, field or ()),
        splitting=Splitting(chunk_tokens, chunk_overlap, late, late_window, whole),
        loading=Loading(student, device, dtype, engine),
        only_new=False,
        no_metadata=no_metadata,
        json_path=json_path,
    )


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


def register(app: typer.Typer) -> None:
    """Add this verb to the program."""
    app.add_typer(index_app, rich_help_panel=SEARCH)


def folder_of(context: typer.Context) -> Path:
    """The index that the verb is about."""
    return cast(Path, context.meta[_FOLDER])


def _ids(ids: list[str] | None, file: Path | None) -> list[str]:
    from d2llm.core.errors import InputError
    from d2llm.data.lines import read_lines

    asked = list(ids or [])
    if file is not None:
        asked += [text for _, text in read_lines(file) if text]
    if not asked:
        raise InputError("there is no id; write ids behind the verb, or give a file with --ids")
    return asked
