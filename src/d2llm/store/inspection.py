"""Facts about a store, and whether all of it is as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from d2llm.core.errors import D2LLMError, DamagedFileError, DataFormatError, InputError
from d2llm.core.files import folder_bytes
from d2llm.core.shipped import name_student
from d2llm.store import ann, word_files
from d2llm.store.blocks import GENERATION_SHIFT, is_as_written
from d2llm.store.checksums import remedy_for
from d2llm.store.index_store import IndexStore
from d2llm.store.passage_table import NAME, PassageTable
from d2llm.store.projections import StoredProjections, open_file, projections_of, remove_file
from d2llm.store.repair import rebuild_record, repair_files
from d2llm.store.schema import MetadataSchema
from d2llm.store.side_files import Chunking, read_chunking
from d2llm.store.stored_vectors import Encode
from d2llm.store.vector_file import DERIVED, VectorFile, ann_path_of, path_of
from d2llm.store.window_vectors import EncodeWindows


@dataclass(frozen=True, slots=True)
class IndexStats:
    """What an index holds. ``num_rows`` counts the vectors in the file, those of deleted passages included.

    Each vector stands in ``vector_copies`` places. Bytes: of the table with its indices and old versions, of the vector
    files, of one stored projection (0 where there are none; ``num_projections`` counts them), and of everything
    (snapshots included) per passage. ``ann_passages`` are in an approximate index that was tuned to find the share
    ``ann_recall``. ``unindexed`` names indices with the number of passages that they do not cover
    yet; those are searched all the same, more slowly. ``checksums``: whether the table's files have some; the next
    write takes them where an earlier d2llm made the index. ``chunking`` says how documents were cut, where there were
    any; ``student_name`` has the student's name beside its fingerprint ``student``. ``window_format`` is that of the
    vectors of windows, None if there are none.
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
    num_projections: int
    projection_bytes: int
    ann_passages: int
    ann_recall: float | None
    bytes_per_passage: float
    word_bytes: int
    window_format: str | None
    window_bytes: int
    unindexed: dict[str, int]
    checksums: bool
    chunking: Chunking | None = None
    student_name: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` looked at and what is wrong; nothing is, where ``problems`` is empty."""

    folder: str
    version: int
    num_passages: int
    num_vectors: int
    num_snapshots: int
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def stats(store: IndexStore) -> IndexStats:
    """Facts about the latest version."""
    table = store.table()
    vectors = store.vectors.read(table, np.asarray(table.columns(["d2_row"])["d2_row"], np.int64))
    table_bytes = folder_bytes(store.folder / f"{NAME}.lance")
    projections = None if vectors.file is None else _projections(store, table, vectors.file)
    record = _ann_record(store, table)
    return IndexStats(
        folder=str(store.folder),
        num_passages=len(table),
        num_rows=len(vectors.codes),
        num_truncated=len(table.columns(["id"], "d2_truncated")),
        version=table.version,
        num_versions=len(table.versions()),
        snapshots=store.snapshots(),
        student=store.manifest["student"],
        task=store.manifest["task"],
        dim=store.manifest["dim"],
        vector_format=store.manifest["vector_format"],
        vector_bytes=store.format.code_size,
        vector_copies=store.vector_copies,
        metadata=MetadataSchema.from_arrow(table.metadata_fields).to_json(),
        table_bytes=table_bytes,
        vector_file_bytes=sum(path.stat().st_size for path in store.folder.glob("vectors-*")),
        num_projections=0 if projections is None else projections.capacity,
        projection_bytes=0 if projections is None else projections.code_size,
        ann_passages=0 if record is None else record.num_rows,
        ann_recall=None if record is None else record.target,
        bytes_per_passage=round(folder_bytes(store.folder) / max(len(table), 1), 1),
        word_bytes=sum(path.stat().st_size for path in store.folder.glob("words-*")),
        window_format=None if store.window_format is None else store.window_format.name,
        window_bytes=sum(path.stat().st_size for path in store.folder.glob("window-*")),
        unindexed={name: lag for name, lag in table.indices.items() if lag},
        checksums=store.files.record() is not None,
        chunking=read_chunking(store.folder),
        student_name=name_student(store.manifest["student"], store.manifest.get("student_source")),
    )


def verify(
    store: IndexStore,
    *,
    repair: bool = False,
    go_back: bool = False,
    encode: Encode | None = None,
    encode_windows: EncodeWindows | None = None,
) -> VerifyReport:
    """Read everything and compare: files with their checksums, and where they are whole, texts with their hashes, row
    numbers, the vectors with what was written, snapshots.

    LanceDB trusts the bytes that it reads, and some that are damaged end the process; so it reads none that are.
    Stored projections and an approximate index are compared with their checksums.

    Args:
        store: what to look at; its latest version with all of its contents, earlier ones and snapshots.
        repair: of damaged files of the table, take those from snapshots that have them whole, and make indices anew
            (``store.repair``). Write vector files anew where they are damaged: from the table, or where the vectors are
            kept once, by encoding what is lost. Texts and metadata cannot be made again, only restored from a snapshot.
            Stored projections and an approximate index that are damaged or of other vectors are removed.
        go_back: with ``repair``, where passages are damaged: return to the last version that is whole, and lose what
            came since.
        encode: what encodes, where the vectors are kept once.
        encode_windows: what reads windows, where the index stores their vectors.

    Raises:
        IndexLockedError: another process is writing, and something has to be repaired.
        InputError: vectors have to be encoded again, and ``encode`` is missing; or ``go_back`` without ``repair``.
        StorageError: a repaired file cannot be written.
    """
    if go_back and not repair:
        raise InputError(f"{store.folder}: going back is part of a repair; ask for the repair too (--repair)")
    effort = _Effort(repair, go_back, encode, encode_windows)
    table, problems = _look_at(store, effort)
    snapshots = store.snapshots()
    for name in snapshots:
        problems += [f"snapshot {name!r}: {problem}" for problem in _snapshot_problems(store, name, effort)]
    num_passages = 0 if table is None else len(table)
    return VerifyReport(
        folder=str(store.folder),
        version=_version_of(store) if table is None else table.version,
        num_passages=num_passages,
        num_vectors=num_passages,
        num_snapshots=len(snapshots),
        problems=problems,
    )


class _Effort(NamedTuple):
    """What ``verify`` may do about problems, as its arguments say."""

    repair: bool
    go_back: bool
    encode: Encode | None
    encode_windows: EncodeWindows | None


def _look_at(store: IndexStore, effort: _Effort) -> tuple[PassageTable | None, list[str]]:
    """The latest version of a store or a snapshot, None where LanceDB must not read it, and what is wrong."""
    lacking = list(_lacking_checksums(store))
    with store.locked() if effort.repair else nullcontext():
        damages = _damages(store)
        if damages and effort.repair:
            done, left = _repair_files(store, effort.go_back), _damages(store)
            damages = [*(damage for damage in damages if damage not in left), *done, *left]
            if left:
                return None, damages
        elif damages:
            return None, damages
        table = store.table()
        problems = _problems(store, table, effort)
        return table, [*lacking, *damages, *problems]


def _version_of(store: IndexStore) -> int:
    try:
        return store.version
    except DataFormatError:
        return 0


def _lacking_checksums(store: IndexStore) -> Iterator[str]:
    """What an earlier d2llm wrote, and nobody can compare."""
    remedy = "the next write, or `d2llm index ... verify --repair`, takes them"
    try:
        version, record = store.version, store.files.record()
    except DamagedFileError:
        return
    if record is None:
        yield f"the table's files have no checksums, as an earlier d2llm made the index or they are lost; {remedy}"
    elif version > record.version:
        yield f"version {version} was written by an earlier d2llm and has no checksums; {remedy}"


def _damages(store: IndexStore) -> list[str]:
    """The table's files that are not what was written, and what to do."""
    try:
        damages, record = store.files.damages(), store.files.record()
    except DamagedFileError as error:
        return [str(error)]
    earlier = [damage for damage in damages if record and damage.versions and record.version not in damage.versions]
    return [
        f"{damage.path}: {damage.problem}"
        + (f" (only earlier versions need it: {', '.join(map(str, damage.versions))})" if damage in earlier else "")
        + f"; {remedy_for(damage.path)}"
        for damage in damages
    ]


def _repair_files(store: IndexStore, go_back: bool) -> list[str]:
    try:
        store.files.record()
    except DamagedFileError:
        # Read without checksums, as before there were any; whether the rows are whole their own hashes tell.
        with store.files.unchecked():
            problems = list(_table_problems(store.table()))
        if problems:
            return problems
        rebuild_record(store.files)
        return ["the checksums and the table's indices were rebuilt after all of its rows were compared"]
    owner = store.folder.parents[1] if store.is_snapshot else store.folder
    relatives = [owner, *(owner / "snapshots").glob("[!.]*")]
    others = [folder for folder in relatives if folder != store.folder]
    return repair_files(store.files, others, go_back=go_back)


def _problems(store: IndexStore, table: PassageTable, effort: _Effort) -> list[str]:
    """Of a store or a snapshot. Vectors are checked where the table is whole, since they are rebuilt from it."""
    problems = list(_table_problems(table))
    if problems:
        return problems
    problems = list(store.vectors.problems(table))
    repair = effort.repair
    if problems and repair:
        store.vectors.repair(table, effort.encode)
        problems = [f"{problems[0]}; it was rewritten", *store.vectors.problems(table)]
    problems += _word_problems(store, table, repair=repair)
    problems += _window_problems(store, table, effort)
    return [*problems, *_projection_problems(store, table, repair=repair), *_ann_problems(store, table, repair=repair)]


def _projections(store: IndexStore, table: PassageTable, vectors: VectorFile) -> VectorFile | None:
    """The file of projections that belongs to these vectors, if there is one and it fits."""
    made_of = projections_of(store.manifest["student"], store.format.name)
    try:
        return open_file(vectors, store.vectors.generation(table), made_of)
    except DataFormatError:
        return None


def _ann_record(store: IndexStore, table: PassageTable) -> ann.AnnRecord | None:
    """What the approximate index of the latest vectors says of itself, if there is one."""
    try:
        return ann.read_record(ann_path_of(store.folder, store.vectors.generation(table)))
    except (OSError, ValueError):
        return None


def _table_problems(table: PassageTable) -> Iterator[str]:
    try:
        ids, rows = table.columns(["id"])["id"], np.asarray(table.columns(["d2_row"])["d2_row"], np.int64)
        if len(ids.unique()) != len(ids):
            yield f"{len(ids) - len(ids.unique())} ids occur twice in the table"
        if len(np.unique(rows)) != len(rows) or len(np.unique(rows >> GENERATION_SHIFT)) > 1:
            yield "row numbers in the table are not distinct, or of several generations"
        names = [name for name in table.schema.names if name not in ("d2_row", "d2_truncated", "d2_vector")]
        records = (record for batch in table.batches(names) for record in batch.to_pylist())
        changed = [record["id"] for record in records if not is_as_written(record)]
        if changed:
            yield f"{len(changed)} passages in the table are not what was written, the first is {changed[0]!r}"
        yield from _index_problems(table, ids.to_pylist(), rows.tolist())
    except D2LLMError as error:
        yield str(error)


def _index_problems(table: PassageTable, ids: list[str], rows: list[int]) -> Iterator[str]:
    """Whether the indices find every id and row."""
    advice = "`d2llm index ... compact --dense` rebuilds them"
    try:
        if sorted(table.by_ids(ids, ["id"])["id"].to_pylist()) != sorted(ids):
            yield f"the index of ids does not find all of them; {advice}"
        table.by_rows(rows, ["id"])
    except DataFormatError as error:
        yield f"an index of the table is damaged ({error.problem}); {advice}"


def _word_problems(store: IndexStore, table: PassageTable, *, repair: bool) -> list[str]:
    """Whether the words of all rows are there, and are what was written."""
    _, problems = store.words(table, store.vectors.num_rows(table), whole=True)
    if problems and repair:
        word_files.remove_damaged(store.folder, store.vectors.generation(table))
        store.settle_words(table)
        return [f"{problem}; they were read again" for problem in problems]
    return [f"{problem}; `d2llm index ... verify --repair` reads them again from the table" for problem in problems]


def _window_problems(store: IndexStore, table: PassageTable, effort: _Effort) -> list[str]:
    """Whether the vectors of the windows are there, and are what was written."""
    if store.window_format is None:
        return []
    try:
        store.windows(table)
    except DataFormatError as error:
        if not effort.repair:
            return [str(error)]
        if effort.encode_windows is None:
            raise InputError(f"{store.folder}: to repair the vectors of windows, a student must encode") from error
        store.read_windows_again(table, effort.encode_windows)
        return [f"{error.path.name}: {error.problem}; they were encoded again"]
    return []


def _projection_problems(store: IndexStore, table: PassageTable, *, repair: bool) -> Iterator[str]:
    """Whether stored projections are what was written for these vectors; without a student no more can be said."""
    generation = store.vectors.generation(table)
    path = path_of(store.folder, generation, DERIVED)
    if not path.is_file():
        return
    try:
        vectors = VectorFile.open(store.folder, generation, store.format.code_size)
        StoredProjections.load(vectors, generation, projections_of(store.manifest["student"], store.format.name))
    except DataFormatError as error:
        if repair:
            remove_file(store.folder, generation)
        yield f"{error}{'; it was removed' if repair else ''}"


def _ann_problems(store: IndexStore, table: PassageTable, *, repair: bool) -> Iterator[str]:
    """Whether the approximate index is what was written for this student's vectors."""
    path = ann_path_of(store.folder, store.vectors.generation(table))
    if not path.is_file():
        return
    try:
        record = ann.read_record(path)
        if (record.student, record.vector_format) != (store.manifest["student"], store.format.name):
            raise ValueError("it was built over other vectors; build it again")
        ann.check_file(path, record)
    except (OSError, ValueError) as error:
        if repair:
            for part in (path, path.with_suffix(".json")):
                part.unlink(missing_ok=True)
        yield f"{path.name}: {error}{'; it was removed' if repair else ''}"


def _snapshot_problems(store: IndexStore, name: str, effort: _Effort) -> Iterator[str]:
    try:
        _, problems = _look_at(IndexStore.open(store.snapshot_folder(name)), effort._replace(go_back=False))
        yield from problems
    except DataFormatError as error:
        yield str(error)
