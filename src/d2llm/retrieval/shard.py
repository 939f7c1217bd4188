"""The ``shard`` verb: copy an index into shards. Nothing is encoded: vectors, parts and words are copied."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.files import MANIFEST_NAME, check_replaceable, folder_bytes, new_folder, replace_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.types import PartKind
from d2llm.store.blocks import rows_of
from d2llm.store.bm25 import WordIndex
from d2llm.store.index_manifest import SHARDED_KIND, copy_notes, find_index
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import PartVectors
from d2llm.store.passage_table import PassageTable, Record
from d2llm.store.remote_shards import upload_shard
from d2llm.store.shards import (
    FORMAT_VERSION,
    ShardRecord,
    Storage,
    hashes_of_ids,
    shard_name,
    shard_of,
    write_sharded_manifest,
)

_HELD_ROWS = 1 << 16  # in memory at once, over all shards,
_MIN_ROWS = 1_024  # unless there are so many shards that each would be written in smaller pieces


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What ``shard`` did.

    The smallest and the largest shard have ``fewest`` and ``most`` passages. ``num_resumed`` of the passages were
    copied by an interrupted call. The shards take ``num_bytes``; ``remote`` is their URL in object storage, if any.
    """

    folder: Path
    num_shards: int
    num_passages: int
    num_resumed: int
    fewest: int
    most: int
    num_bytes: int
    seconds: float
    remote: str | None = None


def shard(index: str | Path, folder: str | Path, num_shards: int, *, remote: str | None = None) -> ShardReport:
    """Copy an index into a sharded index, whose searches give the same results; it appears when it is complete.

    A passage goes to the shard that a hash of its document names (``store.shards``). Memory does not grow with
    the index. An interrupted call continues when it is repeated. Approximate indexes and snapshots are not
    copied; build them for the shards.

    Args:
        index: folder of the index; it may itself be sharded, to change the number of shards.
        folder: where the sharded index goes; must not exist, or be empty.
        num_shards: number of shards.
        remote: URL of a folder in object storage (fsspec) for the shards; ``folder`` then only has the manifest. None:
            the shards are in ``folder``.

    Raises:
        DataFormatError: there is no index, or it is damaged.
        InputError: ``folder`` is not empty, the number of shards is wrong, or the object storage cannot be written; the
            finished shards are kept for a repeated call.
        StorageError: the shards cannot be written.
    """
    begin = time.perf_counter()
    source, folder = Storage.open(find_index(Path(index))), Path(folder)
    check_replaceable(folder, SHARDED_KIND)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: already holds an index; give another folder")
    tables = source.tables()
    states = [[table.version, table.written] for table in tables]
    key = fingerprint_json([FORMAT_VERSION, str(source.folder.resolve()), num_shards, states])
    draft = folder.parent / f".{folder.name}.work-{key}"
    target = Storage.open(draft) if (draft / MANIFEST_NAME).is_file() else _create(draft, source, tables, num_shards)
    with target.writing(), progress_bar("sharding", sum(map(len, tables))) as advance:
        copy = _Copy(target, advance)
        num_resumed = copy.num_present
        for store, table in zip(source.stores, tables, strict=True):
            copy.add(store, table)
        for store in target.stores:
            store.compact(timedelta(0))
    copy_notes(source.folder, draft)
    num_bytes = sum(folder_bytes(store.folder) for store in target.stores)
    if remote is None:
        replace_folder(draft, folder)
    else:
        _upload(target, remote.rstrip("/"), folder)
        shutil.rmtree(draft)
    sizes = [record.num_passages for record in target.records or ()]
    return ShardReport(
        folder,
        num_shards,
        sum(sizes),
        num_resumed,
        min(sizes),
        max(sizes),
        num_bytes,
        time.perf_counter() - begin,
        remote,
    )


def _create(draft: Path, source: Storage, tables: list[PassageTable], num_shards: int) -> Storage:
    spec = StoredSpec.of_manifest(source.manifest)
    if spec.student_source is not None and spec.student_source.startswith("../"):  # relative to the source
        spec = spec.replace(student_source=str((source.folder / spec.student_source).resolve()))
    return Storage.create(draft, spec, num_shards=num_shards, metadata=tables[0].metadata)


def _upload(target: Storage, remote: str, folder: Path) -> None:
    """Copy all shards into object storage, and write a sharded index that names them there."""
    records: list[ShardRecord] = []
    for position, (record, store) in enumerate(zip(target.records or (), target.stores, strict=True)):
        url = f"{remote}/{shard_name(position)}"
        records.append(replace(record, address=url, files=upload_shard(store.folder, url)))
    with new_folder(folder, kind=SHARDED_KIND) as new:
        write_sharded_manifest(new, target.manifest, records)
        copy_notes(target.folder, new)


class _Copy:
    """Rows on their way into the shards: they are collected by shard, and written many at a time."""

    def __init__(self, target: Storage, advance: Advance) -> None:
        self._target = target
        self._advance = advance
        self._most = max(_MIN_ROWS, _HELD_ROWS // len(target.stores))
        self._waiting: dict[int, list[Record]] = {}
        present = [hashes_of_ids(batch) for store in target.stores for batch in store.table().batches(["id"])]
        self._present = np.sort(np.concatenate([np.zeros(0, np.uint64), *present]))
        """Hashes of the ids that an interrupted call has written."""

    @property
    def num_present(self) -> int:
        """Number of passages that an interrupted call has written."""
        return len(self._present)

    def add(self, store: IndexStore, table: PassageTable) -> None:
        """Copy all passages of a store that are not there yet."""
        source = _Source(store, table)
        for batch in table.intact_batches():  # copied damage would get matching hashes
            present = np.isin(hashes_of_ids(batch), self._present)
            self._advance(int(present.sum()))
            for record in (record for record, is_there in zip(batch, present, strict=True) if not is_there):
                shard_number = shard_of(record["id"], record["document_id"], len(self._target.stores))
                waiting = self._waiting.setdefault(shard_number, [])
                waiting.append(record)
                if len(waiting) >= self._most:
                    self._write(shard_number, source)
        for shard_number in list(self._waiting):
            self._write(shard_number, source)

    def _write(self, shard_number: int, source: _Source) -> None:
        records = self._waiting.pop(shard_number)
        old = rows_of(records)
        parts: dict[PartKind, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {
            kind: part.take(old) for kind, part in source.parts.items()
        }
        self._target.stores[shard_number].append_rows(records, source.codes_of(records), source.words.take(old), parts)
        self._advance(len(records))


class _Source:
    """What an index has beside its table, all compared with checksums."""

    def __init__(self, store: IndexStore, table: PassageTable) -> None:
        self.codes_of: Callable[[Sequence[Record]], NDArray[np.uint8]] = store.vectors.codes_of_batches(table)
        self.words: WordIndex = store.words(table, store.vectors.num_rows(table), whole=True).words
        self.parts: dict[PartKind, PartVectors] = {
            kind: store.parts(table, kind, whole=True) for kind in store.part_formats
        }
