"""Reads from the manifest of a Lance table which files a version consists of.

    _versions/<18446744073709551615 - version>.manifest

A manifest ends with the message ``Manifest`` of Lance's ``table.proto``, preceded by an ``IndexSection`` if there are
indices; both start with their length. LanceDB does not report which files a version needs, so the few fields that name
files are parsed here. Source: Lance's format specification, https://lance.org/format/table/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

VERSIONS = "_versions"
_MAX_VERSION = (1 << 64) - 1
_NAME = re.compile(r"(\d{20})\.manifest")  # counts down, so that the newest is listed first
_MAGIC = b"LANC"
_FOOTER_BYTES = 16  # i64 position of the manifest, two i16 of the format version, the magic bytes

# Field numbers in table.proto.
_MANIFEST = {"fragments": 2, "version": 3, "index_section": 6, "timestamp": 7, "transaction_file": 12}
_FRAGMENT = {"id": 1, "files": 2, "deletion_file": 3}
_DELETION = {"file_type": 1, "read_version": 2, "id": 3}
_INDEX = {"uuid": 1, "name": 3, "files": 10}

Value = int | bytes


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """The files of a version, as paths relative to the table's folder.

    Attributes:
        version: version number.
        seconds: time of writing, in seconds since 1970.
        rows: data files and deletion files.
        indices: index name -> files; a path that ends in "/" stands for all files of that folder.
        transaction: the transaction file, which is not read after the commit; "" if there is none.
    """

    version: int
    seconds: int
    rows: list[str]
    indices: dict[str, list[str]]
    transaction: str

    @property
    def needed(self) -> list[str]:
        """The files that a search may read."""
        return [*self.rows, *(path for paths in self.indices.values() for path in paths)]

    @property
    def all_files(self) -> list[str]:
        """The needed files and the transaction file."""
        return [*self.needed, *([self.transaction] if self.transaction else [])]


def version_of(name: str) -> int | None:
    """The version whose manifest has this file name in ``_versions``; None for other files."""
    match = _NAME.fullmatch(name)
    return None if match is None else _MAX_VERSION - int(match[1])


def manifest_name(version: int) -> str:
    """The path of a version's manifest in the table's folder."""
    return f"{VERSIONS}/{_MAX_VERSION - version:020}.manifest"


def manifests(table: Path) -> dict[int, str]:
    """Version -> path of its manifest in the table's folder, newest first."""
    try:
        names = [path.name for path in (table / VERSIONS).iterdir()]
    except OSError:
        return {}
    path_of = {number: f"{VERSIONS}/{name}" for name in names if (number := version_of(name)) is not None}
    return dict(sorted(path_of.items(), reverse=True))


def files_named(content: bytes) -> VersionFiles:
    """The files named in the content of a manifest.

    Raises:
        ValueError: it is not a manifest, or has an unknown structure.
    """
    if content[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("it does not end as a manifest does")
    start = int.from_bytes(content[-_FOOTER_BYTES : -_FOOTER_BYTES + 8], "little")
    manifest = _grouped(_message(content, start))
    rows: list[str] = []
    for fragment in map(_grouped, _messages(manifest, _MANIFEST["fragments"])):
        rows += (f"data/{_text(_grouped(file), 1)}" for file in _messages(fragment, _FRAGMENT["files"]))
        for deletion in map(_grouped, _messages(fragment, _FRAGMENT["deletion_file"])):
            number = _number(fragment, 1)
            read = _number(deletion, 2)
            own = _number(deletion, _DELETION["id"])
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
    """The message at a position, after its four-byte length."""
    if not 0 <= start <= len(content) - 4:
        raise ValueError("a position in it is outside")
    end = start + 4 + int.from_bytes(content[start : start + 4], "little")
    if end > len(content):
        raise ValueError("a part of it is cut")
    return content[start + 4 : end]


def _grouped(message: bytes) -> dict[int, list[Value]]:
    """Field number -> values of a protocol buffer message."""
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
