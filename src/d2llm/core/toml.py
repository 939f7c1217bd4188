"""Reading TOML, with errors that say which file is wrong and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """The contents of a TOML file; what is wrong with it is raised as an ``error``."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark first
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); check the path") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not valid UTF-8 (byte {cause.start}); save the file as UTF-8") from cause
    return parse_toml(text, where=str(path), error=error)


def toml_value(word: str) -> Any:
    """A value as TOML writes it, such as 12, true or [1, 2]; any other word is a text."""
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except (ValueError, RecursionError):
        return word


def parse_toml(text: str, *, where: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """The contents of a text in TOML; ``where`` names its origin in an ``error``."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not valid TOML: {cause}; correct it there") from cause
    if bits := next(_beyond_64_bits(values), None):
        raise error(f"{where}: a whole number has {bits} bits, but TOML's have 64 at most; correct it there")
    return values


def _beyond_64_bits(value: object) -> Iterator[int]:
    """The bits of whole numbers that Python reads and TOML, torch and NumPy do not have."""
    if isinstance(value, dict | list):
        found = cast("dict[str, object] | list[object]", value)
        for item in found.values() if isinstance(found, dict) else found:
            yield from _beyond_64_bits(item)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield value.bit_length() + 1
