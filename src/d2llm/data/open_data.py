"""Opens data sets of any layout: files, and what the `datasets` library loads (Hub names, folders it saved)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.extras import require
from d2llm.core.inputs import path_of, strings_of
from d2llm.data.beir import Dataset, RetrievalSource, Rows, beir_source, collect_judgements, read_qrels
from d2llm.data.lines import Fields, parquet_rows
from d2llm.data.pairs import PairDataset, PairSource, choose_splits, in_order, pair_source

HUB_PREFIX = "hf://"
_QRELS_COLUMNS = ("query-id", "corpus-id", "score")
_QRELS_CONFIGS = ("qrels", "default")
_PURPOSE = "reading a data set of the Hugging Face Hub"


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
            return parquet_source(path, splits=splits)
        if any(path.glob("corpus.jsonl*")) or (path / "qrels").is_dir():
            return beir_source(path, splits=splits)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return saved_source(path, splits=splits)
    return pair_source(path, splits=splits)


def parquet_source(folder: Path, *, splits: Sequence[str] | None = None) -> RetrievalSource:
    """A retrieval set in Parquet: ``corpus*.parquet``, ``queries*.parquet`` and ``qrels/<split>.parquet`` or ``.tsv``.

    Columns as in the BEIR layout; an ``id`` column may replace ``_id``, and ids may be whole numbers. If a file is
    missing, there is a ``DataFormatError``.
    """
    tables = {name: sorted(folder.glob(f"{name}*.parquet")) for name in ("corpus", "queries")}
    for name, files in tables.items():
        if not files:
            raise DataFormatError(folder, f"looked for {name}.parquet and did not find it")
    files = {path.stem: path for path in sorted((folder / "qrels").glob("*.*")) if path.suffix in {".parquet", ".tsv"}}
    if not files:
        raise DataFormatError(folder, "looked for qrels/*.parquet or qrels/*.tsv and found none")
    chosen = choose_splits(folder / "qrels", files, splits)
    return RetrievalSource(
        folder.resolve().name,
        folder,
        tables["corpus"][0],
        tables["queries"][0],
        lambda: parquet_rows(tables["corpus"]),
        lambda: parquet_rows(tables["queries"]),
        lambda: {
            split: read_qrels(path) if path.suffix == ".tsv" else _qrels(path, parquet_rows([path]))
            for split, path in chosen.items()
        },
    )


def saved_source(folder: Path, *, splits: Sequence[str] | None = None) -> PairSource:
    """Pairs in a folder written by ``save_to_disk`` of the `datasets` library; memory-mapped.

    Errors as for ``hub_source``.
    """
    library = require("datasets", extra="datasets", purpose="reading a folder of the datasets library")
    try:
        loaded = library.load_from_disk(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataFormatError(folder, f"cannot be read by the datasets library ({_brief(error)})") from error
    tables = cast("dict[str, Any]", dict(loaded) if hasattr(loaded, "keys") else {str(loaded.split or "all"): loaded})
    return _pairs_of(folder.resolve().name, folder, tables, splits)


def hub_source(name: str, *, splits: Sequence[str] | None = None) -> PairSource | RetrievalSource:
    """A data set of the Hub by ``hf://owner/name[:config]``, stored in the library's disk cache and memory-mapped.

    A data set with the configurations ``corpus`` and ``queries`` (and ``qrels`` or ``default`` for the judgements, as
    in mteb) is a retrieval set; any other is a set of pairs. Code from the Hub is never run. ``hf://`` may also be
    followed by the path of a local copy.

    Raises:
        DataFormatError: the data set cannot be found or read.
        MissingExtraError: the `datasets` library is not installed.
    """
    library = require("datasets", extra="datasets", purpose=_PURPOSE)
    repository, _, config = name.removeprefix(HUB_PREFIX).partition(":")
    if not config:
        configs = cast("list[str]", _call_library(name, lambda: library.get_dataset_config_names(repository)))
        if {"corpus", "queries"} <= set(configs):
            return _hub_retrieval(name, repository, configs, splits)
    tables = _load(name, repository, config or None)
    return _pairs_of(repository.rstrip("/").rpartition("/")[2], Path(name), tables, splits)


def _hub_retrieval(name: str, repository: str, configs: Sequence[str], splits: Sequence[str] | None) -> RetrievalSource:
    judged = next((config for config in _QRELS_CONFIGS if config in configs), None)
    path = Path(name)
    if judged is None:
        raise DataFormatError(
            path, f"has a corpus but no judgements: looked for the configurations {', '.join(_QRELS_CONFIGS)}"
        )
    corpus, queries = (_load(name, repository, config) for config in ("corpus", "queries"))
    qrels = choose_splits(path, _split_names(_load(name, repository, judged)), splits)
    return RetrievalSource(
        repository.rstrip("/").rpartition("/")[2],
        path,
        path / "corpus",
        path / "queries",
        lambda: enumerate(chain.from_iterable(corpus.values()), start=1),
        lambda: enumerate(chain.from_iterable(queries.values()), start=1),
        lambda: {split: _qrels(path / split, enumerate(table, start=1)) for split, table in qrels.items()},
    )


def _load(name: str, repository: str, config: str | None) -> dict[str, Any]:
    library = require("datasets", extra="datasets", purpose=_PURPOSE)
    return dict(_call_library(name, lambda: library.load_dataset(repository, config)))


def _call_library(name: str, call: Callable[[], Any]) -> Any:
    """Calls the library without its progress bars; its errors become ``DataFormatError``."""
    library = require("datasets", extra="datasets", purpose=_PURPOSE)
    had_bars = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        return call()
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise DataFormatError(
            Path(name), f"cannot be loaded: {_brief(error)}; check the name, the configuration and the network"
        ) from error
    finally:
        if had_bars:
            library.enable_progress_bars()


def _pairs_of(name: str, path: Path, tables: dict[str, Any], splits: Sequence[str] | None) -> PairSource:
    named = _split_names(tables)

    def reader(split: str) -> Callable[[], Rows]:
        return lambda: enumerate(_with_class_names(named[split]), start=1)

    sources = {split: ((path / split, reader(split)),) for split in in_order(named)}
    return PairSource(name, path, choose_splits(path, sources, splits))


def _split_names(tables: dict[str, Any]) -> dict[str, Any]:
    """Tables by split name, with the Hub's ``validation`` renamed to ``dev``."""
    return {"dev" if split in {"validation", "valid"} else split: table for split, table in tables.items()}


def _with_class_names(table: Any) -> Iterator[Fields]:
    """Rows with class names in place of class indices; -1, which has no name, is kept."""
    names = {field: feature.names for field, feature in table.features.items() if hasattr(feature, "names")}
    for row in cast("Iterable[dict[str, Any]]", table):
        for field, class_names in names.items():
            if isinstance(row[field], int) and row[field] >= 0:
                row[field] = class_names[row[field]]
        yield row


def _text_id(identifier: object) -> object:
    return str(identifier) if isinstance(identifier, int) and not isinstance(identifier, bool) else identifier


def _qrels(path: Path, rows: Rows) -> dict[str, dict[str, int]]:
    return collect_judgements(path, _judgements(path, rows))


def _judgements(path: Path, rows: Rows) -> Iterator[tuple[int, tuple[str, str, int]]]:
    for row_number, row in rows:
        if missing := [column for column in _QRELS_COLUMNS if column not in row]:
            raise DataFormatError(
                path, f"columns missing: {', '.join(missing)}; found: {', '.join(row)}", line=row_number
            )
        query_id, passage_id, grade = (row[column] for column in _QRELS_COLUMNS)
        identifiers = [_text_id(query_id), _text_id(passage_id)]
        if not all(isinstance(identifier, str) and identifier for identifier in identifiers):
            raise DataFormatError(path, f"an id is missing: {query_id!r}, {passage_id!r}", line=row_number)
        if not isinstance(grade, int | float) or not float(grade).is_integer():
            raise DataFormatError(path, f"the score must be a whole number, found {grade!r}", line=row_number)
        yield row_number, (cast(str, identifiers[0]), cast(str, identifiers[1]), int(grade))


def _brief(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
