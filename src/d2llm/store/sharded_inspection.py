"""Statistics and verification of an index, sharded or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError
from d2llm.store.inspection import IndexStats, VerifyReport, stats, verify
from d2llm.store.part_vectors import EncodeParts
from d2llm.store.passage_table import bytes_at_rest
from d2llm.store.shards import Storage, hashes_of_ids, shard_of
from d2llm.store.side_files import read_chunking
from d2llm.store.stored_vectors import Encode

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


def stats_of_all(storage: Storage) -> IndexStats:
    """Statistics of the latest version; of a sharded index, the sums over its shards.

    The number of versions that can still be read and the recall of the approximate index are the smallest of a shard's.
    """
    all_stats = [stats(store) for store in storage.stores]
    if storage.records is None:
        return all_stats[0]
    return sum_stats(storage, all_stats, sum(bytes_at_rest(store.folder) for store in storage.stores))


def sum_stats(storage: Storage, all_stats: Sequence[IndexStats], num_bytes: int) -> IndexStats:
    """``stats_of_all`` from the statistics of the shards, which take ``num_bytes``."""
    sums = {name: sum(getattr(one, name) for one in all_stats) for name in _SUMMED}
    recalls = [one.ann_recall for one in all_stats if one.ann_recall is not None]
    return replace(
        all_stats[0],
        folder=str(storage.folder),
        num_versions=min(one.num_versions for one in all_stats),
        snapshots=[],
        ann_recall=min(recalls, default=None),
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
    """``inspection.verify`` of an index, or of each shard; problems begin with the name of the shard.

    Of a sharded index, it also checks that every passage is in the shard that it belongs in, and in no other.

    Raises:
        InputError, IndexLockedError, StorageError: as for ``inspection.verify``.
    """
    reports = [
        verify(store, repair=repair, drop_lost=drop_lost, encode=encode, encode_parts=encode_parts)
        for store in storage.stores
    ]
    if storage.records is None:
        return reports[0]
    problems = [f"shard {one.number} ({one.address}) is missing: {one.problem}" for one in storage.missing]
    for number, report in zip(storage.numbers, reports, strict=True):
        problems += [f"shard {number}: {problem}" for problem in report.problems]
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
    for number, store in zip(storage.numbers, storage.stores, strict=True):
        wrong: list[str] = []
        for batch in store.table().batches(["id", "document_id"]):
            hashes.append(hashes_of_ids(batch))
            pairs = ((record["id"], record["document_id"]) for record in batch)
            wrong += [one for one, document in pairs if shard_of(one, document, storage.num_shards or 1) != number]
        if wrong:
            yield (
                f"shard {number}: {len(wrong):,} passages belong in other shards, the first is {wrong[0]!r}; delete "
                "them and upsert them into the sharded index"
            )
    all_hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
    num_repeated = len(all_hashes) - len(np.unique(all_hashes))
    if num_repeated:
        yield (
            f"{num_repeated:,} ids are in two shards (an upsert was interrupted); upsert the same passages again to "
            "keep one of each"
        )
