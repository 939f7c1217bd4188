"""A small file, and what is to be read from it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from zipfile import ZIP_DEFLATED, ZipFile


@dataclass(frozen=True)
class Case:
    """A file by name; its text has the words ``has`` and none of ``lacks``, where any white space equals a space.

    ``notices`` are parts of what its reader reports to have left out.
    """

    name: str
    data: bytes
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def zipped(parts: Mapping[str, str | bytes], *, stored: str = "") -> bytes:
    """An archive of parts; that named ``stored`` comes first and is not compressed."""
    file = io.BytesIO()
    with ZipFile(file, "w", ZIP_DEFLATED) as archive:
        for name in sorted(parts, key=lambda each: each != stored):
            content = parts[name]
            data = content.encode() if isinstance(content, str) else content
            archive.writestr(name, data, compress_type=0 if name == stored else ZIP_DEFLATED)
    return file.getvalue()
