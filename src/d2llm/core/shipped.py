"""Recipes that ship with d2llm, by name. They lie inside the package, so that an installed d2llm finds them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """Name -> TOML file, in the order of the names."""
    folder = Path(str(files("d2llm"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
