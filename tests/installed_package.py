"""A package as pip would leave it in a folder: a module and its metadata, with entry points."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.registry import Registry


def install(
    folder: Path, code: str, registry: Registry, entry_points: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write the package ``their-package`` with a module ``their_module`` into ``folder``, and import from there.

    ``entry_points`` are kind -> class of the module, in the registry's group.
    """
    info = folder / "their_package-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "their_module.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    lines = [f"{kind} = their_module:{name}" for kind, name in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.group}]", *lines]) + "\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "their_module", raising=False)
    monkeypatch.setattr(registry, "_plugins", None)  # as in a process that starts now
    for kind in entry_points:  # forgotten afterwards
        monkeypatch.setitem(registry._classes, kind, object)
        del registry._classes[kind]
