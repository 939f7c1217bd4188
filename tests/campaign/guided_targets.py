"""What a parser of others' bytes is to libFuzzer: how it is called, and whole inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DEEP = (b"[" * 3_000, b'{"a":' * 1_000, b"9" * 5_000, b'"\\ud800"', b"\xff\xfe\0", b"(" * 3_000, b"<b>" * 1_000, b"")
"""What no parser may stumble over, and what mutations alone hardly reach."""

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        make: given an empty folder, what reads bytes; it imports what it needs.
        seeds: whole inputs.
        json: mutations also change the structure of a line of JSON.
        expected: names of exceptions, besides d2llm's, that the function documents.
    """

    make: Callable[[Path], Read]
    seeds: Sequence[bytes]
    json: bool = False
    expected: Sequence[str] = ()


def text_of(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def lines_of(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def json_of(data: bytes) -> object:
    """The value of JSON, or the text itself."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return text_of(data)


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[Path], Read]:
    """What writes bytes to a file, and reads it."""

    def make(folder: Path) -> Read:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        def call(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return call

    return make
