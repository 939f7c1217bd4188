"""The verb ``index`` and its subcommands: an index that changes with its corpus."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from d2llm.cli.index_options import CorpusArgument, check_fits, chunking_of, warn_of_skipped
from d2llm.cli.options import (
    DeviceOption,
    DtypeOption,
    EngineOption,
    IndexTaskOption,
    JsonOption,
    PromptOption,
    input_path,
    lasting_input_path,
    student_option,
    teacher_config,
    teacher_option,
    with_option_groups,
)
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb_group
from d2llm.cli.word_order import check_index_first
from d2llm.core.errors import InputError
from d2llm.core.names import counted
from d2llm.core.settings import LENIENT_HELP
from d2llm.core.shipped import DEFAULT_STUDENT
from d2llm.data.settings import ReadingSettings
from d2llm.retrieval.settings import AnnSettings, ChunkingSettings
from d2llm.store.index_spec import IndexSpec

if TYPE_CHECKING:
    from d2llm.data.documents import SkippedFile
    from d2llm.models.student import Student
    from d2llm.retrieval.build_ann import AnnReport
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.upserting import DocumentsReport

_FOLDER = "d2llm.store"
_NAMED = 20  # number of missing ids to list

index_app = verb_group(
    "index",
    "Maintain the index of a changing corpus.",
    heading="Search",
    epilog="Example: d2llm index docs.index upsert corpus.jsonl. Then: d2llm search docs.index 'a question'",
    shows_answers=True,
)

IndexStudentOption = Annotated[
    str | None,
    student_option(
        help="The student that makes its vectors.", show_default=f"the index's own; {DEFAULT_STUDENT} for a new one"
    ),
]


@dataclass(frozen=True)
class WritingOptions:
    """Which parts of a corpus to read, and how to encode it."""

    student: IndexStudentOption = None
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:TYPE",
            help="For a new index: a metadata field (string, integer, number, boolean, timestamp); repeat for more.",
            show_default="inferred from the first values",
        ),
    ] = None
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Read only id, title and text.")] = False
    lenient_metadata: Annotated[bool, typer.Option("--lenient-metadata", help=LENIENT_HELP)] = False
    device: DeviceOption = None
    dtype: DtypeOption = None
    engine: EngineOption = "auto"
    json_path: JsonOption = None


@dataclass(frozen=True)
class IdOptions:
    """The passages or documents that a verb works on."""

    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of passages.")] = None
    ids_file: Annotated[
        Path | None,
        typer.Option(
            "--ids", metavar="FILE", callback=input_path, help="A file with one id per line; -: standard input."
        ),
    ] = None
    document: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="All passages of a document; may be given several times.")
    ] = None
    json_path: JsonOption = None

    def read(self) -> tuple[list[str], list[str]]:
        """The ids of passages and of documents.

        Raises:
            InputError: no id was given.
        """
        from d2llm.data.lines import read_lines

        ids = list(self.ids or [])
        if self.ids_file is not None:
            ids += [text for _, text in read_lines(self.ids_file) if text]
        if not ids and not self.document:
            raise InputError("there is no id; write ids after the verb, give a file with --ids, or use --document ID")
        return ids, list(dict.fromkeys(self.document or []))


@dataclass(frozen=True)
class OpeningOptions:
    """The student of an index, where it computes, and where the result goes."""

    student: IndexStudentOption = None
    device: DeviceOption = None
    dtype: DtypeOption = None
    json_path: JsonOption = None

    def open(self, context: typer.Context) -> Index:
        """Open the index with its student."""
        from d2llm.retrieval.index import Index

        return Index.open(folder_of(context), self.student, device=self.device, dtype=self.dtype)


@index_app.callback()
def choose(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.")],
) -> None:
    """Remember the index for the verb that follows."""
    from d2llm.store.index_manifest import find_index

    context.meta[_FOLDER] = find_index(folder)


def folder_of(context: typer.Context) -> Path:
    """The folder of the index that the verb works on."""
    return cast(Path, context.meta[_FOLDER])


def _index_of(context: typer.Context) -> Index:
    from d2llm.retrieval.index import Index

    return Index.open(folder_of(context))


@index_app.command("add")
@with_option_groups
def add(
    context: typer.Context,
    corpus: CorpusArgument,
    spec: IndexSpec,
    splitting: ChunkingSettings,
    reading: ReadingSettings,
    writing: WritingOptions,
) -> None:
    """Add texts that are not in the index yet; creates it if there is none.

    If interrupted, continue with upsert: stored texts are not encoded again.
    """
    _write_corpus(context, corpus, spec, splitting, reading, writing, only_new=True)


@index_app.command("upsert")
@with_option_groups
def upsert(
    context: typer.Context,
    corpus: CorpusArgument,
    spec: IndexSpec,
    splitting: ChunkingSettings,
    reading: ReadingSettings,
    writing: WritingOptions,
) -> None:
    """Add new texts and replace changed ones; creates the index if there is none.

    Long texts are split into passages, the same way each time. Only new and changed texts are encoded. If interrupted,
    the same command continues where it stopped.
    """
    _write_corpus(context, corpus, spec, splitting, reading, writing, only_new=False)


@index_app.command("sync")
@with_option_groups
def sync(
    context: typer.Context,
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", callback=lasting_input_path, help="Documents and folders of documents, as for upsert."
        ),
    ],
    spec: IndexSpec,
    splitting: ChunkingSettings,
    reading: ReadingSettings,
    writing: WritingOptions,
) -> None:
    """Make the index hold the documents of some folders as they are now; creates it if there is none.

    Only new and changed files are read, and documents whose files are gone are deleted. Passages that came from no file
    stay. If interrupted, the same command continues where it stopped.
    """
    from d2llm.data.documents import find_documents
    from d2llm.retrieval.sync import sync_documents

    if writing.no_metadata:
        raise InputError("sync tells by their metadata which files have changed; leave out --no-metadata")
    check_index_first(folder_of(context), "sync", folders)
    find_documents(folders, reading)  # before an index is created for them
    with _opened(folder_of(context), spec, writing) as index:
        report = sync_documents(
            index,
            folders,
            reading,
            chunking=chunking_of(splitting, cast("Student", index.student), index.folder),
        )
        _require_passages(index, report.skipped)
    _say_what_was_written(context, index, report.written)
    session_of(context).say(
        f"index: {counted(report.num_files, 'file')}, {report.num_unchanged:,} of them unchanged and not read; "
        f"{len(report.gone):,} are gone; {report.num_other:,} files of other kinds"
    )
    warn_of_skipped(session_of(context), report.skipped, report.links)
    session_of(context).write_report(context, writing.json_path, report)


@index_app.command("delete")
@with_option_groups
def delete(context: typer.Context, selection: IdOptions) -> None:
    """Delete passages by id, or whole documents."""
    (ids, documents), index = selection.read(), _index_of(context)
    missing, missing_documents = index.missing(ids), [name for name in documents if not index.get_document(name)]
    num_deleted = (index.delete(ids) if ids else 0) + (index.delete_documents(documents) if documents else 0)
    num_found = len(documents) - len(missing_documents)
    of_documents = f"; {num_found:,} of {len(documents):,} documents existed" if documents else ""
    deleted = counted(num_deleted, "passage") if documents else f"{num_deleted:,} of {counted(len(ids), 'passage')}"
    session_of(context).say(f"index: {deleted} deleted from {folder_of(context)}{of_documents}")
    report = {
        "num_asked": len(ids),
        "num_deleted": num_deleted,
        "missing": missing,
        "missing_documents": missing_documents,
    }
    session_of(context).write_report(context, selection.json_path, report)
    _complain_of_missing(context, index, missing, missing_documents)


@index_app.command("get")
@with_option_groups
def get(context: typer.Context, selection: IdOptions) -> None:
    """Show passages by id, or all passages of a document in order."""
    from d2llm.reports.search_tables import passage_lines

    (ids, documents), index = selection.read(), _index_of(context)
    passages, missing = index.get(ids), index.missing(ids)
    missing_documents: list[str] = []
    for name in documents:
        document = index.get_document(name)
        passages += document
        missing_documents += [] if document else [name]
    for passage in passages:
        session_of(context).show(passage_lines(passage))
    report = {"passages": passages, "missing": missing, "missing_documents": missing_documents}
    session_of(context).write_report(context, selection.json_path, report)
    _complain_of_missing(context, index, missing, missing_documents)


@index_app.command("list")
def list_ids(
    context: typer.Context,
    documents: Annotated[
        bool, typer.Option("--documents", help="List documents, with their numbers of passages.")
    ] = False,
    cursor: Annotated[
        str, typer.Option(metavar="ID", help="Start after this id.", show_default="from the beginning")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Number of ids per page.")] = 100,
    json_path: JsonOption = None,
) -> None:
    """List ids in order, one per line and a page at a time, because an index may hold millions."""
    session, index = session_of(context), _index_of(context)
    entries = index.list_documents(cursor, limit + 1) if documents else index.list_passages(cursor, limit + 1)
    page = entries[:limit]
    for entry in page:
        session.write(entry if isinstance(entry, str) else f"{entry.id}\t{entry.num_passages}")
    last = page[-1] if page else None
    next_cursor = (last if isinstance(last, str) or last is None else last.id) if len(entries) > limit else None
    if next_cursor is not None:
        session.say(f"index: there are more; continue with --cursor {shlex.quote(next_cursor)}")
    name = "documents" if documents else "ids"
    session.write_report(context, json_path, {name: page, "next_cursor": next_cursor})


@index_app.command("stats")
def stats(context: typer.Context, json_path: JsonOption = None) -> None:
    """Show what the index holds, and how many bytes it takes."""
    from d2llm.reports.search_tables import stats_table

    report = _index_of(context).stats()
    session_of(context).show(stats_table(report))
    session_of(context).write_report(context, json_path, report)


@index_app.command("compact")
def compact(
    context: typer.Context,
    keep_minutes: Annotated[
        float, typer.Option(min=0, help="Keep versions younger than this for readers that have them open.")
    ] = 60.0,
    dense: Annotated[
        bool | None,
        typer.Option(
            "--dense/--no-dense",
            help="Rewrite the vector file without the gaps that deletions leave.",
            show_default="if a quarter of it is gaps",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Free the space of deleted and changed passages."""
    from datetime import timedelta

    before, after = _index_of(context).compact(timedelta(minutes=keep_minutes), dense=dense)
    session_of(context).say(
        f"index: {before:,} bytes before, {after:,} after; versions of the last {keep_minutes:g} minutes are kept"
    )
    session_of(context).write_report(context, json_path, {"bytes_before": before, "bytes_after": after})


@index_app.command("ann")
@with_option_groups
def ann(
    context: typer.Context,
    opening: OpeningOptions,
    settings: AnnSettings,
    queries: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=input_path,
            help="queries.jsonl or queries.jsonl.gz to measure recall with.",
            show_default="passages of the index as queries",
        ),
    ] = None,
) -> None:
    """Build an approximate index for large corpora; `search --source ann` uses it.

    Passages added later are still found; build it again when there are many of them.
    """
    from d2llm.data.beir import read_queries
    from d2llm.reports.search_tables import ann_remark
    from d2llm.retrieval.build_ann import build_ann

    session, index = session_of(context), opening.open(context)
    texts = None if queries is None else [query.text for query in read_queries(queries).values()]
    reports: list[AnnReport] = []
    for store in index.storage.stores:
        reports.append(build_ann(store, index.student, settings, queries=texts))
        session.say(ann_remark(reports[-1]))
    session.write_report(context, opening.json_path, reports[0] if len(reports) == 1 else reports)


@index_app.command("snapshot")
def snapshot(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the snapshot.")],
    drop: Annotated[bool, typer.Option("--drop", help="Delete the snapshot of this name.")] = False,
    json_path: JsonOption = None,
) -> None:
    """Save the current contents under a name; `stats` lists the snapshots.

    A snapshot is a folder in snapshots/ of the index, and can be searched like an index.
    """
    index = _index_of(context)
    if drop:
        index.store.drop_snapshot(name)
        session_of(context).say(f"index: the snapshot {name!r} is deleted")
        report: dict[str, Any] = {"name": name, "dropped": True}
    else:
        folder = index.snapshot(name)
        session_of(context).say(f"index: {counted(len(index), 'passage is', 'passages are')} saved in {folder}")
        report = {"name": name, "folder": str(folder), "num_passages": len(index)}
    session_of(context).write_report(context, json_path, report)


@index_app.command("restore")
def restore(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help="Name of the snapshot, or the folder of a copy of one.")
    ],
    json_path: JsonOption = None,
) -> None:
    """Replace the passages of the index with those of a snapshot; creates it from a copy if there is none."""
    from d2llm.retrieval.index import Index

    folder, copy = folder_of(context), Path(name)
    if copy.is_dir() and not folder.exists():
        num_passages = len(Index.from_snapshot(copy, folder))
    else:
        index = _index_of(context)
        num_passages = index.restore(copy if copy.is_dir() and name not in index.store.snapshots() else name)
    session_of(context).say(f"index: it holds the {counted(num_passages, 'passage')} of the snapshot {name!r} again")
    session_of(context).write_report(context, json_path, {"name": name, "num_passages": num_passages})


@index_app.command("verify")
@with_option_groups
def verify(
    context: typer.Context,
    opening: OpeningOptions,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Rebuild damaged indices and vectors, and take other damaged files from snapshots."
        ),
    ] = False,
    drop_lost: Annotated[
        bool,
        typer.Option("--drop-lost", help="With --repair: leave out passages that cannot be restored."),
    ] = False,
) -> None:
    """Read the whole index and report what has changed since it was written."""
    session, index = session_of(context), opening.open(context)
    report = index.verify(repair=repair, drop_lost=drop_lost)
    for problem in report.problems:
        session.complain("problem", problem)
    left = index.verify().problems if repair and report.problems else report.problems
    after = f", {len(left)} after the repair" if repair and report.problems else ""
    session.say(
        f"index: {counted(report.num_passages, 'passage')} and {counted(report.num_snapshots, 'snapshot')} checked, "
        f"{counted(len(report.problems), 'problem')}{after}"
    )
    session.write_report(context, opening.json_path, report)
    if left:
        raise typer.Exit(1)


@index_app.command("calibrate")
@with_option_groups
def calibrate(
    context: typer.Context,
    opening: OpeningOptions,
    teacher: Annotated[str, teacher_option(help="A teacher: a folder, a name, or KIND:MODEL.")],
    queries: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            callback=input_path,
            help="queries.jsonl or queries.jsonl.gz, with queries like those of later searches; no qrels needed.",
        ),
    ],
    num_queries: Annotated[int, typer.Option(min=1, help="Size of a random sample of them (always the same).")] = 40,
    prompt: PromptOption = None,
    task: IndexTaskOption = None,
) -> None:
    """Measure the error of the index's student against a teacher, for `--reranker cascade`.

    The teacher reads ten of the first fifty passages of each query. The result is stored in the index's manifest.
    """
    import random

    from d2llm.data.beir import read_queries
    from d2llm.models.teachers.pair_teacher import load_teacher
    from d2llm.retrieval.calibrate import measure_error, write_error
    from d2llm.retrieval.feature_weights import weights_for

    session = session_of(context)
    all_queries = list(read_queries(queries).values())
    sample = random.Random(0).sample(all_queries, min(num_queries, len(all_queries)))
    index = opening.open(context)
    model = load_teacher(teacher_config(teacher, prompt), device=opening.device, dtype=opening.dtype)
    error = measure_error(index.view, index.student, model, sample, task=task)
    index_task = task or index.view.task
    score_features = weights_for(index.view, index.student, index_task)
    write_error(index.storage, model, index_task, error, score_features)
    session.say(
        f"calibrate: a passage's log-odds are {error.slope:.3g} times the student's score, within {error.sigma:.2f} "
        f"(standard deviation over {counted(error.num_pairs, 'pair')}); stored in {index.folder}"
    )
    session.write_report(context, opening.json_path, error)


def _write_corpus(
    context: typer.Context,
    corpus: list[Path],
    spec: IndexSpec,
    splitting: ChunkingSettings,
    reading: ReadingSettings,
    writing: WritingOptions,
    *,
    only_new: bool,
) -> None:
    """Upsert the texts of a corpus, or add them, and report the counts."""
    from d2llm.data.indexed_corpus import open_corpus

    check_index_first(folder_of(context), "add" if only_new else "upsert", corpus)
    # The corpus is checked before an index is created for it.
    texts = open_corpus(corpus, reading, with_metadata=not writing.no_metadata)
    with _opened(folder_of(context), spec, writing) as index:
        report = index.upsert_documents(
            texts.passages,
            chunking_of(splitting, cast("Student", index.student), index.folder),
            only_new=only_new,
            lenient_metadata=writing.lenient_metadata or texts.from_files,
            num_documents=texts.num_documents,
        )
        _require_passages(index, texts.skipped)
    _say_what_was_written(context, index, report)
    warn_of_skipped(session_of(context), texts.skipped, texts.links)
    result = {**asdict(report), "skipped": list(texts.skipped), "links": list(texts.links)}
    session_of(context).write_report(context, writing.json_path, result)


def _require_passages(index: Index, skipped: Sequence[SkippedFile]) -> None:
    """Raise an ``InputError`` if nothing could be read for a new index."""
    if skipped and not len(index):
        raise InputError(f"none of the {len(skipped):,} files could be read: {skipped[0]}")


def _say_what_was_written(context: typer.Context, index: Index, report: DocumentsReport) -> None:
    session_of(context).say(
        f"index: {counted(report.num_documents, 'text')} in {counted(report.num_passages, 'passage')} "
        f"({index.chunking}): {report.num_added:,} added, {report.num_updated:,} with changed text, "
        f"{report.num_metadata:,} with changed metadata, {report.num_unchanged:,} unchanged, {report.num_deleted:,} "
        f"deleted; {report.num_truncated:,} truncated; "
        + (f"read in {counted(report.num_windows, 'window')}; " if report.num_windows else "")
        + f"{report.seconds:,.1f} s, in {folder_of(context)}"
    )


@contextmanager
def _opened(folder: Path, spec: IndexSpec, writing: WritingOptions) -> Generator[Index]:
    """Open the index in a folder, or create one; a new one is deleted again if an error leaves it empty."""
    from d2llm.core.files import MANIFEST_NAME
    from d2llm.retrieval.index import Index
    from d2llm.store.schema import MetadataSchema

    if writing.field:
        spec = IndexSpec(**spec.given(), metadata=MetadataSchema.parse(writing.field).fields)
    if (folder / MANIFEST_NAME).is_file():
        index = Index.open(folder, writing.student, device=writing.device, dtype=writing.dtype, engine=writing.engine)
        check_fits(spec, index)
        yield index
        return
    index = Index.create(
        folder,
        writing.student or DEFAULT_STUDENT,
        spec,
        device=writing.device,
        dtype=writing.dtype,
        engine=writing.engine,
    )
    try:
        yield index
    except BaseException:
        if not len(index.storage):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _complain_of_missing(context: typer.Context, index: Index, missing: list[str], documents: list[str]) -> None:
    """List the missing ids, and exit with code 1 if there are any."""
    for noun, ids in (("", missing), ("documents ", documents)):
        if ids:
            names = ", ".join(map(repr, ids[:_NAMED]))
            names += f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
            session_of(context).complain("warning", f"{noun}not in {folder_of(context)}: {names}")
    if known := [name for name in missing[:_NAMED] if index.get_document(name)]:
        session_of(context).complain("warning", f"{known[0]!r} is a document: name it with --document")
    if missing or documents:
        raise typer.Exit(1)
