"""Public names of a package that are imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    namespace: dict[str, object], home_of: Mapping[str, str], *others: str
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package: ``home_of`` has the module of each name, ``others`` need none.

    ``__all__`` is there for ``from d2llm import *``, but not for pydoc: ``help(d2llm)`` would be the help of every
    class, on thousands of lines, in place of a page. Both only ask for ``__all__``, and a module has no other say in
    what they do with it, so what tells them apart is who asks.
    """
    names = sorted([*home_of, *others])

    def get(name: str) -> object:
        if name == "__all__" and sys._getframe(1).f_globals.get("__name__") != "pydoc":  # pyright: ignore[reportPrivateUsage]
            return names
        if name not in home_of:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(home_of[name]), name)
        return value

    return get, lambda: names.copy()
