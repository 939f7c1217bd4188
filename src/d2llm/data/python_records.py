"""Passages and queries as Python callers give them: objects, dataclasses, dictionaries, or the rows of a table.

A record is read like a line of a corpus file (``corpus_records``): ``id`` (or ``_id``), ``text``, ``title``,
``document_id``, ``position``, and metadata in all other fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from itertools import chain, tee
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.inputs import check_count, check_string, shown
from d2llm.core.plain_values import plain_value
from d2llm.core.types import MetadataValue, Passage, Query
from d2llm.data.beir import iter_passages, iter_queries
from d2llm.data.lines import Fields, type_name, wrong_type

_KNOWN = ("_id", "id", "text", "title", "document_id", "position", "metadata")


def corpus_passages(
    file: Path, records: Iterable[tuple[int, Fields]], *, with_metadata: bool = True
) -> Iterator[tuple[int, Passage]]:
    """Numbered passages of numbered records; ``DataFormatError`` if one is malformed, or there are none."""
    records, again = tee(records)  # advanced together, so that only one record is held
    for (line, passage), (_, record) in zip(iter_passages(file, records), again, strict=True):
        yield line, _with_metadata(file, line, record, passage) if with_metadata else passage


def _with_metadata(file: Path, line: int, record: Fields, passage: Passage) -> Passage:
    if "_id" in record and str(record.get("id", passage.id)) != passage.id:
        problem = f"has '_id' {record['_id']!r} and 'id' {record['id']!r}; keep one of them"
        raise DataFormatError(file, problem, line=line)
    document_id, position = plain_value(record.get("document_id")), plain_value(record.get("position"))
    if isinstance(position, float) and position.is_integer():  # as pandas has those of a column with missing ones
        position = int(position)
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    if not isinstance(document_id, str | None):
        raise wrong_type(file, line, "document_id", document_id)
    if not isinstance(position, int | None) or isinstance(position, bool) or (position or 0) < 0:
        problem = f"field 'position' must be a whole number of at least 0, found {position!r}"
        raise DataFormatError(file, problem, line=line)
    nested = plain_value(record.get("metadata"))
    if not isinstance(nested, dict | None):
        problem = f"field 'metadata' must be an object, found {type_name(nested)}; correct it, or leave metadata out"
        raise DataFormatError(file, problem, line=line)
    values: dict[str, Any] = {name: value for name, value in record.items() if name not in _KNOWN}
    for name, value in cast("dict[str, Any]", nested or {}).items():
        if name in values:
            raise DataFormatError(file, f"field '{name}' occurs twice, also in 'metadata'; keep one", line=line)
        values[name] = value
    metadata = cast("dict[str, MetadataValue]", values)
    return Passage(passage.id, passage.text, passage.title, document_id or "", position or 0, metadata)


@runtime_checkable
class Row(Protocol):
    """A named tuple, or a row of SQLAlchemy."""

    def _asdict(self) -> Mapping[str, Any]: ...


@runtime_checkable
class Record(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@runtime_checkable
class Table(Protocol):
    """A table of pandas, Polars, PyArrow, DuckDB and whatever else gives out Arrow data."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> object: ...


PassageLike = Passage | Mapping[str, Any] | Row | Record | Table
"""A passage, a dictionary, dataclass or row with its fields, or a table of these."""
QueryLike = Query | str | Mapping[str, Any] | Row | Record | Table
"""A query, its text, a dictionary, dataclass or row with its fields, or a table of these."""

_TABLE_ROWS = 2_048  # made dictionaries at a time
_PASSAGE = "give Passage(id, text), or a dictionary, dataclass or row with 'id' and 'text'"
_QUERY = "give a text, Query(id, text), or a dictionary, dataclass or row with 'text'"


def passages_of(
    passages: Iterable[PassageLike | str] | PassageLike | str, name: str = "passages", *, texts: bool = False
) -> Iterator[Passage]:
    """Passages, one by one, from passages, dictionaries, rows, or a whole table; one passage is a list of one.

    With ``texts``, a text is a passage too; its id is its number, from 1.

    Raises:
        InputError: something is no passage, or a field has the wrong type.
    """
    kinds = (str, Passage) if texts else Passage
    for position, value in enumerate(_entries(passages, name, kinds, _PASSAGE), start=1):
        where = f"{name}[{position - 1}]"
        if texts and isinstance(value, str | Query):
            value = Passage(str(position), value) if isinstance(value, str) else Passage(value.id, value.text)
        if isinstance(value, Passage):
            _check_passage(value, where)
            yield value
            continue
        record = _record(value)
        if record is None:
            raise InputError(f"{where} is {shown(value)}; {_PASSAGE}")
        try:
            ((_, passage),) = corpus_passages(Path(name), [(position, record)])
        except DataFormatError as error:
            raise InputError(f"{where}: {error.problem}") from error
        yield passage


def one_query_of(query: QueryLike, what: str) -> Query:
    """A query from a text, a query or a dictionary; ``what`` is made for it, for the error.

    Raises:
        InputError: it is none, has no text, or there are several.
    """
    queries = queries_of(query, "query")
    if len(queries) != 1:
        raise InputError(f"{what} is made for one query, but there are {len(queries)}; make one for each")
    return queries[0]


def queries_of(queries: Iterable[QueryLike] | QueryLike, name: str = "queries") -> list[Query]:
    """Queries from texts, queries, dictionaries, rows, or a whole table; one query is a list of one.

    Texts, and records without an id, get their number as id, from 1. A mapping of ids to queries or texts is read too.

    Raises:
        InputError: something is no query, or has no text.
    """
    converted: list[Query] = []
    for position, value in enumerate(_entries(queries, name, (str, Query), _QUERY), start=1):
        where = f"{name}[{position - 1}]"
        if isinstance(value, str):
            query = Query(str(position), value)
        elif isinstance(value, Query):
            query = value
        else:
            record = _record(value)
            if record is None:
                raise InputError(f"{where} is {shown(value)}; {_QUERY}")
            if "id" not in record and "_id" not in record:
                record["id"] = str(position)
            try:
                ((_, query),) = iter_queries(Path(name), [(position, record)])
            except DataFormatError as error:
                raise InputError(f"{where}: {error.problem}") from error
        check_string(query.id, f"the id of {where}")
        check_string(query.text, f"the text of {where}")
        if not query.text.strip():
            raise InputError(f"query {query.id!r} has no text; remove it or write one")
        converted.append(query)
    return converted


def is_one_query(queries: object) -> bool:
    """Whether a caller gave one query, not in a list: a text, a query, or a dictionary or row with ``text``."""
    return _is_one(queries, (str, Query))


def _is_one(value: object, kinds: type[Any] | tuple[type[Any], ...]) -> bool:
    if isinstance(value, kinds):
        return True
    if isinstance(value, Mapping):
        return "text" in value
    if isinstance(value, str | bytes) or hasattr(value, "columns"):  # a table
        return False
    record = _record(value)
    return record is not None and "text" in record  # one row; a column of pandas has keys, too


def _entries(values: object, name: str, kinds: type[Any] | tuple[type[Any], ...], remedy: str) -> Iterable[Any]:
    """The entries of a list or table; one value is a list of one. A mapping of ids gives its values."""
    if _is_one(values, kinds):
        return [values]
    if isinstance(values, Mapping):
        return _named_entries(cast("Mapping[str, Any]", values), name, kinds)
    if _is_table(values):
        return _table_rows(cast(Any, values), name)
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {shown(values)}; {remedy}, or a list of these")
    return cast("Iterable[Any]", values)


def _is_table(values: object) -> bool:
    """Whether this is a table of pandas, or of a library that gives out Arrow data (PyArrow, Polars, DuckDB)."""
    if not any(hasattr(values, method) for method in ("__arrow_c_stream__", "__arrow_c_array__", "iloc")):
        return False
    return hasattr(values, "columns") or hasattr(values, "schema")


def _table_rows(table: Any, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, some thousand at a time, without empty cells; the levels of a named index are columns."""
    if hasattr(table, "iloc"):
        if None not in table.index.names:
            table = table.reset_index()
        columns = list(table.columns)
        starts = range(0, len(table), _TABLE_ROWS)
        blocks = (table.iloc[start : start + _TABLE_ROWS].to_dict("records") for start in starts)
    else:
        import pyarrow as pa  # slow to import

        has_stream = hasattr(table, "__arrow_c_stream__")
        reader: Any = pa.RecordBatchReader.from_stream(table if has_stream else pa.table(table))
        columns = reader.schema.names
        slices = ((batch, start) for batch in reader for start in range(0, batch.num_rows, _TABLE_ROWS))
        blocks = (batch.slice(start, _TABLE_ROWS).to_pylist() for batch, start in slices)
    if repeated := [column for column, count in Counter(map(str, columns)).items() if count > 1]:
        raise InputError(f"{name}: the table has several columns named {repeated[0]!r}; rename or drop all but one")
    for row in chain.from_iterable(blocks):
        yield {str(column): value for column, value in row.items() if plain_value(value) is not None}


def _named_entries(values: Mapping[str, Any], name: str, kinds: type[Any] | tuple[type[Any], ...]) -> Iterator[Any]:
    """The values of a mapping by id, such as ``Dataset.passages``, with their ids."""
    for key in values:
        value = values[key]
        if isinstance(value, str) and kinds != Passage:
            value = Query(key, value)
        if isinstance(value, Mapping) and "text" in value:
            value = {"id": key, **cast("Mapping[str, Any]", value)}
        record_id = value.get("id") if isinstance(value, dict) else getattr(value, "id", None)
        if record_id is None or isinstance(value, str):
            fields = ", ".join(map(repr, list(values)[:8]))
            raise InputError(f"{name} is a dictionary without 'text' (its keys: {fields}); give a list")
        if str(record_id) != str(key):
            raise InputError(f"{name}[{key!r}] has the id {record_id!r}; make them the same")
        yield value


def _record(value: object) -> dict[str, Any] | None:
    """A dictionary of a mapping or a row (a named tuple, a row of SQLite or SQLAlchemy); None if it is neither."""
    if isinstance(value, Mapping):
        fields: Fields = cast("Fields", value)
    elif hasattr(value, "_asdict"):
        fields = {name: item for name, item in cast(Any, value)._asdict().items() if name != "Index"}
    elif is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclass_fields(value)}
    elif hasattr(value, "keys") and hasattr(value, "__getitem__"):
        fields = {name: cast(Any, value)[name] for name in cast(Any, value).keys()}  # noqa: SIM118 - it is no mapping
    else:
        return None
    return {str(name): plain_value(item) for name, item in fields.items()}


def _check_passage(passage: Passage, where: str) -> None:
    check_string(passage.id, f"the id of {where}")
    if not isinstance(cast("object", passage.metadata), Mapping):
        raise InputError(
            f"the metadata of passage {passage.id!r} is {shown(passage.metadata)}, but must be a dictionary"
        )
    check_count(passage.position, f"the position of passage {passage.id!r}", 0)
    for field in ("text", "title", "document_id"):
        check_string(getattr(passage, field), f"the {field} of passage {passage.id!r}")
