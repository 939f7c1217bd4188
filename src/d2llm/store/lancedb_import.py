"""LanceDB, imported without the client of a service that no index asks.

``import lancedb`` brings the package ``lance_namespace_urllib3_client``, whose ``__init__`` builds the validators of
some hundred HTTP calls with pydantic: more than half of the time that it takes to show a passage. LanceDB itself uses
its data classes alone, which are modules of their own. So its ``__init__`` is put off until a name of it is asked for:
who does ask, in the same process, gets the whole package as always.
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
    """The module ``lancedb``, which has no types."""
    with _IMPORTING:
        if "lancedb" not in sys.modules:
            put_off(_SERVICE_CLIENT)
        return importlib.import_module("lancedb")


def put_off(package: str) -> None:
    """Let a package's ``__init__`` run when a name of it is first asked for; its modules can be imported before.

    Nothing happens where the package is imported already, or not installed.
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
    """The ``__getattr__`` of a module (PEP 562) that runs it, and then has all of its names."""

    def __init__(self, module: ModuleType, loader: Any) -> None:
        self._module = module
        self._loader = loader

    def __call__(self, name: str) -> Any:
        with _IMPORTING:
            if self._module.__dict__.get("__getattr__") is self:
                del self._module.__dict__["__getattr__"]
                self._loader.exec_module(self._module)
        return getattr(self._module, name)
