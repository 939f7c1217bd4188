"""Facts about a store, and whether all of it is as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from d2llm.core.errors import D2LLMError, DataFormatError
from d2llm.core.files import folder_bytes
from d2llm.index.blocks import GENERATION_SHIFT, ROW_HASH_LENGTH, ROW_MASK, codes_of, row_hash
from d2llm.index.passage_table import NAME, PassageTable
from d2llm.index.schema import MetadataSchema
from d2llm.index.store import IndexStore
from d2llm.index.vector_file import VectorFile


@dataclass(frozen=True, slots=True)
class IndexStats:
    """What an index holds. ``num_rows`` counts the vectors in the file, those of deleted passages included.

    Bytes: of the table with its indices and old versions, of the vector files, and of everything (snapshots included)
    per passage. ``unindexed`` names indices with the number of passages that they do not cover yet; those are searched
    all the same, more slowly.
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
    metadata: dict[str, str]
    table_bytes: int
    vector_file_bytes: int
    bytes_per_passage: float
    unindexed: dict[str, int]

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
    vectors = store.vectors(table, np.asarray(table.columns(["d2_row"])["d2_row"], np.int64))
    table_bytes = folder_bytes(store.folder / f"{NAME}.lance")
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
        metadata=MetadataSchema.from_arrow(table.metadata_fields).to_json(),
        table_bytes=table_bytes,
        vector_file_bytes=sum(path.stat().st_size for path in store.folder.glob("vectors-*")),
        bytes_per_passage=round(folder_bytes(store.folder) / max(len(table), 1), 1),
        unindexed={name: lag for name, lag in table.indices.items() if lag},
    )


def verify(store: IndexStore, *, repair: bool = False) -> VerifyReport:
    """Read everything and compare: texts with their hashes, row numbers, the vector file with the table, snapshots.

    Args:
        store: what to look at; its latest version and its snapshots.
        repair: write the vector file anew from the table where it is damaged. The table itself is the source of truth
            and cannot be repaired, only restored from a snapshot.
    """
    table = store.table()
    problems = [*_table_problems(table)]
    if not problems:
        found = list(_vector_problems(store, table))
        if found and repair:
            store.rebuild(table)
            found = [f"{found[0]}; it was written anew", *_vector_problems(store, table)]
        problems += found
    snapshots = store.snapshots()
    for name in snapshots:
        problems += [f"snapshot {name!r}: {problem}" for problem in _snapshot_problems(store, name)]
    return VerifyReport(
        folder=str(store.folder),
        version=table.version,
        num_passages=len(table),
        num_vectors=len(table),
        num_snapshots=len(snapshots),
        problems=problems,
    )


def _table_problems(table: PassageTable) -> Iterator[str]:
    try:
        ids, rows = table.columns(["id"])["id"], np.asarray(table.columns(["d2_row"])["d2_row"], np.int64)
        if len(ids.unique()) != len(ids):
            yield f"{len(ids) - len(ids.unique())} ids occur twice in the table"
        if len(np.unique(rows)) != len(rows) or len(np.unique(rows >> GENERATION_SHIFT)) > 1:
            yield "row numbers in the table are not distinct, or of several generations"
        names = [name for name in table.schema.names if name not in ("d2_row", "d2_truncated", "d2_vector")]
        records = (record for batch in table.batches(names) for record in batch.to_pylist())
        changed = [record["id"] for record in records if not _is_as_written(record)]
        if changed:
            yield f"{len(changed)} passages in the table are not what was written, the first is {changed[0]!r}"
        yield from _index_problems(table, ids.to_pylist(), rows.tolist())
    except D2LLMError as error:
        yield str(error)


def _is_as_written(record: dict[str, Any]) -> bool:
    others = {name: value for name, value in record.items() if name not in ("id", "title", "text", "d2_hash")}
    stored: str = record["d2_hash"]
    return row_hash(record["id"], record["title"], record["text"], others, stored[ROW_HASH_LENGTH:]) == stored


def _index_problems(table: PassageTable, ids: list[str], rows: list[int]) -> Iterator[str]:
    """Whether the indices find every id and row; of those of words, whether they can be read at all."""
    advice = "`d2llm index ... compact --dense` makes them anew"
    try:
        if sorted(table.by_ids(ids, ["id"])["id"].to_pylist()) != sorted(ids):
            yield f"the index of ids does not find all of them; {advice}"
        table.by_rows(rows, ["id"])
        if {"title_idx", "text_idx"} <= table.indices.keys():
            table.match("a", 1)
    except DataFormatError as error:
        yield f"an index of the table is damaged ({error.problem}); {advice}"


def _vector_problems(store: IndexStore, table: PassageTable) -> Iterator[str]:
    generation = store.generation(table)
    try:
        file = VectorFile.open(store.folder, generation, store.format.code_size)
    except DataFormatError as error:
        yield str(error)
        return
    codes, differing = file.codes(), 0
    damaged = file.damaged(codes)
    if damaged:
        yield f"{file.path.name}: {len(damaged)} of {len(file.extents)} parts are not what was written"
    for batch in table.batches(["d2_row", "d2_vector"]):
        rows = np.asarray(batch.column("d2_row")) & ROW_MASK
        inside = rows < len(codes)
        differing += int((~inside).sum()) + int((codes[rows[inside]] != codes_of(batch)[inside]).any(axis=1).sum())
    if differing and not damaged:
        yield f"{file.path.name}: {differing} vectors are not those of the table"


def _snapshot_problems(store: IndexStore, name: str) -> Iterator[str]:
    try:
        snapshot = IndexStore.open(store.snapshot_folder(name))
        table = snapshot.table()
        yield from _table_problems(table)
        yield from _vector_problems(snapshot, table)
    except D2LLMError as error:
        yield str(error)
