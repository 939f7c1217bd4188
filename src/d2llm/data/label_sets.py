"""Counting, merging and exporting label stores (``data.labels``).

A label set is what one teacher said with one prompt about one data set; a store may hold several. Runs on several
machines write stores of their own, which ``merge_labels`` makes one of. Memory holds one set at a time, a dozen bytes
for each of its pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.core.files import folder_bytes, is_stream, new_file, new_folder
from d2llm.core.inputs import paths_of
from d2llm.core.progress import progress_bar
from d2llm.data.labels import KIND, LabelKey, LabelStore, QueryLabels, label_keys, shards

_SHARD_QUERIES = 5_000
_EXPORTED = pa.schema(
    [(name, pa.string()) for name in ("teacher", "prompt", "dataset", "query_id", "passage_id")]
    + [("log_odds", pa.float32()), ("grade", pa.float32())]
)
FILE_TYPES = (".parquet", ".jsonl", ".csv")
"""What ``export_labels`` can write."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Counts of one set: queries, pairs, pairs that were labelled more than once, and queries with a Gram matrix.

    ``fraction_yes`` of the pairs have log-odds above 0; ``mean`` and ``spread`` (standard deviation) are of the
    log-odds.
    """

    teacher: str
    prompt: str
    dataset: str
    num_queries: int
    num_pairs: int
    num_repeated: int
    num_grams: int
    fraction_yes: float
    mean: float
    spread: float


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """What a store holds: its sets, the number of its shards, and their size on disk."""

    store: str
    sets: tuple[LabelSet, ...]
    num_shards: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class MergedLabels:
    """The result of merging stores.

    ``num_repeated`` pairs were labelled more than once, with log-odds that differ by ``largest_difference`` at most;
    the label of the store that was given last counts.
    """

    store: str
    num_sets: int
    num_queries: int
    num_pairs: int
    num_repeated: int
    largest_difference: float


def count_labels(folder: str | Path) -> LabelCounts:
    """Count the labels of each set in a store.

    Raises:
        DataFormatError: the folder has no labels, or a shard is damaged.
    """
    folder = Path(folder)
    sets = tuple(_counted(LabelStore.of(folder, key)) for key in label_keys(folder))
    return LabelCounts(str(folder), sets, len(shards(folder)), folder_bytes(folder))


def merge_labels(folders: Sequence[str | Path] | str | Path, out: str | Path) -> MergedLabels:
    """Write the labels of all stores into a new one, each pair once; ``out`` appears when it is complete.

    Raises:
        InputError: there are no folders, or ``out`` exists.
        DataFormatError: a folder has no labels, or a shard is damaged.
    """
    sources, out = paths_of(folders, "folders"), Path(out)
    if not sources:
        raise InputError("no label stores were given; name at least one folder")
    if out.exists():
        raise InputError(f"{out}: already exists; give a new folder, and delete the old stores once it is complete")
    keys = {folder: label_keys(folder) for folder in sources}
    all_keys = sorted({key for store_keys in keys.values() for key in store_keys})
    num_queries = num_pairs = num_repeated = 0
    largest = 0.0
    with new_folder(out, kind=KIND) as draft, progress_bar("merging labels", None) as advance:
        for key in all_keys:
            stores = [LabelStore.of(folder, key) for folder in sources if key in keys[folder]]
            num_repeated += sum(store.num_duplicates for store in stores)
            written = LabelStore.of(draft, key)
            for query_ids in batched(sorted({name for store in stores for name in store.query_ids}), _SHARD_QUERIES):
                merged: list[QueryLabels] = []
                for query_id in query_ids:
                    labels, differences = _merged(query_id, stores)
                    merged.append(labels)
                    num_repeated += len(differences)
                    largest = max(largest, *differences, 0.0)
                    num_pairs += len(labels.passage_ids)
                written.write(merged, remember=False)
                num_queries += len(merged)
                advance(len(merged))
    return MergedLabels(str(out), len(all_keys), num_queries, num_pairs, num_repeated, largest)


def export_labels(
    folder: str | Path,
    path: str | Path,
    *,
    teacher: str | None = None,
    prompt: str | None = None,
    dataset: str | None = None,
) -> int:
    """Write a store as one file for other programs, a line for each pair; returns the number of pairs.

    The columns are teacher, prompt, dataset, query_id, passage_id, log_odds and grade (null unless the teacher gave
    grades); the ending of ``path`` is .parquet, .jsonl or .csv; a stream such as ``/dev/stdout`` gets JSON lines.
    ``teacher``, ``prompt`` (fingerprints or their beginnings) and ``dataset`` choose sets.

    Raises:
        InputError: the ending is another one, or no set has been chosen.
        DataFormatError: the folder has no labels, or a shard is damaged.
    """
    folder, path = Path(folder), Path(path)
    suffix = ".jsonl" if is_stream(path) and path.suffix not in FILE_TYPES else path.suffix
    if suffix not in FILE_TYPES:
        raise InputError(f"{path}: labels are written as {', '.join(FILE_TYPES)}; give a name that ends so")
    keys = label_keys(folder)
    chosen = [
        key
        for key in keys
        if key.teacher.startswith(teacher or "")
        and key.prompt.startswith(prompt or "")
        and (dataset is None or key.dataset == dataset)
    ]
    if not chosen:
        raise InputError(f"{folder}: no such labels; it has those of {'; '.join(map(str, keys))}")
    with new_file(path) as file:
        return _write(_tables(folder, chosen), file, suffix)


def _tables(folder: Path, keys: Sequence[LabelKey]) -> Iterator[Any]:
    """The pairs of some sets, in tables of the exported columns."""
    with progress_bar("exporting labels", None) as advance:
        for key in keys:
            store = LabelStore.of(folder, key)
            for query_ids in batched(store.query_ids, _SHARD_QUERIES):
                rows = [
                    (key.teacher, key.prompt, key.dataset, query_id, passage_id, value, grades.get(passage_id))
                    for query_id, grades in ((name, store.grades(name)) for name in query_ids)
                    for passage_id, value in store.log_odds(query_id).items()
                ]
                columns = zip(_EXPORTED, zip(*rows, strict=True), strict=True)
                yield pa.Table.from_arrays(
                    [pa.array(values, field.type) for field, values in columns], schema=_EXPORTED
                )
                advance(len(query_ids))


def _write(tables: Iterator[Any], file: BinaryIO, file_type: str) -> int:
    """Write tables of pairs; returns the number of pairs."""
    num_pairs = 0
    writers: dict[str, Any] = {".parquet": pq.ParquetWriter, ".csv": pa_csv.CSVWriter}
    with writers[file_type](file, _EXPORTED) if file_type in writers else nullcontext() as writer:
        for table in tables:
            num_pairs += len(table)
            if writer is not None:
                writer.write_table(table)
                continue
            for record in table.to_pylist():
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    return num_pairs


def _counted(store: LabelStore) -> LabelSet:
    values = np.array([value for name in store.query_ids for value in store.log_odds(name).values()], np.float64)
    return LabelSet(
        store.teacher,
        store.prompt,
        store.dataset,
        num_queries=len(store),
        num_pairs=store.num_pairs,
        num_repeated=store.num_duplicates,
        num_grams=sum(store.gram(name) is not None for name in store.query_ids),
        fraction_yes=float((values > 0).mean()),
        mean=float(values.mean()),
        spread=float(values.std()),
    )


def _merged(query_id: str, stores: Sequence[LabelStore]) -> tuple[QueryLabels, list[float]]:
    """The labels of a query in all stores, and by how much those of pairs differ that several stores have."""
    values: dict[str, float] = {}
    grades: dict[str, float] = {}
    differences: list[float] = []
    gram: tuple[tuple[str, ...], Any] | None = None
    for store in stores:
        for passage_id, value in store.log_odds(query_id).items():
            if passage_id in values:
                differences.append(abs(values[passage_id] - value))
            values[passage_id] = value
        grades |= store.grades(query_id)
        gram = store.gram(query_id) or gram
    first = () if gram is None else gram[0]
    passage_ids = tuple(dict.fromkeys((*first, *values)))  # a Gram matrix is of the first passages
    log_odds = np.array([values[passage_id] for passage_id in passage_ids], np.float32)
    graded = np.array([grades.get(passage_id, np.nan) for passage_id in passage_ids], np.float32) if grades else None
    return QueryLabels(query_id, passage_ids, log_odds, None if gram is None else gram[1], graded), differences
