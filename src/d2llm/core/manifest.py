"""``manifest.json``: in every folder that d2llm writes, it says what the folder is and what made it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import DataFormatError
from d2llm.core.files import MANIFEST_NAME, write_json
from d2llm.core.json_values import parse_json

FILE_NAME = MANIFEST_NAME
_PACKAGES = ("d2llm", "torch", "transformers", "safetensors", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that affect results."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def source_of(artifact: str | Path) -> str:
    """Where an artifact can be loaded from again: the absolute path of its folder, or its name."""
    return str(Path(artifact).resolve()) if (Path(artifact) / FILE_NAME).is_file() else str(artifact)


def write_manifest(folder: Path, kind: str, format_version: int, content: dict[str, Any]) -> None:
    """Write the manifest of a ``kind`` of artifact ("student", "index", ...) into ``folder``, atomically.

    ``content`` cannot override ``kind``, ``format_version`` or ``packages``.
    """
    head = {"kind": kind, "format_version": format_version, "packages": package_versions()}
    write_json(folder / FILE_NAME, head | content | head)


def read_manifest(folder: Path, kind: str, format_version: int) -> dict[str, Any]:
    """Read the manifest of ``folder``.

    Raises:
        DataFormatError: there is none, it is not JSON, or it describes another kind or has another format version.
    """
    path = folder / FILE_NAME
    manifest = read_any_manifest(folder, kind)
    if manifest.get("kind") != kind:
        raise DataFormatError(path, f"describes a {manifest.get('kind')!r}, but a {kind!r} is needed here")
    check_format_version(path, manifest["format_version"], format_version)
    return manifest


def check_format_version(path: Path, found: int, readable: int) -> None:
    """Raise a ``DataFormatError`` unless a file has the one format version that this d2llm reads."""
    if found != readable:
        remedy = "update d2llm" if found > readable else "make it again with this d2llm"
        raise DataFormatError(path, f"has format version {found}, but this d2llm reads {readable}; {remedy}")


def read_any_manifest(folder: Path, kind: str = "") -> dict[str, Any]:
    """Read the manifest of ``folder``, whatever kind it describes; ``kind`` is only used in the error message.

    Raises:
        DataFormatError: there is none, or it is not JSON.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        advice = "check the path"
        if kind == "index" and folder.is_dir():
            advice += f", or index what is in it: d2llm index NEW.index sync {folder}"
        raise DataFormatError(path, f"not found, so {folder} is not a d2llm {kind} folder; {advice}")
    try:
        manifest: object = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(path, f"not valid JSON ({error}); restore or rebuild the folder") from error
    fields = cast("dict[str, Any]", manifest) if isinstance(manifest, dict) else {}
    if not isinstance(fields.get("format_version"), int):
        raise DataFormatError(path, "is not a d2llm manifest (no format version); check the path or rebuild the folder")
    return fields
