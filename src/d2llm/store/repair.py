"""Repair of damaged files of a table; requires the write lock.

A file that is intact in a snapshot is taken from there. Indices are rebuilt from the rows. If rows are damaged, the
table can go back to the last intact version, which loses later changes, so this is done only on request. Texts that are
in no version and no snapshot are lost.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from d2llm.core.errors import DamagedFileError
from d2llm.core.files import MANIFEST_NAME
from d2llm.store.checksums import RECORD_NAME, TABLE_FOLDER, Damage, Record, problem_of, take_sums
from d2llm.store.lance_manifest import manifest_name, manifests
from d2llm.store.passage_table import PassageTable
from d2llm.store.storage import storage_errors
from d2llm.store.table_files import TableFiles

_log = logging.getLogger(__name__)
_NEW, _OLD, _TAKEN = ".passages.new", ".passages.old", ".passages.file"


def repair_files(files: TableFiles, others: Iterable[Path], *, go_back: bool = False) -> list[str]:
    """Repair a table that has checksums as far as possible; returns messages about what was done.

    ``others`` are folders of indices that share files with it, such as its snapshots. ``go_back``: if passages are
    damaged, return to the last intact version.

    Raises:
        StorageError: a file cannot be written.
    """
    with storage_errors(files.folder):
        done = list(_take_from_others(files, list(others)))
        damages = _damages_of_latest(files)
        if damages and all("/_indices/" in damage.path for damage in damages):
            _rebuild_indices(files, [damage.path for damage in damages])
            done.append(f"{len(damages)} of the table's files were damaged indices, which were rebuilt")
        elif damages and (version := _last_whole(files)) is not None:
            if go_back:
                lost = _go_back(files, version)
                _build_indices(files)  # the version may be older than the indices
                done.append(
                    f"the table is back at version {version}, the last intact one; the changes of "
                    f"{_listed(lost)} are lost: apply them again"
                )
            else:
                done.append(
                    f"version {version} is the last intact one; `d2llm index ... verify --repair --go-back` returns "
                    "to it and loses later changes"
                )
        if not _damages_of_latest(files):
            if gone := _forget_earlier(files):
                done.append(f"earlier versions of the table were damaged and were removed: {_listed(gone)}")
            files.after_crash = False
    return done


def rebuild_record(files: TableFiles) -> None:
    """New checksums for a table that has lost them, after its rows were compared with their own hashes.

    Its indices cannot be checked, so they are rebuilt.
    """
    with storage_errors(files.folder):
        (files.folder / RECORD_NAME).unlink(missing_ok=True)
        expected, files.expected = files.expected, False
        try:
            table = PassageTable.open(files.folder, None, files)
            table.drop_indices(files.indices_of(table.version))
            _build_indices(files)
        finally:
            files.expected = expected
        files.after_crash = False


def replace_if_damaged(files: TableFiles, source: TableFiles) -> None:
    """Replace a damaged table by that of a snapshot; a table that can be opened is kept.

    If this is killed halfway, the index cannot be opened until the snapshot is restored again.

    Raises:
        DamagedFileError: the snapshot is damaged too, or the index's manifest is.
        StorageError: the table cannot be written.
    """
    try:
        files.ready()
    except DamagedFileError as error:
        if error.path.name == MANIFEST_NAME:
            raise
        _log.warning("%s; it is replaced by the snapshot's table", error)
        _replace_table(files, source)


def _replace_table(files: TableFiles, source: TableFiles) -> None:
    draft, old = files.folder / _NEW, files.folder / _OLD
    with storage_errors(files.folder):
        version = source.latest()
        sweep(files.folder)
        draft.mkdir()
        source.link(version or 0, draft)
        if files.table.exists():
            files.table.rename(old)
        (draft / TABLE_FOLDER).rename(files.table)
        record = TableFiles(draft).record()
        manifest = {MANIFEST_NAME: take_sums(files.folder / MANIFEST_NAME)}
        files.replace(Record(version or 0, manifest if record is None else {**record.files, **manifest}))
        files.after_crash = False
        sweep(files.folder)


def sweep(folder: Path) -> None:
    """Remove leftovers of an interrupted repair from the folder of an index."""
    for name in (_NEW, _OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / _TAKEN).unlink(missing_ok=True)


def _damages_of_latest(files: TableFiles) -> list[Damage]:
    record = files.record()
    return [damage for damage in files.damages() if not damage.versions or (record and record[0] in damage.versions)]


def _take_from_others(files: TableFiles, others: list[Path]) -> Iterator[str]:
    record = files.record()
    if record is None:
        return
    for path, _, _ in files.damages():
        source = next((each for each in others if problem_of(each / path, record.files[path]) is None), None)
        if source is not None:
            shutil.copy2(source / path, files.folder / _TAKEN)
            (files.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (files.folder / _TAKEN).replace(files.folder / path)
            yield f"{path} was taken from {source.name!r}"


def _rebuild_indices(files: TableFiles, damaged: Collection[str]) -> None:
    files.ignored = frozenset(damaged)  # they are not read again
    try:
        table = PassageTable.open(files.folder, None, files)
        table.drop_indices(files.indices_of(table.version, damaged))
        _build_indices(files)
    finally:
        files.ignored = frozenset()


def _build_indices(files: TableFiles) -> None:
    table = PassageTable.open(files.folder, None, files)
    if len(table):
        table.build_indices()


def _last_whole(files: TableFiles) -> int | None:
    record = files.record()
    earlier = [] if record is None else [each for each in manifests(files.table) if each < record.version]
    return next((version for version in earlier if record is not None and _is_whole(files, record, version)), None)


def _go_back(files: TableFiles, version: int) -> list[int]:
    """Make an earlier version the latest; returns the versions that are lost."""
    record = files.record()
    known = [*manifests(files.table), *([] if record is None else [record.version])]
    lost = sorted({number for number in known if number > version})
    _forget(files, lost, version)
    return lost


def _is_whole(files: TableFiles, record: Record, version: int) -> bool:
    if record.manifest_of(version) is None:
        return False
    try:
        files.check(version, whole=True)
    except DamagedFileError:
        return False
    return True


def _forget_earlier(files: TableFiles) -> set[int]:
    record = files.record()
    damaged = {version for damage in files.damages() for version in damage.versions}
    if damaged and record is not None:
        _forget(files, damaged, record.version)
    return damaged


def _forget(files: TableFiles, versions: Collection[int], latest: int) -> None:
    """Remove the manifests of versions and their checksums, because their names may be reused."""
    record, paths = files.record(), manifests(files.table)
    for version in versions:
        if version in paths:
            (files.table / paths[version]).unlink()
    gone = {f"{TABLE_FOLDER}/{manifest_name(version)}" for version in versions}
    if record is not None:
        files.replace(Record(latest, {path: sums for path, sums in record.files.items() if path not in gone}))


def _listed(versions: Iterable[int]) -> str:
    numbers = sorted(versions)
    return f"version{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
