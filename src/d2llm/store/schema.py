"""The metadata columns of an index: the fields of its passages and their types."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, Literal, cast, get_args

from d2llm.core.errors import InputError
from d2llm.core.plain_values import UntypedText, plain_value
from d2llm.core.types import MetadataValue, Passage

FieldType = Literal["string", "integer", "number", "boolean", "timestamp"]
"""``integer`` is an int64, ``number`` a float64, ``timestamp`` a point in time in microseconds, stored in UTC."""

TEXT_COLUMNS = ("id", "title", "text", "document_id", "position")
"""The columns of a passage that are not metadata; a metadata field may not have these names."""

FILTER_WORDS = ("AND", "OR", "NOT", "IN", "BETWEEN", "LIKE", "IS", "NULL", "TRUE", "FALSE")
"""Names that a metadata field may not have: the words of the filter language."""

_TYPES: tuple[FieldType, ...] = get_args(FieldType)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TIMESTAMP = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<minutes>[0-9]{2}:[0-9]{2})(?::(?P<seconds>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,6}))?)?"
    r"(?P<zone>[Zz]|[+-][0-9]{2}:?[0-9]{2})?)?"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_NO_FIELDS: Mapping[str, FieldType] = {}


@dataclass(frozen=True, slots=True)
class MetadataSchema:
    """The metadata fields of an index, by name, in column order. Every field may be empty (null).

    Raises:
        InputError: a name cannot be a column name, two names differ only in case, or a type is unknown.
    """

    fields: Mapping[str, FieldType] = field(default_factory=lambda: _NO_FIELDS, hash=False)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for name, kind in self.fields.items():
            _check_name(name)
            if kind not in _TYPES:
                raise InputError(f"metadata field '{name}': there is no type {kind!r}; use one of {', '.join(_TYPES)}")
            if (other := seen.setdefault(name.lower(), name)) != name:
                raise InputError(f"metadata fields '{other}' and '{name}' differ only in case; rename one of them")
        object.__setattr__(self, "fields", dict(self.fields))

    @classmethod
    def infer(cls, passages: Iterable[Passage], known: MetadataSchema | None = None) -> MetadataSchema:
        """The fields of ``known``, then the other fields of the passages, with the types of their values.

        Strings stay strings, whatever they look like. Integers mixed with numbers are numbers. Values of known fields
        are checked against the known type. NaN, NaT and pandas.NA are no values, like None. The type of a field without
        any value cannot be inferred: it must be declared.

        Raises:
            InputError: a value does not fit, values of one field differ in type, or a field never has a value.
        """
        declared: Mapping[str, FieldType] = known.fields if known is not None else {}
        types: dict[str, tuple[FieldType, str]] = {}  # the type so far, and the first passage that has it
        empty: dict[str, str] = {}
        for passage in passages:
            for name, value in passage.metadata.items():
                where = f"passage '{passage.id}', metadata field '{name}'"
                if name in declared:
                    _convert(value, declared[name], where)
                elif plain_value(value) is None:
                    empty.setdefault(name, passage.id)
                else:
                    kind = _type_of(value, where)
                    _convert(value, kind, where)
                    types[name] = _widen(name, types.get(name), kind, passage.id)
        for name, passage_id in empty.items():
            if name not in types:
                raise InputError(
                    f"metadata field '{name}' has no value in any passage (the first is '{passage_id}'), so its type "
                    f"is unknown; declare it, as in '{name}:string'"
                )
        inferred: dict[str, FieldType] = {name: kind for name, (kind, _) in types.items()}
        return cls({**declared, **inferred})

    def leave_out_misfits(self, passages: Sequence[Passage]) -> tuple[list[Passage], Counter[str]]:
        """The passages with only the metadata that ``infer`` accepts with these known fields, and counts of the rest.

        A new field has the type of most of its values, in whatever order they are: integers among numbers are numbers,
        and of types that are as frequent, the last of ``FieldType`` counts. The counts are by field; empty values are
        not counted.
        """
        kinds, left_out = dict(self.fields), Counter[str]()
        cased = {name.lower(): name for name in kinds}
        new: dict[str, Counter[FieldType]] = {}
        for name, value in ((name, value) for passage in passages for name, value in passage.metadata.items()):
            try:
                _check_name(name)
                if plain_value(value) is None or cased.setdefault(name.lower(), name) != name:
                    continue
                kind = _type_of(value, "")
                _convert(value, kind, "")
            except InputError:
                continue
            if name not in self.fields:
                new.setdefault(name, Counter())[kind] += 1
        for name, counts in new.items():
            if counts["number"]:
                counts["number"] += counts.pop("integer", 0)
            kinds[name] = max(reversed(_TYPES), key=lambda kind: counts[kind])
        kept: list[Passage] = []
        for passage in passages:
            metadata: dict[str, MetadataValue] = {}
            for name, value in passage.metadata.items():
                if name in kinds and _fits(value, kinds[name]):
                    metadata[name] = value
                elif plain_value(value) is not None:
                    left_out[name] += 1
            kept.append(replace(passage, metadata=metadata) if len(metadata) < len(passage.metadata) else passage)
        return kept, left_out

    @classmethod
    def parse(cls, declarations: Sequence[str]) -> MetadataSchema:
        """Read declarations as written on a command line: ``["year:integer", "language:string"]``.

        Raises:
            InputError: a declaration is not ``name:type``, or a name occurs twice.
        """
        fields: dict[str, FieldType] = {}
        for declaration in declarations:
            name, colon, kind = declaration.partition(":")
            name = name.strip()
            if not colon:
                raise InputError(f"metadata field {declaration!r}: write name:type, as in 'year:integer'")
            if name in fields:
                raise InputError(f"metadata field '{name}' is declared twice; leave one of them out")
            fields[name] = cast("FieldType", kind.strip())  # checked by the class
        return cls(fields)

    def extend(self, other: MetadataSchema) -> MetadataSchema:
        """The fields of this schema, then the new ones of ``other``.

        A type never changes, because existing columns keep theirs. Integers fit a field of numbers, so ``other`` may
        declare such a field as integer; it stays a number.

        Raises:
            InputError: a field has another type in ``other``.
        """
        for name, kind in other.fields.items():
            present = self.fields.get(name, kind)
            if present != kind and (present, kind) != ("number", "integer"):
                raise InputError(
                    f"metadata field '{name}' is {present} in this index and cannot become {kind}; "
                    "use another name, or build a new index"
                )
        return MetadataSchema(
            {**self.fields, **{name: kind for name, kind in other.fields.items() if name not in self.fields}}
        )

    def check(self, passage: Passage) -> None:
        """Raise an ``InputError`` if a field of the passage is unknown, or a value does not have the field's type."""
        for name, value in passage.metadata.items():
            where = f"passage '{passage.id}', metadata field '{name}'"
            if name not in self.fields:
                known = ", ".join(self.fields) or "none"
                raise InputError(f"{where}: the index has no such field (it has: {known}); declare it or leave it out")
            _convert(value, self.fields[name], where)

    def values(self, passage: Passage) -> dict[str, object]:
        """The value of each field of a passage, as stored; None where it has none. Raises as ``check`` does."""
        self.check(passage)
        return {name: _convert(passage.metadata.get(name), kind, "") for name, kind in self.fields.items()}


def parse_timestamp(text: str) -> datetime:
    """Parse an ISO 8601 date, optionally followed by ``T`` or a space and a time, to UTC; without a zone it is UTC.

    Raises:
        ValueError: the text has another format, is not a calendar date, or is finer than a microsecond.
    """
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time; write it as '2024-05-31' or '2024-05-31T12:30:00Z'")
    # Python 3.10 parses neither Z, nor +0100, nor fractions with other than 3 or 6 digits.
    fraction = (match["fraction"] or "").ljust(6, "0")
    zone = (match["zone"] or "Z").upper().replace("Z", "+00:00")
    zone = zone if ":" in zone else f"{zone[:3]}:{zone[3:]}"
    iso = f"{match['date']}T{match['minutes'] or '00:00'}:{match['seconds'] or '00'}.{fraction}{zone}"
    return _utc(datetime.fromisoformat(iso))


def microseconds_of(moment: datetime) -> int:
    """Microseconds since 1970, as a point in time is stored."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment_of(microseconds: int) -> datetime:
    """The point in time, in UTC, of so many microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)


def _utc(moment: datetime) -> datetime:
    if moment.utcoffset() is None:
        return moment.replace(tzinfo=timezone.utc)
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError(f"{moment.isoformat()} is outside the years 1 to 9999 in UTC") from None


def _check_name(name: object) -> None:
    """Raise an InputError if a field cannot have this name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = "a name has letters a-z, digits and _, begins with a letter, and is at most 64 characters long"
    elif name.startswith("_") or name.lower().startswith("d2_"):
        problem = "names that begin with _ or d2_ are reserved for the index itself"
    elif name.lower() in TEXT_COLUMNS:
        problem = f"these are columns of every passage: {', '.join(TEXT_COLUMNS)}"
    elif name.upper() in FILTER_WORDS:
        problem = f"these are words of the filter language: {', '.join(FILTER_WORDS)}"
    else:
        return
    raise InputError(f"metadata field {name!r} must be renamed: {problem}")


def _type_of(value: object, where: str) -> FieldType:
    value = plain_value(value)
    for python_type, kind in _PYTHON_TYPES:
        if isinstance(value, python_type):
            return kind
    raise InputError(
        f"{where}: a value of type {type(value).__name__} cannot be stored; "
        "use a string, an integer, a number, true or false, or a date or time (for a list or object, several fields)"
    )


def _widen(name: str, before: tuple[FieldType, str] | None, kind: FieldType, passage_id: str) -> tuple[FieldType, str]:
    """The type of a field that was ``before`` (type and first passage with it) and now also has type ``kind``."""
    if before is None or before[0] == kind:
        return before or (kind, passage_id)
    if {before[0], kind} == {"integer", "number"}:
        return ("number", before[1] if before[0] == "number" else passage_id)
    raise InputError(
        f"metadata field '{name}' is {before[0]} in passage '{before[1]}' but {kind} in passage '{passage_id}'; "
        "make them the same"
    )


def _convert(value: object, kind: FieldType, where: str) -> object:
    """The value as stored in its column; raises InputError if it does not fit."""
    if isinstance(value, UntypedText):
        with suppress(ValueError, KeyError):
            value = _READERS.get(kind, str)(value.strip())
    value = plain_value(value)
    if value is None:
        return None
    try:
        return _CONVERSIONS[kind](value)
    except ValueError as error:
        raise InputError(f"{where} ({kind}): {error}") from None


def _fits(value: object, kind: FieldType) -> bool:
    try:
        _convert(value, kind, "")
    except InputError:
        return False
    return True


def _misfit(value: object, expected: str) -> ValueError:
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
    return ValueError(f"{shown} is not {expected}; correct it or leave it out")


def _to_string(value: Any) -> str:
    if not isinstance(value, str):
        raise _misfit(value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _misfit(value, "text that UTF-8 can encode (it has half of a surrogate pair)") from None
    return value


def _to_integer(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():  # as pandas has those of a column with missing ones
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _misfit(value, "a whole number")
    if not -(2**63) <= value < 2**63:
        raise _misfit(value, "a whole number of 64 bits")
    return value


def _to_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _misfit(value, "a number")
    try:
        converted = float(value)
    except OverflowError:
        raise _misfit(value, "a number that 64 bits can hold") from None
    if not math.isfinite(converted):
        raise _misfit(value, "a finite number")
    if converted != value:  # Python compares integers with floats exactly
        raise _misfit(value, "a number that a 64-bit float holds exactly")
    return converted


def _to_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _misfit(value, "true or false")
    return value


def _to_timestamp(value: Any) -> datetime:
    if isinstance(value, str):
        return parse_timestamp(value)
    if not isinstance(value, datetime):
        if not isinstance(value, date):
            raise _misfit(value, "a date, a datetime or an ISO 8601 string")
        value = datetime.combine(value, time())
    if getattr(value, "nanosecond", 0):  # pandas.Timestamp
        raise _misfit(value, "a time in whole microseconds")
    return _utc(value)


_PYTHON_TYPES: tuple[tuple[type, FieldType], ...] = (
    (bool, "boolean"),  # before int, because bool is a subclass of it
    (str, "string"),
    (int, "integer"),
    (float, "number"),
    (date, "timestamp"),  # and datetime
)
_READERS: dict[FieldType, Callable[[str], object]] = {
    "integer": int,
    "number": float,
    "boolean": lambda text: {"true": True, "false": False}[text.lower()],
}
_CONVERSIONS: dict[FieldType, Callable[[Any], object]] = {
    "string": _to_string,
    "integer": _to_integer,
    "number": _to_number,
    "boolean": _to_boolean,
    "timestamp": _to_timestamp,
}
