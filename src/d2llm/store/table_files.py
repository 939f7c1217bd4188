"""Checksums of the files of an index's table: LanceDB has none of its own, and trusts the bytes that it reads.

INDEX/
  checksums.json     the last committed version, and the size and checksums of every file (``checksums``)
  write.unfinished   exists while a writer is running, and after a killed writer

A change is committed when ``checksums.json`` names its version: LanceDB commits first, then the checksums of the new
files are computed and ``checksums.json`` is replaced. Readers open the version that it names, so no reader sees the
state between the two commits. If a writer was killed there, the next one takes the lock, compares all known files, and
adopts the version. The files of a table never change, so a checksum is computed once and carried over from then on; it
is never recomputed for a file that has one, because that would legitimise damage.

Opening a version compares the sizes of all its files, the manifest, the last block of each file, and a random sample of
other blocks up to 8 MiB, which covers a small index completely. Indices are compared completely before their first use
(``check_indices``); everything is compared by ``verify``, before rows are copied, and after a crash.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from d2llm.core.errors import DamagedFileError
from d2llm.core.files import MANIFEST_NAME
from d2llm.store.checksums import (
    RECORD_NAME,
    TABLE_FOLDER,
    Damage,
    FileState,
    FileSums,
    Record,
    problem_of,
    read_record,
    remedy_for,
    sample_blocks,
    state_of,
    take_sums,
    unreadable,
    write_record,
)
from d2llm.store.lance_manifest import VersionFiles, files_named, manifests
from d2llm.store.storage import link_or_copy

UNFINISHED_NAME = "write.unfinished"
_FOLDERS = ("data", "_deletions", "_indices", "_versions")
_WAIT_S, _POLL_SECONDS = 10.0, 0.02  # wait for a writer that has removed old versions and is about to commit

_log = logging.getLogger(__name__)


class TableFiles:
    """The files of the table in an index's folder. ``begin``, ``commit`` and ``end`` require the write lock.

    Methods that read raise a ``DamagedFileError`` for a file that is missing or not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = folder / TABLE_FOLDER
        self.expected = True
        """Whether the table must have checksums; False while ``repair`` replaces lost ones."""
        self.after_crash = False
        self.ignored: frozenset[str] = frozenset()
        """Paths that are not compared because they are about to be replaced (``repair``)."""
        self._trusting = False
        self._unfinished = folder / UNFINISHED_NAME
        self._record: tuple[FileState, Record] | None = None
        self._compared: dict[str, tuple[FileState, bool]] = {}  # state when compared, and whether all blocks were

    # Reading -------------------------------------------------------------------------------------------------------

    def record(self) -> Record | None:
        """The current checksums; None if they are ignored, or lost and about to be replaced."""
        path = self.folder / RECORD_NAME
        if self._trusting:
            return None
        try:
            state = state_of(path)
            if self._record is None or self._record[0] != state:
                self._record = state, read_record(self.folder)
            return self._record[1]
        except FileNotFoundError:
            self._record = None
            if self.expected:
                raise self._damaged(RECORD_NAME, "is missing") from None
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._damaged(RECORD_NAME, f"cannot be used ({error})") from error

    @contextmanager
    def unchecked(self) -> Generator[None]:
        """Ignore checksums, to inspect a table that has lost them."""
        self._trusting = True
        try:
            yield
        finally:
            self._trusting = False

    def is_unfinished(self) -> bool:
        """Whether a writer is running or was killed."""
        return self._unfinished.exists()

    def latest(self) -> int | None:
        """The version that readers open; None if there are no versions."""
        end = time.monotonic() + _WAIT_S
        while True:
            unfinished, versions, record = self.is_unfinished(), manifests(self.table), self.record()
            newest = next(iter(versions), None)
            if record is None:
                return newest
            if newest is None or newest <= record.version or (unfinished and record.version in versions):
                return record.version
            if unfinished and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            elif self.is_unfinished() == unfinished and self.record() is record:
                writers = "by LanceDB directly, or by a writer that is still running"
                _log.warning("%s: version %d has no checksums; it was written %s", self.folder, newest, writers)
                return newest

    def ready(self, version: int | None = None, *, whole: bool = False) -> int | None:
        """The version to open, the latest by default, after comparing its files with their checksums.

        ``whole``: compare every byte, not only samples.
        """
        while True:
            number, record = self.latest() if version is None else version, self.record()
            if number is None:
                return None
            try:
                self.check(number, whole=whole)
                return number
            except DamagedFileError:
                if self.record() is record:
                    raise  # otherwise a writer has committed in the meantime and removed old files

    def check(self, version: int, *, whole: bool = False) -> None:
        """Compare the files of a version with their checksums; one that LanceDB wrote directly has none."""
        record, named = self.record(), self.named(version)
        if record is not None and named is not None:
            paths = [MANIFEST_NAME, *self._paths(record.files, named.needed)]
            self._compare(record, version, paths, whole=whole or self.after_crash)

    def check_indices(self, version: int, names: Collection[str]) -> None:
        """Compare the indices of these names completely, before they are used."""
        record, named = self.record(), self.named(version)
        if record is not None and named is not None:
            needed = [path for name, paths in named.indices.items() if name in names for path in paths]
            self._compare(record, version, self._paths(record.files, needed), whole=True)

    def indices_of(self, version: int, paths: Collection[str] | None = None) -> list[str]:
        """The names of the indices of a version; if ``paths`` are given, only of indices that these files belong to."""
        indices = self.parsed(f"{TABLE_FOLDER}/{manifests(self.table)[version]}").indices
        return [name for name, needed in indices.items() if paths is None or self._paths(paths, needed)]

    def damages(self) -> list[Damage]:
        """Every damaged file that some version needs; all bytes are compared."""
        while True:
            record = self.record()
            damages = [] if record is None else list(self._damages(record))
            if not damages or self.record() is record:
                return damages

    def files_of(self, version: int) -> list[str]:
        """The files that a version needs, as paths in the index's folder."""
        manifest = manifests(self.table).get(version)
        if manifest is None:
            raise self._damaged(TABLE_FOLDER, f"has no version {version}")
        named = self.parsed(f"{TABLE_FOLDER}/{manifest}")
        present = [*self._existing_files(), f"{TABLE_FOLDER}/{named.transaction}"]
        return [f"{TABLE_FOLDER}/{manifest}", *self._paths(present, [*named.needed, named.transaction])]

    def link(self, version: int, target: Path) -> None:
        """Copy a version and its checksums into another folder by hard links, which take no space.

        The files of a table never change, so neither does the copy. If links are impossible, files are copied.
        """
        self.check(version, whole=True)
        paths, record = self.files_of(version), self.record()
        for path in paths:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(self.folder / path, target / path)
        copy, known = TableFiles(target), {} if record is None else record.files
        copy.replace(Record(version, {path: known[path] for path in paths if path in known}))
        copy.commit()

    # Writing -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Mark the start of a write; after a killed writer, compare everything and adopt what it committed.

        Damage is only logged here and reported when the table is opened, so that a repair can get the lock.
        """
        self.after_crash = self.is_unfinished()
        if not self.after_crash:
            self._unfinished.touch()
        try:
            record, newest = self.record(), next(iter(manifests(self.table)), None)
            if newest is not None and record is not None and newest > record.version:
                self.commit(undo=False)
            if self.after_crash and (record := self.record()) is not None:
                self.check(record.version, whole=True)
            self.after_crash = False
        except DamagedFileError as error:
            _log.warning("%s", error)

    def end(self) -> None:
        """Mark the end of a write, unless an uncommitted version or an unhandled crash is left."""
        newest = next(iter(manifests(self.table)), 0)
        if not self.after_crash and (self._record is None or newest <= self._record[1].version):
            self._unfinished.unlink(missing_ok=True)

    def commit(self, *, undo: bool = True) -> None:
        """Compute the checksums of new files, and make the table's newest version the one that readers open.

        ``undo``: if they cannot be written (``OSError``), remove the versions since the last commit.
        """
        before, versions = self.record(), manifests(self.table)
        if not versions:
            raise self._damaged(TABLE_FOLDER, "has no versions")
        known = {} if before is None else before.files
        version, manifest = next(iter(versions.items()))
        named = self.parsed(f"{TABLE_FOLDER}/{manifest}")
        try:
            files = {path: known[path] if path in known else self._take(path) for path in self._existing_files()}
            # Files that are named but missing are damage, which must stay on record.
            files |= {path: known[path] for path in self._paths(known, named.needed)}
            self.replace(Record(version, files))
        except OSError:
            if undo and before is not None and before.version in versions:
                for number in versions:
                    if number > before.version:
                        (self.table / versions[number]).unlink()
            raise

    def replace(self, record: Record) -> None:
        """Write a new record."""
        write_record(self.folder, record)
        self._record = state_of(self.folder / RECORD_NAME), record

    def remove_older(self, keep: timedelta) -> None:
        """Remove versions older than ``keep`` and the files that only they need. The latest version is always kept.

        LanceDB could do this in the call that joins files, but then the version that readers open would be gone before
        its successor is committed. So it is done here, afterwards.
        """
        versions = manifests(self.table)
        named = {
            version: self.named(version) or self.parsed(f"{TABLE_FOLDER}/{path}") for version, path in versions.items()
        }
        end = time.time() - keep.total_seconds()
        old = [version for version in sorted(versions)[:-1] if named[version].seconds <= end]
        if not old:
            return
        kept = {path for version, each in named.items() if version not in old for path in each.all_files}
        for version in old:  # first, so that no reader opens a version with missing files
            (self.table / versions[version]).unlink()
        for path in {path for version in old for path in named[version].all_files} - kept:
            place = self.table / path
            for file in place.iterdir() if path.endswith("/") else (place,):
                file.unlink(missing_ok=True)
            if path.startswith("_indices/") and place.parent.exists() and not any(place.parent.iterdir()):
                place.parent.rmdir()
        self.commit()

    # Parts ---------------------------------------------------------------------------------------------------------

    def _damages(self, record: Record) -> Iterator[Damage]:
        needed: dict[str, list[int]] = {MANIFEST_NAME: []}
        for version in dict.fromkeys([record.version, *manifests(self.table)]):
            manifest = record.manifest_of(version)
            if manifest is None:
                continue
            needed[manifest] = [version]
            problem = problem_of(self.folder / manifest, record.files[manifest])
            if problem is None:
                try:
                    for path in self._paths(record.files, self.parsed(manifest).needed):
                        needed.setdefault(path, []).append(version)
                except DamagedFileError as error:
                    yield Damage(manifest, error.problem, [version])
        for path, versions in needed.items():
            if path in record.files and (problem := problem_of(self.folder / path, record.files[path])) is not None:
                yield Damage(path, problem, versions)

    def named(self, version: int) -> VersionFiles | None:
        """The files that a version needs, from its verified manifest; None if it has no checksums or was removed."""
        record = self.record()
        manifest = None if record is None else record.manifest_of(version)
        if record is None or manifest is None:
            return None
        if version != record.version and not (self.folder / manifest).exists():
            return None
        self._compare(record, version, [manifest], whole=True)
        return self.parsed(manifest)

    def parsed(self, path: str) -> VersionFiles:
        """The files that a manifest names, whether it has a checksum or not."""
        try:
            return files_named((self.folder / path).read_bytes())
        except (OSError, ValueError, LookupError) as error:
            raise self._damaged(path, f"cannot be read ({error})") from error

    def _paths(self, known: Collection[str], needed: Iterable[str]) -> list[str]:
        """The ``needed`` paths of the table that are ``known``, as paths in the index's folder."""
        paths = [f"{TABLE_FOLDER}/{path}" for path in needed if path]
        folders = tuple(path for path in paths if path.endswith("/"))
        inside = [path for path in known if path.startswith(folders)] if folders else []
        return [path for path in (*paths, *inside) if path in known]

    def _compare(self, record: Record, version: int, paths: Iterable[str], *, whole: bool) -> None:
        """Compare files of a version with their checksums; files that this object has already compared are skipped."""
        left: dict[str, FileSums] = {}
        states: dict[str, FileState] = {}
        for path in paths:
            if path not in record.files or path in self.ignored:
                continue
            try:
                states[path] = state_of(self.folder / path)
            except OSError as error:
                raise self._damaged(path, unreadable(error), version, record) from error
            known = self._compared.get(path)
            if known is None or known[0] != states[path] or (whole and not known[1]):
                left[path] = record.files[path]
        blocks: Mapping[str, Collection[int]]
        blocks = {path: range(sums.num_blocks) for path, sums in left.items()} if whole else sample_blocks(left)
        for path, sums in left.items():
            problem = problem_of(self.folder / path, sums, blocks[path])
            if problem is not None:
                raise self._damaged(path, problem, version, record)
            self._compared[path] = states[path], len(blocks[path]) == sums.num_blocks

    def _take(self, path: str) -> FileSums:
        state = state_of(self.folder / path)
        sums = take_sums(self.folder / path)
        self._compared[path] = state, True
        return sums

    def _existing_files(self) -> list[str]:
        """The files of the table that a search may read, and the manifest of the index."""
        files = [self.folder / MANIFEST_NAME]
        for name in _FOLDERS:
            files += (self.table / name).rglob("*.manifest" if name == "_versions" else "*")
        return [path.relative_to(self.folder).as_posix() for path in files if path.is_file()]

    def _damaged(self, path: str, problem: str, version: int = 0, record: Record | None = None) -> DamagedFileError:
        if record is not None and version < record.version:
            problem += f" (it is needed by version {version}, an earlier one: refresh or open the index again)"
        return DamagedFileError(self.folder / path, f"{problem}; {remedy_for(path)}")
