"""Libraries that are imported when a test first uses them.

Every test process imports every test file. These libraries take up to seconds, and only the process that runs their
tests needs them.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


class LateModule:
    """Stands for a module, and imports it when one of its public names is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest looks at everything in a test file
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


def late_import(name: str, *, needs: str = "", reason: str = "") -> Any:
    """The module of this name (untyped), imported later; skips the test file if the library is not installed.

    ``needs`` is the library that the module needs, if it is not the module's own.
    """
    library = needs or name.partition(".")[0]
    if find_spec(library) is None:
        pytest.skip(reason or f"needs {library}", allow_module_level=True)
    return LateModule(name)
