"""What ships inside the package, by name: recipes, students and tuned teachers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from d2llm.core.manifest import FILE_NAME


def shipped_recipes() -> dict[str, Path]:
    """Name -> TOML file, in the order of the names."""
    return {path.stem: path for path in sorted((_package() / "recipes").glob("*.toml"))}


def shipped_models(kind: Literal["students", "teachers"]) -> dict[str, Path]:
    """Name -> folder, in the order of the names."""
    return {path.parent.name: path.parent for path in sorted((_package() / kind).glob(f"*/{FILE_NAME}"))}


def _package() -> Path:
    return Path(str(files("d2llm")))
