"""Short content hashes that tell whether two artifacts are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2llm.core.types import Passage

_LENGTH = 16  # hexadecimal digits: 64 bits, enough to distinguish the artifacts of one project


def fingerprint_json(value: Any) -> str:
    """Fingerprint of a JSON-serialisable value; key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Fingerprint of the names and contents of files; neither their order nor their folders matter."""
    return fingerprint_json(sorted((path.name, _content_hash(path)) for path in paths))


def fingerprint_passages(passages: Iterable[Passage]) -> str:
    """Fingerprint of ids, titles and texts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        for field in (passage.id, passage.title, passage.text):
            content = field.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:_LENGTH]


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
