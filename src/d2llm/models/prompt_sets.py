"""Prompt sets: the TOML files that ship with d2llm have a section for each set, a user's file one for each use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.toml import read_toml


def read_prompt_section(
    name: str, use: str, *, folder: Path, keys: Sequence[str], optional: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """One section of a prompt set, and its place for errors.

    Args:
        name: a set that ships with d2llm (a section of ``<use>.toml``), or a TOML file of the user (section ``use``).
        use: what the prompt is for, such as a task.
        folder: where the files of shipped sets are.
        keys: the keys that the section must have, all of them strings.
        optional: keys that it may have.

    Raises:
        InputError: no such set or section, or other keys.
    """
    listed = ", ".join(keys)
    if name.endswith(".toml"):
        sections, where = read_toml(Path(name)), f"{name}: [{use}]"
        if use not in sections:
            raise InputError(f"{name}: no section [{use}]; add one with the keys {listed}")
        if not isinstance(sections[use], dict):
            raise InputError(f"{name}: '{use}' should be a table: write [{use}] and below it {listed}")
        section: dict[str, Any] = sections[use]
    else:
        sets, where = read_toml(folder / f"{use}.toml"), f"prompt set '{name}' ({use})"
        if name not in sets:
            raise InputError(f"no prompt set '{name}'; use one of {', '.join(sets)}, or the path of a TOML file")
        section = sets[name]
    if set(section) - set(optional) != set(keys):
        raise InputError(f"{where}: needs exactly the keys {listed}; found {', '.join(sorted(section))}")
    if not all(isinstance(section[key], str) for key in keys):
        names = " and ".join([*filter(None, [", ".join(keys[:-1])]), keys[-1]])
        raise InputError(f"{where}: {names} must be quoted {'strings' if len(keys) > 1 else 'text'}")
    return section, where
