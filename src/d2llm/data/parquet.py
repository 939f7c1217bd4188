"""Reads rows of Parquet files in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from d2llm.core.errors import DataFormatError
from d2llm.data.lines import Record

_BATCH_ROWS = 1024


def parquet_rows(paths: Sequence[Path]) -> Iterator[tuple[int, Record]]:
    """Numbered rows of Parquet files, counted from 1 across all files and read in batches.

    Raises:
        DataFormatError: a file is not Parquet, or is damaged.
    """
    number = 0
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, cast("Record", row)
        except (pa.ArrowException, OSError) as error:
            raise DataFormatError(path, f"cannot be read as Parquet ({error}); write the file again") from error
