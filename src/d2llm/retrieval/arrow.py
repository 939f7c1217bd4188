"""The passages of an index as a table of Arrow, which pandas, Polars, DuckDB and Parquet files take as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from d2llm.core.types import Passage
from d2llm.retrieval.segments import IndexView
from d2llm.store.schema import TEXT_COLUMNS, FieldType

_BATCH_ROWS = 8_192
_TYPES: dict[FieldType, pa.DataType] = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}


def passage_table(index: IndexView, *, vectors: bool = False) -> pa.Table:  # pyright: ignore[reportUnknownParameterType] - PyArrow has no types
    """All passages with their metadata, in the order of the index; a missing value is null.

    Columns: id, title, text, document_id, position, the metadata fields by their types, and with ``vectors`` also
    ``vector`` [dim], float32.
    """
    columns: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in TEXT_COLUMNS]
    columns[-1] = ("position", pa.int64())
    columns += [(name, _TYPES[kind]) for name, kind in index.metadata.fields.items()]
    if vectors:
        columns.append(("vector", pa.list_(pa.float32(), index.dim)))
    schema, rows = pa.schema(columns), index.live_rows()
    batches: list[pa.RecordBatch] = []
    for start in range(0, len(rows), _BATCH_ROWS):
        block = rows[start : start + _BATCH_ROWS]
        passages = index.passages(block)
        arrays: list[Any] = [
            pa.array([_value(passage, name) for passage in passages], kind)
            for name, kind in columns
            if name != "vector"
        ]
        if vectors:
            flat = np.ascontiguousarray(index.vectors(block)).ravel()
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), index.dim))
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _value(passage: Passage, column: str) -> Any:
    return getattr(passage, column) if column in TEXT_COLUMNS else passage.metadata.get(column)
