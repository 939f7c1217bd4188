"""Shards in object storage: written once, and copied into a cache folder when they are opened.

<URL>/files.json   paths of all files of the shard with their checksums (``FileSums``), and a checksum of this JSON
<URL>/...          the files of an index (``index_store``)

URLs are those of fsspec (``s3://bucket/path``, ``gs://...``, ``file:///...``). Each kind of storage needs its own
package, such as s3fs, which reads credentials as it always does. The manifest of the sharded index has the checksum of
the list of files, so that a shard that was replaced is noticed, and another version gets another cache folder.
"""

# pyright: reportUnknownParameterType=false, reportUnknownMemberType=false
# (fsspec ships no types)

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from platformdirs import user_cache_path

from d2llm.core.errors import DataFormatError, InputError, MissingExtraError
from d2llm.core.extras import require
from d2llm.core.files import new_folder
from d2llm.core.progress import progress_bar
from d2llm.store.checksums import FileSums, problem_of, read_checked, take_sums, write_checked
from d2llm.store.storage import LOCK_NAME, first_line

FILES_NAME = "files.json"
EXTRA = "object-storage"
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"}  # making them may need other rights
CACHE_VARIABLE = "D2LLM_SHARD_CACHE"
"""Environment variable with the folder for copies of shards; by default they are in the user's cache folder."""


def is_url(address: str) -> bool:
    """Whether the address of a shard is a URL, not a folder."""
    return "://" in address


def cache_folder() -> Path:
    """The folder for copies of shards from object storage."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else user_cache_path("d2llm") / "shards"


def upload_shard(folder: Path, url: str) -> str:
    """Copy the folder of a shard into object storage; returns the checksum of its list of files.

    The list is written last: an interrupted copy has none, and cannot be opened.

    Raises:
        InputError: the storage cannot be written.
        MissingExtraError: fsspec, or what it needs for this kind of storage, is not installed.
    """
    paths = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (LOCK_NAME, FILES_NAME)
    ]
    sums = {path: take_sums(folder / path) for path in paths}
    write_checked(folder / FILES_NAME, {"files": {path: [one.num_bytes, one.checksums] for path, one in sums.items()}})
    try:
        has_folders = url.partition("://")[0] not in _WITHOUT_FOLDERS
        with _storage(url, "written") as (system, root), progress_bar("copying a shard", len(paths) + 1) as advance:
            for path in [*paths, FILES_NAME]:
                target = f"{root}/{path}"
                if has_folders:
                    system.makedirs(target.rpartition("/")[0], exist_ok=True)
                system.put_file(str(folder / path), target)
                advance(1)
        return _checksum((folder / FILES_NAME).read_bytes())
    finally:
        (folder / FILES_NAME).unlink(missing_ok=True)


def fetch_shard(url: str, files: str, *, name: str) -> Path:
    """The cache folder with a copy of a shard, which is fetched if it is not there yet.

    Args:
        url: where the shard is.
        files: the checksum of its list of files.
        name: what the copy is called; its folder's name also has the checksum.

    Raises:
        InputError: the storage cannot be read.
        DataFormatError: files are missing or are not what was written.
        MissingExtraError: fsspec, or what it needs for this kind of storage, is not installed.
    """
    target = cache_folder() / f"{name}-{files}"
    if target.is_dir():
        return target
    with _storage(url, "read") as (system, root):
        content: bytes = system.cat_file(f"{root}/{FILES_NAME}")
        if _checksum(content) != files:
            problem = "is not the list of the files that were written there"
            raise DataFormatError(
                f"{url}/{FILES_NAME}", f"{problem}; copy the shard there again, or shard the index again"
            )
        with new_folder(target) as draft:
            (draft / FILES_NAME).write_bytes(content)
            listed: dict[str, Any] = read_checked(draft / FILES_NAME)["files"]
            with progress_bar("fetching a shard", len(listed)) as advance:
                for path, sums in listed.items():
                    file = draft / path
                    if not file.resolve().is_relative_to(draft.resolve()):
                        raise DataFormatError(f"{url}/{FILES_NAME}", f"names the file {path!r}, outside of the shard")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(f"{root}/{path}", str(file))
                    if (problem := problem_of(file, FileSums(*sums))) is not None:
                        raise DataFormatError(f"{url}/{path}", f"{problem}; copy the shard there again")
                    advance(1)
    return target


@contextmanager
def _storage(url: str, use: str) -> Generator[tuple[Any, str]]:
    """The file system of a URL and the path in it; errors of any kind of storage become one that names the URL."""
    fsspec = require("fsspec", extra=EXTRA, purpose="a shard in object storage")
    protocol = url.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(url)
        yield system, root.rstrip("/")
    except ImportError as error:
        raise MissingExtraError(
            f"{url}: fsspec needs another package for {protocol}:// ({first_line(error)})"
        ) from error
    except (InputError, MissingExtraError):
        raise
    except FileNotFoundError as error:
        problem = (
            "there is no shard, or a file of it is missing" if use == "read" else "there is no such bucket or folder"
        )
        remedy = f"check the address, or {'copy the shard there again' if use == 'read' else 'make it'}"
        raise InputError(f"{url}: {problem} ({first_line(error)}); {remedy}") from error
    except PermissionError as error:
        raise InputError(
            f"{url}: cannot be {use}, because access is denied ({first_line(error)}); check the credentials"
        ) from error
    except Exception as error:  # each kind of storage has its own
        problem = f"{url}: cannot be {use} ({type(error).__name__}: {first_line(error)})"
        raise InputError(f"{problem}; check the address, the credentials and the network") from error


def _checksum(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
