"""Which files a version of a Lance table consists of, read from its manifest.

    _versions/<18446744073709551615 - version>.manifest    (older tables: <version>.manifest)

A manifest ends with the message ``Manifest`` of Lance's ``table.proto``, before it, where there are indices, an
``IndexSection``; both begin with their length. LanceDB does not tell which files a version needs, so the few fields
that name files are read here. Source: Lance's format specification, https://lance.org/format/table/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

VERSIONS = "_versions"
_LARGEST = (1 << 64) - 1
_NAME = re.compile(r"(\d+)\.manifest")
_INVERTED_DIGITS = 20  # a name of so many digits counts down, so that the newest is listed first
_MAGIC = b"LANC"
_FOOTER_BYTES = 16  # i64 position of the manifest, two i16 of the format's version, the magic word

# Numbers of fields in table.proto.
_MANIFEST = {"fragments": 2, "version": 3, "index_section": 6, "timestamp": 7, "transaction_file": 12}
_FRAGMENT = {"id": 1, "files": 2, "deletion_file": 3}
_DELETION = {"file_type": 1, "read_version": 2, "id": 3}
_INDEX = {"uuid": 1, "name": 3, "files": 10}

Value = int | bytes


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """The files of a version, by their paths in the table's folder.

    Attributes:
        version: its number.
        seconds: when it was written, since 1970.
        rows: of the columns, and of what was deleted of them.
        indices: by the index's name; a path that ends in "/" stands for all files of that folder.
        transaction: how the version came about, which nobody reads once it has; "" where there is none.
    """

    version: int
    seconds: int
    rows: list[str]
    indices: dict[str, list[str]]
    transaction: str

    @property
    def needed(self) -> list[str]:
        """Those that a search may read."""
        return [*self.rows, *(path for paths in self.indices.values() for path in paths)]

    @property
    def all_files(self) -> list[str]:
        """Those, and how the version came about."""
        return [*self.needed, *([self.transaction] if self.transaction else [])]


def version_of(name: str) -> int | None:
    """The version that a file in ``_versions`` is the manifest of; None for other files."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    return _LARGEST - number if len(match[1]) == _INVERTED_DIGITS else number


def manifest_names(version: int) -> tuple[str, str]:
    """The paths in the table's folder that the manifest of a version may have."""
    return f"{VERSIONS}/{_LARGEST - version:0{_INVERTED_DIGITS}}.manifest", f"{VERSIONS}/{version}.manifest"


def manifests(table: Path) -> dict[int, str]:
    """The path in the table's folder of the manifest of each version that is there, the newest first."""
    try:
        names = [path.name for path in (table / VERSIONS).iterdir()]
    except OSError:
        return {}
    found = {number: f"{VERSIONS}/{name}" for name in names if (number := version_of(name)) is not None}
    return dict(sorted(found.items(), reverse=True))


def files_named(content: bytes) -> VersionFiles:
    """The files that a manifest with this content names.

    Raises:
        ValueError: it is no manifest, or of a form that is not known here.
    """
    if content[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("it does not end as a manifest does")
    start = int.from_bytes(content[-_FOOTER_BYTES : -_FOOTER_BYTES + 8], "little")
    manifest = _grouped(_message(content, start))
    rows: list[str] = []
    for fragment in map(_grouped, _messages(manifest, _MANIFEST["fragments"])):
        rows += (f"data/{_text(_grouped(file), 1)}" for file in _messages(fragment, _FRAGMENT["files"]))
        for deletion in map(_grouped, _messages(fragment, _FRAGMENT["deletion_file"])):
            number, read, own = _number(fragment, 1), _number(deletion, 2), _number(deletion, _DELETION["id"])
            ending = "bin" if _number(deletion, _DELETION["file_type"]) else "arrow"
            rows.append(f"_deletions/{number}-{read}-{own}.{ending}")
    indices: dict[str, list[str]] = {}
    if _MANIFEST["index_section"] in manifest:
        section = _number(manifest, _MANIFEST["index_section"])
        for index in map(_grouped, _messages(_grouped(_message(content, section)), 1)):
            (holder,) = _messages(index, _INDEX["uuid"])
            (uuid,) = _messages(_grouped(holder), 1)
            folder = f"_indices/{UUID(bytes=uuid)}"
            names = [_text(_grouped(file), 1) for file in _messages(index, _INDEX["files"])] or [""]
            indices.setdefault(_text(index, _INDEX["name"]), []).extend(f"{folder}/{name}" for name in names)
    transaction = _text(manifest, _MANIFEST["transaction_file"])
    times = [_number(_grouped(time), 1) for time in _messages(manifest, _MANIFEST["timestamp"])]
    return VersionFiles(
        version=_number(manifest, _MANIFEST["version"]),
        seconds=max(times, default=0),
        rows=rows,
        indices=indices,
        transaction=f"_transactions/{transaction}" if transaction else "",
    )


def _message(content: bytes, start: int) -> bytes:
    """The message behind its length, four bytes, at a position."""
    if not 0 <= start <= len(content) - 4:
        raise ValueError("a position in it is outside")
    end = start + 4 + int.from_bytes(content[start : start + 4], "little")
    if end > len(content):
        raise ValueError("a part of it is cut")
    return content[start + 4 : end]


def _grouped(message: bytes) -> dict[int, list[Value]]:
    """The values of a message in protocol buffers, by the number of their field."""
    fields: dict[int, list[Value]] = {}
    for number, value in _fields(message):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field in it is of the unknown kind {kind}")
        if place + length > len(message):
            raise ValueError("a field of it is cut")
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("a number in it is cut")


def _messages(fields: dict[int, list[Value]], number: int) -> list[bytes]:
    return [value for value in fields.get(number, []) if isinstance(value, bytes)]


def _number(fields: dict[int, list[Value]], number: int) -> int:
    values = [value for value in fields.get(number, []) if isinstance(value, int)]
    return values[-1] if values else 0


def _text(fields: dict[int, list[Value]], number: int) -> str:
    values = _messages(fields, number)
    return values[-1].decode() if values else ""
