"""Removing old versions of a table: for the holder of the write lock.

LanceDB can do it too, in the same call that joins files. What readers open would then be gone before the version that
takes its place is committed (``table_files``), so it is done here, afterwards.
"""

from __future__ import annotations

import time
from datetime import timedelta

from d2llm.store.checksum_record import TABLE_FOLDER
from d2llm.store.lance_manifest import VersionFiles, manifests
from d2llm.store.table_files import TableFiles


def remove_older(files: TableFiles, keep: timedelta) -> None:
    """Remove the versions older than ``keep``, and the files that only they need. The latest stays.

    Raises:
        DamagedFileError: a manifest is not what was written, so what it needs is not known.
        OSError: a file cannot be removed.
    """
    there = manifests(files.table)
    named = {version: files.named(version) or files.parsed(f"{TABLE_FOLDER}/{path}") for version, path in there.items()}
    end = time.time() - keep.total_seconds()
    old = [version for version in sorted(there)[:-1] if named[version].seconds <= end]
    if not old:
        return
    kept = {path for version, each in named.items() if version not in old for path in _all_of(each)}
    for version in old:  # first, so that nobody opens a version some of whose files are gone
        (files.table / there[version]).unlink()
    for path in {path for version in old for path in _all_of(named[version])} - kept:
        place = files.table / path
        for file in place.iterdir() if path.endswith("/") else (place,):
            file.unlink(missing_ok=True)
        if path.startswith("_indices/") and place.parent.exists() and not any(place.parent.iterdir()):
            place.parent.rmdir()
    files.commit()


def _all_of(named: VersionFiles) -> list[str]:
    return [*named.needed, *([named.transaction] if named.transaction else [])]
