"""Atomic writes: a reader sees either the old content of a file or the new, never a part of it.

A symbolic link stays, and what it leads to is replaced. Streams (pipes, devices, standard output) are opened and
written to, once all of the content is there; nothing is ever renamed over them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from d2llm.core.errors import D2LLMError, InputError
from d2llm.core.json_values import parse_json

TOO_LITTLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of a machine without enough disk, open files or memory."""
_TOLD_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)")
"""How libraries in Rust (safetensors, tokenizers) and ``shutil.copytree`` tell of an error of the system, in exceptions
that are no ``OSError``, or do not say which file it is."""

MANIFEST_NAME = "manifest.json"
STANDARD_INPUT, STANDARD_OUTPUT = Path("/dev/stdin"), Path("/dev/stdout")
"""What ``-`` stands for on the command line; they need not exist in ``/dev``."""
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(self|\d+))/fd/(\d+)")
_MAX_LINKS = 40  # as in Linux


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable: without it, a power cut may undo a rename or a removal."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # such as /proc/new
        raise InputError(f"{path}: this folder cannot be made; give another path") from error


def _sibling(path: Path, label: str) -> Path:
    # Not the tempfile module: only the owner can read its files, while these should follow the user's umask.
    return path.with_name(f".{path.name}.{label}-{secrets.token_hex(6)}")


def descriptor_of(path: Path) -> int | None:
    """The number of the open file that a path such as ``/dev/stdout`` or ``/dev/fd/63`` names, also through links."""
    name = path.absolute()
    for _ in range(_MAX_LINKS):
        try:
            for candidate in (name, name.parent.resolve() / name.name):
                descriptor = _STANDARD.get(candidate.as_posix())
                match = _DESCRIPTOR.fullmatch(candidate.as_posix())
                if match and match[1] in (None, "self", str(os.getpid())):
                    descriptor = int(match[2])
                if descriptor is not None:
                    return descriptor
            name = name.parent / name.readlink()
        except (OSError, RuntimeError):  # no link, or links that lead in a circle
            return None
    return None


def is_stream(path: Path) -> bool:
    """Whether a path names an open file, a pipe, a socket or a device, also through links, and no file or folder."""
    if descriptor_of(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def _opened_stream(path: Path, *, writing: bool) -> Generator[BinaryIO]:
    """A stream, open; errors name it. Standard input and output stay open, and what was printed before comes first."""
    descriptor = descriptor_of(path)
    standard = {0: sys.stdin, 1: sys.stdout, 2: sys.stderr}.get(-1 if descriptor is None else descriptor)
    try:
        if standard is not None and hasattr(standard, "buffer"):
            if writing:
                standard.flush()
            opened: Any = nullcontext(standard.buffer)
        elif descriptor is not None:
            opened = os.fdopen(os.dup(descriptor), "wb" if writing else "rb")
        else:
            opened = os.fdopen(os.open(path, os.O_WRONLY if writing else os.O_RDONLY), "wb" if writing else "rb")
        with opened as stream:
            yield cast(BinaryIO, stream)
            if writing:
                stream.flush()
    except OSError as error:
        if error.filename is not None or error.errno == errno.EPIPE:  # nobody reads on, which is no mistake
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def copy_of_stream(path: Path, folder: Path) -> Path:
    """Read a stream to its end into a new file in ``folder``, so that it can be read several times.

    The file is named after the stream if that has a name with a suffix, else standard-input with a hash of its content,
    so that another text is another document, and the suffix of its content: .jsonl, .html, .pdf or .txt; compressed
    content gets .gz as well.

    Raises:
        OSError: the stream cannot be read, or the file cannot be written.
    """
    copy, digest = folder / "standard-input", hashlib.sha256()
    with _opened_stream(path, writing=False) as stream, copy.open("xb") as file:
        while block := stream.read(1 << 20):
            digest.update(block)
            file.write(block)
    if descriptor_of(path) is None and path.suffix:
        return copy.rename(folder / path.name)
    with copy.open("rb") as file:
        start = file.read(1024)
    ending = ""
    if start.startswith(b"\x1f\x8b"):
        ending = ".gz"
        with suppress(zlib.error):  # damaged, as whoever reads it will say
            start = zlib.decompressobj(wbits=31).decompress(start, 1024)
    begins = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kinds = {b"{": ".jsonl", b"%pdf-": ".pdf", b"<!doctype html": ".html", b"<html": ".html"}
    found = next((kind for sign, kind in kinds.items() if begins.startswith(sign)), ".txt")
    return copy.rename(folder / f"{copy.name}-{digest.hexdigest()[:8]}{found}{ending}")


@contextmanager
def new_file(path: Path, *, mode: int | None = None) -> Generator[BinaryIO]:
    """Yield an open file that becomes ``path``, durably, if the block ends without an error.

    What a symbolic link leads to is replaced, and the link stays. To a stream (``is_stream``) the content is written.
    ``mode`` sets the file's permissions, such as 0o600 for a file that only its owner can read; None: by the umask.

    Raises:
        InputError: ``path`` is a symbolic link that leads to itself.
        OSError: it cannot be written; a full disk is named with ``path``.
    """
    if is_stream(path):
        with tempfile.TemporaryFile() as content:
            yield cast(BinaryIO, content)
            content.seek(0)
            with _opened_stream(path, writing=True) as stream:
                shutil.copyfileobj(content, stream)
        return
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link that leads to itself; delete it, or give another path")
    _make_folder(path.parent)
    temporary = _sibling(path, "new")
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                temporary.chmod(mode)  # while the file is empty, so that nobody else can open it first
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in TOO_LITTLE and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


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
            sync_directory(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _make_folder(target.parent)
    if not target.exists():
        source.rename(target)
        sync_directory(target.parent)
        return
    retired = _sibling(target, "old")
    target.rename(retired)
    try:
        source.rename(target)
    except BaseException:
        retired.rename(target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def check_replaceable(target: Path, kind: str | None) -> None:
    """Check that ``new_folder(target, kind=kind)`` can write there, before hours of work that end with it.

    Raises:
        InputError: ``target`` is a file or stream, or holds files that d2llm did not write or another kind of artifact.
    """
    if str(target) == "-" or is_stream(target):
        raise InputError(f"{target}: a folder cannot be written to a pipe, a device or standard output; give a folder")
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
            existing_kind = parse_json(manifest.read_text(encoding="utf-8"))["kind"]
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
        OSError: it cannot be written; a full disk is named with ``target``.
    """
    check_replaceable(target, kind)
    target = target.resolve()
    _make_folder(target.parent)
    temporary = _sibling(target, "new")
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        is_named = isinstance(error, D2LLMError) or getattr(error, "filename", None) is not None
        told = None if is_named else _TOLD_ERROR.search(str(error))
        if told is not None and (code := int(told[1])) in TOO_LITTLE | {errno.EIO}:
            raise OSError(code, os.strerror(code), str(target)) from error
        raise


def folder_bytes(folder: Path) -> int:
    """Total bytes of all files in a folder; a file with several hard links counts once."""
    files = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(files.values())
