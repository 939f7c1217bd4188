"""Imports LanceDB without initialising an HTTP client that an index never uses.

``import lancedb`` imports the package ``lance_namespace_urllib3_client``. The ``__init__`` of that package builds
pydantic validators for about a hundred HTTP calls, which takes longer than everything else in ``d2llm index get``.
LanceDB uses only the package's data classes, which are in separate modules. So the ``__init__`` is deferred until one
of its names is accessed: other code in the same process can still use the whole package.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

_SERVICE_CLIENT = "lance_namespace_urllib3_client"
_IMPORTING = RLock()


def import_lancedb() -> Any:
    """The module ``lancedb`` (untyped)."""
    with _IMPORTING:
        if "lancedb" not in sys.modules:
            defer_import(_SERVICE_CLIENT)
        return importlib.import_module("lancedb")


def defer_import(package: str) -> None:
    """Defer a package's ``__init__`` until one of its names is first accessed; its modules can be imported before.

    Does nothing if the package is already imported or not installed.
    """
    if package in sys.modules:
        return
    spec = find_spec(package)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    module = module_from_spec(spec)
    module.__dict__["__getattr__"] = _Loading(module, spec.loader)
    sys.modules[package] = module


class _Loading:
    """A module ``__getattr__`` (PEP 562) that executes the module on first use."""

    def __init__(self, module: ModuleType, loader: Any) -> None:
        self._module = module
        self._loader = loader

    def __call__(self, name: str) -> Any:
        with _IMPORTING:
            if self._module.__dict__.get("__getattr__") is self:
                del self._module.__dict__["__getattr__"]
                self._loader.exec_module(self._module)
        return getattr(self._module, name)
