"""Atomic writes: a reader sees either the old content of a file or the new, never a part of it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from d2llm.core.errors import InputError

MANIFEST_NAME = "manifest.json"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path, label: str) -> Path:
    # Not the tempfile module: only the owner can read its files, while these should follow the user's umask.
    return path.with_name(f".{path.name}.{label}-{secrets.token_hex(6)}")


@contextmanager
def new_file(path: Path, *, mode: int | None = None) -> Generator[BinaryIO]:
    """Yield an open file that becomes ``path``, durably, if the block ends without an error.

    ``mode`` sets the file's permissions, such as 0o600 for a file that only its owner can read; None: by the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "new")
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                temporary.chmod(mode)  # while the file is empty, so that nobody else can open it first
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_bytes(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write ``content`` to ``path`` atomically (``new_file``)."""
    with new_file(path, mode=mode) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def replace_folder(source: Path, target: Path) -> None:
    """Move the finished folder ``source`` to ``target``, then remove the older folder that was there.

    The swap takes two renames. If the process is killed between them, there is no ``target``; the old content is then
    complete in ``.<name>.old-*`` beside it, and the new content in ``source``.
    """
    for path in (source, *source.rglob("*")):
        if path.is_dir():
            _sync_directory(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        source.rename(target)
        _sync_directory(target.parent)
        return
    retired = _sibling(target, "old")
    target.rename(retired)
    try:
        source.rename(target)
    except BaseException:
        retired.rename(target)
        raise
    _sync_directory(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def check_replaceable(target: Path, kind: str | None) -> None:
    """Check that ``new_folder(target, kind=kind)`` can write there, before hours of work that end with it.

    Raises:
        InputError: ``target`` is a file, or holds files that d2llm did not write or another kind of artifact.
    """
    if not target.exists():
        parent = next((folder for folder in target.absolute().parents if folder.exists()), None)
        if parent is not None and not parent.is_dir():
            raise InputError(f"{target}: {parent} is a file, not a folder; give another path")
        return
    if not target.is_dir():
        raise InputError(f"{target}: is a file, but a folder is needed there; give another path")
    manifest = target / MANIFEST_NAME
    if not manifest.is_file():
        if any(target.iterdir()):
            raise InputError(
                f"{target}: holds files that d2llm did not make, and they would be lost; give a new or empty folder"
            )
    elif kind is not None:
        try:
            existing_kind = json.loads(manifest.read_text(encoding="utf-8"))["kind"]
        except (ValueError, LookupError, TypeError):
            existing_kind = None
        if existing_kind != kind:
            raise InputError(f"{target}: holds a {existing_kind!r}, which a {kind!r} would replace; give another path")


@contextmanager
def new_folder(target: Path, *, kind: str | None = None) -> Generator[Path]:
    """Yield an empty temporary folder beside ``target`` that becomes ``target`` if the block ends without an error.

    Args:
        target: the final path; what d2llm wrote there before is replaced. Symbolic links are followed.
        kind: kind of artifact ("student", "index", ...); if given, only an artifact of the same kind is replaced.

    Raises:
        InputError: ``target`` is a file, or holds files that d2llm did not write or another kind of artifact. Nothing
            is changed.
    """
    target = target.resolve()
    check_replaceable(target, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target, "new")
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def folder_bytes(folder: Path) -> int:
    """Total bytes of all files in a folder; a file with several hard links counts once."""
    files = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(files.values())
