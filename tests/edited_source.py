"""Runs Python with edits of d2llm's source files, to show that an addition needs no further file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

Edits = dict[str, list[list[str]]]
"""Module -> pairs of a text that is in it once, and of what replaces it."""


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, changes: list[list[str]]) -> None:
        super().__init__(name, path)
        self._changes = changes

    def get_code(self, fullname: str) -> Any:
        source = Path(self.path).read_text(encoding="utf-8")
        for old, new in self._changes:
            assert source.count(old) == 1, f"{fullname}: {old!r} is there {source.count(old)} times"
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, edits: Edits) -> None:
        self._edits = edits

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self._edits:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(
            fullname,
            found.origin,
            loader=_Loader(fullname, found.origin, self._edits[fullname]),
            submodule_search_locations=found.submodule_search_locations,
        )


def run_edited(edits: Edits, code: str, *arguments: object) -> str:
    """What a program prints in a new process in which these modules are edited; it finds ``arguments`` in sys.argv."""
    start = f"import edited_source; edited_source.install({json.dumps(edits)!r})\n"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def install(edits: str) -> None:
    """Edit modules that are imported from now on."""
    sys.meta_path.insert(0, _Finder(json.loads(edits)))
