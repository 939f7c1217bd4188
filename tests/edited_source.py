"""Runs Python with edits of d2llm's source files, to show that an addition needs no further file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

Edits = Mapping[str, Sequence[tuple[str, str]] | str]
"""Module -> pairs of a text that is in it once, and of what replaces it; or the source of a new module."""


class _Edited(SourceFileLoader):
    """A module with changes."""

    def __init__(self, name: str, path: str, changes: Sequence[Sequence[str]]) -> None:
        super().__init__(name, path)
        self._changes = changes

    def get_code(self, fullname: str) -> Any:
        source = Path(self.path).read_text(encoding="utf-8")
        for old, new in self._changes:
            assert source.count(old) == 1, f"{fullname}: {old!r} is there {source.count(old)} times"
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds edited modules, and new ones in a folder for each package beside the edits."""

    def __init__(self, edits: Mapping[str, Any], folder: Path) -> None:
        self._edits, self._folder = edits, folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        new, edit = self._folder / fullname, self._edits.get(fullname)
        if isinstance(edit, str) or (edit is None and not new.is_dir()):
            return None
        found = PathFinder.find_spec(fullname, path, target)
        assert found is not None
        if edit is not None:
            assert found.origin is not None
            found = importlib.util.spec_from_file_location(
                fullname,
                found.origin,
                loader=_Edited(fullname, found.origin, edit),
                submodule_search_locations=found.submodule_search_locations,
            )
        if new.is_dir():
            found.submodule_search_locations = [*found.submodule_search_locations, str(new)]
        return found


def run_edited(edits: Edits, code: str, *arguments: object) -> str:
    """What a program prints in a process in which, and below which, d2llm is edited; ``arguments`` are in sys.argv."""
    with tempfile.TemporaryDirectory() as folder:
        for module, edit in edits.items():
            if isinstance(edit, str):
                package, _, name = module.rpartition(".")
                (Path(folder) / package).mkdir(exist_ok=True)
                (Path(folder) / package / f"{name}.py").write_text(edit, encoding="utf-8")
        (Path(folder) / "edits.json").write_text(json.dumps(edits), encoding="utf-8")
        (Path(folder) / "sitecustomize.py").write_text("import edited_source; edited_source.install(__file__)\n")
        path = os.pathsep.join([folder, str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
        )
    assert result.returncode == 0, result.stderr
    return result.stdout


def install(beside: str) -> None:
    """Edit modules that are imported from now on."""
    folder = Path(beside).parent
    sys.meta_path.insert(0, _Finder(json.loads((folder / "edits.json").read_text(encoding="utf-8")), folder))
