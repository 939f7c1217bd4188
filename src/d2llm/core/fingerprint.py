"""Short content hashes that tell whether two artifacts are the same thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LENGTH = 16  # hexadecimal digits: 64 bits, ample for telling apart the artifacts of one project


def fingerprint_json(value: Any) -> str:
    """Fingerprint of a JSON-serialisable value; key order does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Fingerprint of the names and contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()[:_LENGTH]
