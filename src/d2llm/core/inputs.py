"""Lists that callers give: one string, path or object counts as a list of one, and every entry is checked.

Every public function that takes several ids, texts, paths, names or objects reads them here. A string is never read as
a list of its letters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

from d2llm.core.errors import InputError
from d2llm.core.names import did_you_mean
from d2llm.core.types import is_text

_Item = TypeVar("_Item")
_SHOWN = 60  # characters of a wrong value in a message


def strings_of(values: Iterable[str] | str, name: str) -> list[str]:
    """A list of strings (ids, names, texts); one string is a list of one. ``name`` is the argument's, for messages.

    Raises:
        InputError: the values cannot be listed, or one of them is not a string of valid Unicode.
    """
    strings = _listed(values, name, str)
    for index, value in enumerate(strings):
        _check_strings(index, value, name=name)
    return cast("list[str]", strings)


def texts_of(values: Iterable[str], name: str = "texts") -> list[str]:
    """``strings_of`` for functions that return something for each text, where one string must be put in a list.

    Raises:
        InputError: it is one string, or as for ``strings_of``.
    """
    if isinstance(values, str):
        raise InputError(f"{name} is a single text; put it in a list: [text]")
    return strings_of(values, name)


def stream_of_texts(values: Iterable[str], name: str) -> Iterator[str]:
    """``texts_of`` for texts that are never in memory together; what is no list is refused at once."""
    if isinstance(values, str):
        texts_of(values, name)
    return _checked(_iterable(values, name), partial(_check_strings, name=name))


def stream_of_objects(values: Iterable[_Item], name: str, kind: type[Any]) -> Iterator[_Item]:
    """``objects_of`` for objects that are never in memory together, but for lists only."""
    return _checked(_iterable(values, name), partial(_check_kinds, name=name, kinds=(kind,)))


def pairs_of(values: Iterable[tuple[str, str]], name: str) -> tuple[tuple[str, str], ...]:
    """Pairs of strings.

    Raises:
        InputError: the values cannot be listed, or one of them is not a pair of strings.
    """
    pairs = [value.tolist() if hasattr(value, "tolist") else value for value in _listed(values, name)]  # of NumPy
    for index, value in enumerate(pairs):
        if isinstance(value, str) or not isinstance(value, Sequence) or len(cast("Sequence[object]", value)) != 2:
            raise InputError(f"{name}[{index}] is {shown(value)}, but must be a pair of two strings")
        for item in cast("Sequence[object]", value):
            check_string(item, f"a part of {name}[{index}]")
    return tuple((first, second) for first, second in pairs)


def paths_of(values: Iterable[str | Path] | str | Path, name: str) -> list[Path]:
    """A list of paths; one path is a list of one.

    Raises:
        InputError: the values cannot be listed, or one of them is not a path.
    """
    paths = _listed(values, name, str, os.PathLike)
    for index, value in enumerate(paths):
        path_of(value, f"{name}[{index}]")
    return [Path(path) for path in paths]


def path_of(value: object, name: str) -> Path:
    """A path, such as a folder.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, str | os.PathLike) or "\0" in str(cast(object, value)):
        raise InputError(f"{name} is {shown(value)}, but must be a path")
    return Path(cast("str | os.PathLike[str]", value))


def objects_of(values: Iterable[_Item] | _Item, name: str, kind: type[Any] | tuple[type[Any], ...]) -> list[_Item]:
    """A list of objects of one kind; one object is a list of one.

    Raises:
        InputError: the values cannot be listed, or one of them is something else.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    objects = _listed(values, name, *kinds)
    for index, value in enumerate(objects):
        _check_kinds(index, value, name=name, kinds=kinds)
    return cast("list[_Item]", objects)


def check_kind(value: object, name: str, *kinds: type[Any]) -> None:
    """Check that a value is an object of one of some kinds.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{name} is {shown(value)}, but must be {'an' if names[0] in 'AEIOU' else 'a'} {names}")


def check_count(value: object, name: str, least: int = 1, *, optional: bool = False) -> None:
    """Check that a value is a whole number, and not below ``least``; with ``optional``, or None.

    Raises:
        InputError: it is not.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {shown(value)}, but must be a whole number")
    if value < least:
        raise InputError(f"{name} is {value}, but must be at least {least}")


def check_string(value: object, name: str) -> None:
    """Check that a value is a string of valid Unicode.

    Raises:
        InputError: it is something else.
    """
    if is_text(value):
        return
    if isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}, which is not valid Unicode text (it has half of a surrogate pair)")
    remedy = f"; write {str(value)!r}" if type(value) is int else ""
    raise InputError(f"{name} is {shown(value)}, but must be a string{remedy}")


def check_choice(value: object, name: str, choices: Iterable[str]) -> None:
    """Check that a value is one of some names.

    Raises:
        InputError: it is something else.
    """
    choices = tuple(choices)
    if value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise InputError(f"{name} is {shown(value)}, but must be {' or '.join(map(repr, choices))}{hint}")


def shown(value: object) -> str:
    """A value with its type, for messages."""
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} ({type(value).__name__})"


def list_of(values: Iterable[_Item], name: str) -> list[_Item]:
    """A list of anything, without a check of its entries.

    Raises:
        InputError: the values cannot be listed.
    """
    return list(_iterable(values, name))


def _listed(values: object, name: str, *kinds: type[Any]) -> list[Any]:
    return [values] if isinstance(values, kinds) else list(_iterable(values, name))


def _iterable(values: object, name: str) -> Iterable[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {shown(cast(object, values))}; give a list")
    return cast("Iterable[Any]", values)


def _checked(values: Iterable[_Item], check: Callable[[int, object], None]) -> Iterator[_Item]:
    for index, value in enumerate(values):
        check(index, value)
        yield value


def _check_strings(index: int, value: object, *, name: str) -> None:
    check_string(value, f"{name}[{index}]")


def _check_kinds(index: int, value: object, *, name: str, kinds: tuple[type[Any], ...]) -> None:
    check_kind(value, f"{name}[{index}]", *kinds)
