"""Statistics and verification of an index, sharded or not, and of each of its stores; repair of a damaged table.

A repair requires the write lock. The rows that can be read and are what was written go into a new file. What is lost
is taken from a snapshot, if that has the passage with a vector of the same generation. Passages that are in no snapshot
are lost: their ids are named, and they leave the index only on request, because then nothing tells any more that they
are missing.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, DamagedFileError, DataFormatError, InputError
from d2llm.core.files import new_folder, sync_directory
from d2llm.core.names import counted
from d2llm.core.shipped import name_student
from d2llm.core.types import PART_NAMES, PartKind
from d2llm.store import ann, word_files
from d2llm.store.blocks import GENERATION_SHIFT, is_intact
from d2llm.store.index_manifest import Chunking, read_chunking
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import EncodeParts
from d2llm.store.passage_table import NAME, PassageTable, Record, bytes_at_rest
from d2llm.store.shards import Storage, hashes_of_ids, shard_of
from d2llm.store.storage import REMEDY, storage_errors
from d2llm.store.stored_vectors import Encode
from d2llm.store.vector_file import ann_path_of

_FOLDER = ".passages.new"
_SCANNED_AT_ONCE = 4_096


def repair_table(folder: Path, others: Iterable[Path], *, drop_lost: bool = False) -> list[str]:
    """Write the table in the folder of an index anew, as far as possible; returns messages about what was done.

    ``others`` are folders of indexes with the same passages, such as its snapshots. ``drop_lost``: passages that cannot
    be restored leave the index; without it, nothing is changed if there are some.

    Raises:
        StorageError: the new file cannot be written, or the table cannot be opened now.
        DamagedFileError: nothing of the file can be read.
    """
    others = list(others)
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)  # left by an interrupted repair
    try:
        return _rebuilt(folder, PassageTable.open(folder), others, drop_lost=drop_lost)
    except DataFormatError as error:
        if done := _replaced(folder, others, str(error)):
            return done
        with _at_full_length(folder / NAME):
            try:
                return _rebuilt(folder, PassageTable.open(folder), others, drop_lost=drop_lost)
            except DataFormatError:
                return [f"{error}; nothing of it can be read, and no snapshot has a whole copy: index the corpus again"]


@contextmanager
def _at_full_length(path: Path) -> Generator[None]:
    """Meanwhile, a file that was cut has zeros where it ended, so that SQLite reads what is left of it."""
    if not path.is_file():
        yield
        return
    with path.open("r+b") as file:
        header, num_bytes = file.read(100), path.stat().st_size
        page_bytes, num_pages = (int.from_bytes(header[at : at + size], "big") for at, size in ((16, 2), (28, 4)))
        file.truncate(max(num_bytes, page_bytes * num_pages))
        try:
            yield
        finally:
            file.truncate(num_bytes)  # of the damaged file, also if another has taken its place


def _rebuilt(folder: Path, table: PassageTable, others: Sequence[Path], *, drop_lost: bool) -> list[str]:
    """Write a table that can be opened anew; returns messages.

    Raises:
        DamagedFileError: none of its passages can be read.
    """
    with closing(table):
        intact = list(_readable(table))
        if not intact and len(table):
            raise DamagedFileError(table.path, f"none of its {len(table):,} passages can be read")
        missing = table.listed_ids() - {record["id"] for record in intact}
        num_lost = max(len(missing), len(table) - len(intact))
        restored = list(_from_others(others, missing, intact)) if num_lost else []
        num_lost -= len(restored)
        if num_lost and not drop_lost:
            named = f", the first is {min(missing)!r}" if missing else ""
            problem = f"{NAME}: {num_lost:,} of {len(table):,} passages are lost and in no snapshot{named}"
            remedy = "`d2llm index ... verify --repair --drop-lost` keeps the others; then upsert the lost ones again"
            return [f"{problem}; {remedy}"]
        _rewrite(folder, table, [*intact, *restored])
    done = [f"{NAME} was rebuilt with the {counted(len(intact), 'passage')} read from it, without earlier versions"]
    if restored:
        done.append(f"{counted(len(restored), 'damaged passage was', 'damaged passages were')} taken from snapshots")
    if num_lost:
        lost = sorted(missing - {record["id"] for record in restored})
        names = ", ".join(map(repr, lost[:20])) or "the ids cannot be read"
        done.append(f"{counted(num_lost, 'passage is', 'passages are')} lost: {names}")
    return done


def _readable(table: PassageTable) -> Iterator[Record]:
    """The passages of the latest version that can be read and are what was written."""
    top = table.last_key()
    spans = [(start, min(start + _SCANNED_AT_ONCE, top + 1)) for start in range(0, top + 1, _SCANNED_AT_ONCE)]
    while spans:
        first, end = spans.pop()
        try:
            yield from (
                {name: record[name] for name in table.columns}
                for record in table.between(first, end)
                if is_intact(record)
            )
        except DataFormatError:  # a damaged page: read around it
            if end - first > 1:
                middle = (first + end) // 2
                spans += [(first, middle), (middle, end)]


def _from_others(others: Sequence[Path], missing: set[str], intact: Sequence[Record]) -> Iterator[Record]:
    generations = {record["d2_row"] >> GENERATION_SHIFT for record in intact}
    used, wanted = {record["d2_row"] for record in intact}, set(missing)
    for folder in others:
        with suppress(D2LLMError, sqlite3.Error), closing(PassageTable.open(folder)) as table:
            for record in table.by_ids(sorted(wanted), (*table.columns, "d2_seal")):
                fits = not generations or record["d2_row"] >> GENERATION_SHIFT in generations
                if fits and record["d2_row"] not in used and is_intact(record):
                    used.add(record["d2_row"])
                    wanted.discard(record["id"])
                    yield {name: record[name] for name in table.columns}


def _rewrite(folder: Path, table: PassageTable, records: Sequence[Record]) -> None:
    """A new file with these passages, at the version after the latest, takes the place of the damaged one."""
    with storage_errors(folder), new_folder(folder / _FOLDER) as draft:
        PassageTable.create(draft, table.metadata, table.version).close()
        with closing(PassageTable.open(draft)) as new:
            new.replace_all(table.metadata, [records])
    _replace_table(folder)


def _replaced(folder: Path, others: Sequence[Path], problem: str) -> list[str]:
    """Of a file that cannot be opened at all: the newest whole snapshot takes its place, if there is one."""
    present = [path for path in others if (path / NAME).is_file()]
    for other in sorted(present, key=lambda path: (path / NAME).stat().st_mtime, reverse=True):
        with suppress(D2LLMError), closing(PassageTable.open(other)) as table:
            if not list(table.problems()):
                with storage_errors(folder), new_folder(folder / _FOLDER) as draft:
                    table.copy_to(draft)
                _replace_table(folder)
                return [f"{problem}; the table of {other.name!r} took its place: later changes are lost"]
    return []


def _replace_table(folder: Path) -> None:
    """Move the new file to where the damaged one was. Its WAL goes first: it must never be read into the new file."""
    with storage_errors(folder):
        for ending in ("-wal", "-shm"):
            (folder / f"{NAME}{ending}").unlink(missing_ok=True)
        sync_directory(folder)  # after a power cut, too
        (folder / _FOLDER / NAME).replace(folder / NAME)
        sync_directory(folder)
        (folder / _FOLDER).rmdir()


_SUMMED = (
    "num_passages",
    "num_rows",
    "num_truncated",
    "version",
    "table_bytes",
    "vector_file_bytes",
    "ann_passages",
    "word_bytes",
    "window_bytes",
    "token_bytes",
)


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Statistics of an index. ``num_rows`` counts the vectors in the file, including those of deleted passages.

    Each vector is stored ``vector_copies`` times. Sizes in bytes: ``table_bytes`` includes indices and old versions,
    and ``bytes_per_passage`` covers everything including snapshots. ``ann_passages`` are in an approximate index that
    was tuned for a recall of ``ann_recall`` among the candidates; ``first_ten`` of the first ten passages of an exact
    search are those of a search by default, measured when it was built. ``chunking`` is how documents were chunked,
    if there were any; ``student_name`` is the name of the student with fingerprint ``student``. ``window_format`` and
    ``token_format`` are the formats of the window vectors and token embeddings, None if there are none.
    ``num_shards`` is None for an index that is not sharded (``stats_of_all``).
    """

    folder: str
    num_passages: int
    num_rows: int
    num_truncated: int
    version: int
    num_versions: int
    snapshots: list[str]
    student: str
    task: str
    dim: int
    vector_format: str
    vector_bytes: int
    vector_copies: int
    metadata: dict[str, str]
    table_bytes: int
    vector_file_bytes: int
    ann_passages: int
    ann_recall: float | None
    first_ten: float | None
    bytes_per_passage: float
    word_bytes: int
    window_format: str | None
    window_bytes: int
    token_format: str | None
    token_bytes: int
    chunking: Chunking | None = None
    student_name: str | None = None
    num_shards: int | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` checked, and the problems it found (empty if all is well)."""

    folder: str
    version: int
    num_passages: int
    num_snapshots: int
    problems: list[str]


def stats(store: IndexStore) -> IndexStats:
    """Statistics of the latest version."""
    table = store.table()
    vectors = store.vectors.read(table, table.rows())
    num_truncated, num_versions = table.num_truncated(), len(table.versions())
    record = _ann_record(store, table)
    table_bytes = table.flush()
    return IndexStats(
        folder=str(store.folder),
        num_passages=len(table),
        num_rows=len(vectors.codes),
        num_truncated=num_truncated,
        version=table.version,
        num_versions=num_versions,
        snapshots=store.snapshots(),
        student=store.manifest["student"],
        task=store.manifest["task"],
        dim=store.manifest["dim"],
        vector_format=store.manifest["vector_format"],
        vector_bytes=store.format.code_size,
        vector_copies=store.vector_copies,
        metadata=dict(table.metadata.fields),
        table_bytes=table_bytes,
        vector_file_bytes=sum(path.stat().st_size for path in store.folder.glob("vectors-*")),
        ann_passages=0 if record is None else record.num_rows,
        ann_recall=None if record is None else record.target,
        first_ten=None if record is None else record.first_ten,
        bytes_per_passage=round(bytes_at_rest(store.folder) / max(len(table), 1), 1),
        word_bytes=sum(path.stat().st_size for path in store.folder.glob("words-*")),
        window_format=store.manifest["window_format"],
        window_bytes=_part_bytes(store, "window"),
        token_format=store.manifest["token_format"],
        token_bytes=_part_bytes(store, "token"),
        chunking=read_chunking(store.folder),
        student_name=name_student(store.manifest["student"], store.manifest["student_source"]),
    )


def verify(
    store: IndexStore,
    *,
    repair: bool = False,
    drop_lost: bool = False,
    encode: Encode | None = None,
    encode_parts: EncodeParts | None = None,
) -> VerifyReport:
    """Read and check everything: the table with all its versions, vectors, words, and snapshots.

    Args:
        store: the store to check.
        repair: write a damaged table anew, with what can be read and what snapshots have. Rewrite
            damaged vector files: from the table, or, if the vectors are kept once, by encoding lost ones. An
            approximate index is removed if it is damaged or belongs to other vectors.
        drop_lost: with ``repair``: passages that cannot be restored leave the index.
        encode: encodes passages, if the vectors are kept once.
        encode_parts: encodes windows or tokens, if the index stores their vectors.

    Raises:
        IndexLockedError: another process is writing, and something must be repaired.
        InputError: vectors must be encoded again, but ``encode`` is missing; or ``drop_lost`` without ``repair``.
        StorageError: a repaired file cannot be written.
    """
    if drop_lost and not repair:
        raise InputError(f"{store.folder}: leaving out lost passages is part of a repair; add --repair")
    options = _VerifyOptions(repair, drop_lost, encode, encode_parts)
    table, problems = _inspect(store, options)
    snapshots = store.snapshots()
    for name in snapshots:
        problems += [f"snapshot {name!r}: {problem}" for problem in _snapshot_problems(store, name, options)]
    return VerifyReport(
        folder=str(store.folder),
        version=_version_of(store) if table is None else table.version,
        num_passages=0 if table is None else len(table),
        num_snapshots=len(snapshots),
        problems=problems,
    )


class _VerifyOptions(NamedTuple):
    """The arguments of ``verify`` that say what it may do about problems."""

    repair: bool
    drop_lost: bool
    encode: Encode | None
    encode_parts: EncodeParts | None


def _inspect(store: IndexStore, options: _VerifyOptions) -> tuple[PassageTable | None, list[str]]:
    """The latest version of a store or snapshot (None if it cannot be read), and its problems."""
    with store.locked() if options.repair else nullcontext():
        damages, done = _table_problems(store), list[str]()
        if damages and options.repair:
            owner = store.folder.parents[1] if store.is_snapshot else store.folder
            relatives = [owner, *(owner / "snapshots").glob("[!.]*")]
            others = [folder for folder in relatives if folder != store.folder]
            done = [*damages, *repair_table(store.folder, others, drop_lost=options.drop_lost)]
            damages = _table_problems(store)
        if damages:
            return None, [*done, *(damage for damage in damages if damage not in done)]
        table = store.table()
        return table, [*done, *_problems(store, table, options)]


def _version_of(store: IndexStore) -> int:
    try:
        return store.version
    except DataFormatError:
        return 0


def _table_problems(store: IndexStore) -> list[str]:
    try:
        return [f"{NAME}: {problem}; {REMEDY}" for problem in PassageTable.open(store.folder).problems()]
    except D2LLMError as error:
        return [str(error)]


def _problems(store: IndexStore, table: PassageTable, options: _VerifyOptions) -> list[str]:
    """Problems of what is derived from an intact table, which rebuilds it."""
    problems = list(store.vectors.problems(table))
    repair = options.repair
    if problems and repair:
        store.vectors.repair(table, options.encode)
        problems = [f"{problems[0]}; it was rewritten", *store.vectors.problems(table)]
    problems += _word_problems(store, table, repair=repair)
    problems += _part_problems(store, table, options)
    return [*problems, *_ann_problems(store, table, repair=repair)]


def _ann_record(store: IndexStore, table: PassageTable) -> ann.AnnRecord | None:
    """The record of the approximate index of the latest vectors, if there is one."""
    try:
        return ann.read_ann_record(ann_path_of(store.folder, store.vectors.generation(table)))
    except (OSError, ValueError):
        return None


def _word_problems(store: IndexStore, table: PassageTable, *, repair: bool) -> list[str]:
    """Check that the words of all rows exist and are undamaged."""
    _, problems = store.words(table, store.vectors.num_rows(table), whole=True)
    if problems and repair:
        word_files.remove_damaged(store.folder, store.vectors.generation(table))
        store.update_word_files()
        return [f"{problem}; they were read again" for problem in problems]
    return [f"{problem}; `d2llm index ... verify --repair` reads them again from the table" for problem in problems]


def _part_bytes(store: IndexStore, kind: PartKind) -> int:
    return sum(path.stat().st_size for path in store.folder.glob(f"{kind}-*"))


def _part_problems(store: IndexStore, table: PassageTable, options: _VerifyOptions) -> list[str]:
    """Check that the vectors of parts exist and are undamaged."""
    problems: list[str] = []
    for kind in store.part_formats:
        try:
            store.parts(table, kind, whole=True)
        except DataFormatError as error:
            if not options.repair:
                problems.append(str(error))
                continue
            if options.encode_parts is None:
                raise InputError(
                    f"{store.folder}: to repair the {PART_NAMES[kind]}, a student must encode texts"
                ) from error
            store.read_parts_again(table, kind, options.encode_parts)
            problems.append(f"{error.path.name}: {error.problem}; they were encoded again")
    return problems


def _ann_problems(store: IndexStore, table: PassageTable, *, repair: bool) -> Iterator[str]:
    """Check that the approximate index is undamaged and belongs to this student's vectors."""
    path = ann_path_of(store.folder, store.vectors.generation(table))
    if not (path.is_file() or path.with_suffix(".json").is_file()):
        return
    try:
        record = ann.read_ann_record(path)
        if (record.student, record.vector_format) != (store.manifest["student"], store.format.kind):
            raise ValueError("it was built over other vectors; build it again")
        ann.check_file(path, record)
    except (OSError, ValueError) as error:
        if repair:
            for part in (path, path.with_suffix(".json")):
                part.unlink(missing_ok=True)
        yield f"{path.name}: {error}{'; it was removed' if repair else ''}"


def _snapshot_problems(store: IndexStore, name: str, options: _VerifyOptions) -> Iterator[str]:
    try:
        _, problems = _inspect(IndexStore.open(store.snapshot_folder(name)), options._replace(drop_lost=False))
        yield from problems
    except DataFormatError as error:
        yield str(error)


def stats_of_all(storage: Storage) -> IndexStats:
    """Statistics of the latest version; of a sharded index, the sums over its shards.

    The number of versions that can be read and the recalls of the approximate index are the smallest of a shard's.
    """
    all_stats = [stats(store) for store in storage.stores]
    if storage.records is None:
        return all_stats[0]
    return sum_stats(storage, all_stats, sum(bytes_at_rest(store.folder) for store in storage.stores))


def sum_stats(storage: Storage, all_stats: Sequence[IndexStats], num_bytes: int) -> IndexStats:
    """``stats_of_all`` from the statistics of the shards, which take ``num_bytes``."""
    sums = {name: sum(getattr(one, name) for one in all_stats) for name in _SUMMED}
    recalls = [one.ann_recall for one in all_stats if one.ann_recall is not None]
    first_ten = [one.first_ten for one in all_stats if one.first_ten is not None]
    return replace(
        all_stats[0],
        folder=str(storage.folder),
        num_versions=min(one.num_versions for one in all_stats),
        snapshots=[],
        ann_recall=min(recalls, default=None),
        first_ten=min(first_ten, default=None),
        bytes_per_passage=round(num_bytes / max(sums["num_passages"], 1), 1),
        chunking=read_chunking(storage.folder),
        num_shards=storage.num_shards,
        **sums,
    )


def verify_all(
    storage: Storage,
    *,
    repair: bool = False,
    drop_lost: bool = False,
    encode: Encode | None = None,
    encode_parts: EncodeParts | None = None,
) -> VerifyReport:
    """``verify`` of an index, or of each shard; problems begin with the name of the shard.

    Of a sharded index, it also checks that every passage is in the shard that it belongs in, and in no other.

    Raises:
        InputError, IndexLockedError, StorageError: as for ``verify``.
    """
    reports = [
        verify(store, repair=repair, drop_lost=drop_lost, encode=encode, encode_parts=encode_parts)
        for store in storage.stores
    ]
    if storage.records is None:
        return reports[0]
    problems = [f"shard {one.number} ({one.address}) is missing: {one.problem}" for one in storage.missing]
    for shard, report in zip(storage.numbers, reports, strict=True):
        problems += [f"shard {shard}: {problem}" for problem in report.problems]
    try:
        problems += _misplaced(storage)
    except DataFormatError as error:
        problems.append(f"passages cannot be compared between shards: {error}")
    return VerifyReport(
        folder=str(storage.folder),
        version=sum(report.version for report in reports),
        num_passages=sum(report.num_passages for report in reports),
        num_snapshots=sum(report.num_snapshots for report in reports),
        problems=problems,
    )


def _misplaced(storage: Storage) -> Iterator[str]:
    """Problems with passages in wrong shards, or in several."""
    hashes: list[NDArray[np.uint64]] = []
    for shard, store in zip(storage.numbers, storage.stores, strict=True):
        wrong: list[str] = []
        for batch in store.table().batches(["id", "document_id"]):
            hashes.append(hashes_of_ids(batch))
            pairs = ((record["id"], record["document_id"]) for record in batch)
            wrong += [one for one, document in pairs if shard_of(one, document, storage.num_shards or 1) != shard]
        if wrong:
            yield (
                f"shard {shard}: {counted(len(wrong), 'passage belongs', 'passages belong')} in other shards, the "
                f"first is {wrong[0]!r}; delete them and upsert them into the sharded index"
            )
    all_hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
    num_repeated = len(all_hashes) - len(np.unique(all_hashes))
    if num_repeated:
        yield (
            f"{counted(num_repeated, 'id is', 'ids are')} in two shards (an upsert was interrupted); upsert the same "
            "passages again to keep one of each"
        )
