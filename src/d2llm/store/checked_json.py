"""Small JSON files beside an index that carry a checksum of their own content.

A flipped bit in a number would otherwise be read as another number. Files from before there was the checksum are read
as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from d2llm.core.files import write_json

_KEY = "own_checksum"


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """Write an object as JSON, atomically, with its checksum."""
    write_json(path, {_KEY: _checksum(value), **value})


def read_checked(path: Path, *, required: bool = False, compare: bool = True) -> Any:
    """What ``write_checked`` wrote, or any JSON without a checksum.

    Args:
        path: of the file.
        required: refuse JSON without a checksum.
        compare: False reads what may be damaged, for whoever has other means to tell.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or not what was written.
    """
    value = json.loads(path.read_bytes().decode("utf-8"))
    if not isinstance(value, dict) or _KEY not in value:
        if required:
            raise ValueError(f"{path.name} is not what was written")
        return value
    if value.pop(_KEY) != _checksum(value) and compare:
        raise ValueError(f"{path.name} is not what was written")
    return value


def _checksum(value: dict[str, Any]) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(content.encode(errors="surrogatepass"))
