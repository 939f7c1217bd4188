"""Opens data sets of any layout: detects the layout of a path and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2llm.core.errors import DataFormatError
from d2llm.core.inputs import path_of, strings_of
from d2llm.data.beir import Dataset, RetrievalSource, beir_source
from d2llm.data.pairs import PairDataset, PairSource, pair_source


def open_data(path_or_name: str | Path, *, splits: Sequence[str] | str | None = None) -> Dataset | PairDataset:
    """Read a data set of any layout into memory: a retrieval set as ``Dataset``, pairs as ``PairDataset``.

    Args:
        path_or_name: a folder in BEIR layout (JSON lines or Parquet), a folder or file of pairs, a folder that the
            `datasets` library saved, or a Hub name: ``hf://owner/name[:config]``.
        splits: which splits to read; None reads all.

    Raises:
        DataFormatError: no such data, or malformed data (the message names file and line).
        DuplicateIdError: an id, or a judged pair, occurs twice.
        MissingExtraError: the `datasets` library is needed and not installed.

    Example:
        >>> from d2llm import open_data
        >>> sorted(open_data("DATA", splits="dev").qrels)
        ['dev']
    """
    return open_source(path_or_name, splits=splits).load()


def open_source(path_or_name: str | Path, *, splits: Sequence[str] | str | None = None) -> RetrievalSource | PairSource:
    """The rows of a data set, read one by one and not kept; arguments and errors as for ``open_data``."""
    splits = None if splits is None else strings_of(splits, "splits")
    if str(path_or_name).startswith("hf:/"):
        from d2llm.data.tables import HUB_PREFIX, hub_source

        # Converting the name to a Path drops one of the slashes.
        name = str(path_or_name).removeprefix("hf:/").removeprefix("/")
        return hub_source(HUB_PREFIX + name, splits=splits)
    path = path_of(path_or_name, "path_or_name")
    if not path.exists():
        raise DataFormatError(
            path,
            "no such file or folder; give a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/*.tsv), a folder "
            "or file of pairs (train.jsonl, ...), or a Hub name as hf://owner/name",
        )
    if path.is_dir():
        if any(path.glob("corpus*.parquet")):
            from d2llm.data.tables import parquet_source

            return parquet_source(path, splits=splits)
        if any(path.glob("corpus.jsonl*")) or (path / "qrels").is_dir():
            return beir_source(path, splits=splits)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            from d2llm.data.tables import saved_source

            return saved_source(path, splits=splits)
    return pair_source(path, splits=splits)
