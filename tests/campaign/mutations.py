"""Changes of bytes, and of values of JSON."""

from __future__ import annotations

import random
from typing import Any

_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), 0.5)
_VALUES = (None, True, "", "x", "../../etc/passwd", "\ud800", "\0", [], {}, [[]], {"": {}}, [None] * 3, *_NUMBERS)


def mutated(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """Bytes changed in one to four places."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at, end = sorted((chance.randrange(len(changed) + 1), chance.randrange(len(changed) + 1)))
        match chance.randrange(8):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : min(end, at + 64)]
            case 3:
                changed[at:at] = changed[at : min(end, at + 256)] * chance.choice([1, 2, 50])
            case 4:
                changed[at:at] = chance.choice(
                    [b"\0", b"\xff\xfe", b"[" * 5_000, b"9" * 5_000, b'"', b"\n", b"<", b"}"]
                )
            case 5 if other:
                start = chance.randrange(len(other))
                changed[at:end] = other[start : start + chance.randrange(1, 512)]
            case 6 if changed:
                changed[at % len(changed)] = chance.randrange(256)
            case _:
                changed[at : at + 8] = chance.choice([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7])
    return bytes(changed)


def restructured(value: Any, chance: random.Random) -> Any:
    """A value of JSON with one part of it replaced, removed, repeated or nested."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        match chance.randrange(8):
            case 0:
                return {name: part for name, part in value.items() if name != key}
            case 1:
                return value | {"unknown": chance.choice(_VALUES)}
            case _:
                return value | {key: restructured(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        match chance.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value * 2
            case _:
                return [*value[:at], restructured(value[at], chance), *value[at + 1 :]]
    return chance.choice([*_VALUES, [value], {"x": value}])
