"""Checksums of the files of an index's table: LanceDB has none of its own, and trusts the bytes that it reads.

INDEX/
  checksums.json     the version that was committed last; of every file its size and checksums (``checksums``)
  write.unfinished   there while a writer is at work, and after one that was killed

A change is committed when ``checksums.json`` names its version: LanceDB commits first, then the checksums of the files
that came with it are taken and the file is replaced. Readers open the version that it names, so nobody sees one between
the two commits. After a writer that was killed there, the next one takes the lock, compares all that was known,
and takes the version over. The files of a table never change, so a checksum is taken once and carried over from then
on; it is never taken again from a file that had one, or damage would be made official.

Opening a version compares the sizes of all of its files, the manifest, every last block and others at random up to 8
MiB, which is all of a small index. Indices are compared wholly before they are first used (``check_indices``),
everything by ``verify``, before rows are copied, and after a crash.
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
_WAIT_S, _LOOK_S = 10.0, 0.02  # for a writer that has removed old versions and is about to commit

_log = logging.getLogger(__name__)


class TableFiles:
    """The files of the table in an index's folder. ``begin``, ``commit`` and ``end`` are for the holder of the lock."""

    def __init__(self, folder: Path, *, expected: bool = False) -> None:
        """Args: ``expected``, whether the index must have checksums; one of an earlier d2llm need not."""
        self.folder = folder
        self.table = folder / TABLE_FOLDER
        self.expected = expected
        self.after_crash = False
        self.ignored: frozenset[str] = frozenset()
        """Paths that are not compared, because they are about to be replaced (``repair``)."""
        self._trusting = False
        self._unfinished = folder / UNFINISHED_NAME
        self._record: tuple[FileState, Record] | None = None
        self._compared: dict[str, tuple[FileState, bool]] = {}  # how files were then, and whether all was compared

    # Reading -------------------------------------------------------------------------------------------------------

    def record(self) -> Record | None:
        """The checksums as they are now; None where the index has none.

        Raises:
            DamagedFileError: they cannot be read, or are missing where there must be some.
        """
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
        """As if there were no checksums: for a look at a table that has lost them."""
        self._trusting = True
        try:
            yield
        finally:
            self._trusting = False

    def is_unfinished(self) -> bool:
        """Whether a writer is at work, or was killed."""
        return self._unfinished.exists()

    def latest(self) -> int | None:
        """The version that readers open; None if there is none.

        Raises:
            DamagedFileError: the checksums cannot be read.
        """
        end = time.monotonic() + _WAIT_S
        while True:
            unfinished, versions, record = self.is_unfinished(), manifests(self.table), self.record()
            newest = next(iter(versions), None)
            if record is None:
                return newest
            if newest is None or newest <= record.version or (unfinished and record.version in versions):
                return record.version
            if unfinished and time.monotonic() < end:
                time.sleep(_LOOK_S)
            elif self.is_unfinished() == unfinished and self.record() is record:
                who = "an earlier d2llm, by LanceDB alone or by a writer that is still at work"
                _log.warning("%s: version %d has no checksums; it was written by %s", self.folder, newest, who)
                return newest

    def ready(self, version: int | None = None, *, whole: bool = False) -> int | None:
        """The version to open, the latest by default, after its files were compared with their checksums.

        Args:
            version: which; None, the latest.
            whole: compare every byte, not samples alone.

        Raises:
            DamagedFileError: a file is not what was written.
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
                    raise  # else a writer has gone on meanwhile, and old files went

    def check(self, version: int, *, whole: bool = False) -> None:
        """Compare the files of a version with their checksums, those that have some. Raises as ``ready`` does."""
        record, named = self.record(), self.named(version)
        if record is not None and named is not None:
            paths = [MANIFEST_NAME, *self._paths(record.files, named.needed)]
            self._compare(record, version, paths, whole=whole or self.after_crash)

    def check_indices(self, version: int, names: Collection[str]) -> None:
        """Compare all of the indices of these names, before they are used. Raises as ``ready`` does."""
        record, named = self.record(), self.named(version)
        if record is not None and named is not None:
            needed = [path for name, paths in named.indices.items() if name in names for path in paths]
            self._compare(record, version, self._paths(record.files, needed), whole=True)

    def indices_of(self, version: int, paths: Collection[str] | None = None) -> list[str]:
        """The names of the indices of a version, of those that some files belong to where ``paths`` are given.

        Raises:
            DamagedFileError: its manifest cannot be read.
        """
        indices = self.parsed(f"{TABLE_FOLDER}/{manifests(self.table)[version]}").indices
        return [name for name, needed in indices.items() if paths is None or self._paths(paths, needed)]

    def damages(self) -> list[Damage]:
        """Every file that a version needs and that is not what was written; all of it is compared."""
        while True:
            record = self.record()
            damages = [] if record is None else list(self._damages(record))
            if not damages or self.record() is record:
                return damages

    def files_of(self, version: int) -> list[str]:
        """The paths in the index's folder of the files that a version needs.

        Raises:
            DamagedFileError: its manifest cannot be read.
        """
        manifest = manifests(self.table).get(version)
        if manifest is None:
            raise self._damaged(TABLE_FOLDER, f"has no version {version}")
        named = self.parsed(f"{TABLE_FOLDER}/{manifest}")
        present = [*self._files_there(), f"{TABLE_FOLDER}/{named.transaction}"]
        return [f"{TABLE_FOLDER}/{manifest}", *self._paths(present, [*named.needed, named.transaction])]

    def link(self, version: int, target: Path) -> None:
        """Put a version into another folder by hard links, which take no space, with its checksums.

        The files of a table never change, so the copy does not either. Where links are impossible, files are copied.

        Raises:
            DamagedFileError: one of its files is not what was written.
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
        """Say that a writer is at work; after one that was killed, compare everything and take over what it committed.

        Damage is left for those who open the table to report, so that a repair can get the lock.
        """
        self.after_crash = self.is_unfinished()
        if not self.after_crash:
            self._unfinished.touch()
        try:
            record, newest = self.record(), next(iter(manifests(self.table)), None)
            if newest is not None and (record is None or newest > record.version):
                self.commit(undo=False)
            if self.after_crash and (record := self.record()) is not None:
                self.check(record.version, whole=True)
            self.after_crash = False
        except DamagedFileError as error:
            _log.warning("%s", error)

    def end(self) -> None:
        """Say that the writer is done, unless a version is left that is not committed, or a crash not dealt with."""
        newest = next(iter(manifests(self.table)), 0)
        if not self.after_crash and (self._record is None or newest <= self._record[1].version):
            self._unfinished.unlink(missing_ok=True)

    def commit(self, *, undo: bool = True) -> None:
        """Take the checksums of the files that came, and make the table's newest version the one that readers open.

        Args:
            undo: where that fails, remove the versions that came since the last commit.

        Raises:
            DamagedFileError: the newest version cannot be read.
            OSError: the checksums cannot be written.
        """
        before, versions = self.record(), manifests(self.table)
        if not versions:
            raise self._damaged(TABLE_FOLDER, "has no versions")
        known = {} if before is None else before.files
        version, manifest = next(iter(versions.items()))
        named = self.parsed(f"{TABLE_FOLDER}/{manifest}")
        try:
            files = {path: known[path] if path in known else self._take(path) for path in self._files_there()}
            # Those that are named and missing are damage, which must not be forgotten.
            files |= {path: known[path] for path in self._paths(known, named.needed)}
            self.replace(Record(version, files))
        except OSError:
            if undo and before is not None and before.version in versions:
                for number in versions:
                    if number > before.version:
                        (self.table / versions[number]).unlink()
            raise

    def replace(self, record: Record) -> None:
        """Replace the record."""
        write_record(self.folder, record)
        self._record = state_of(self.folder / RECORD_NAME), record

    def remove_older(self, keep: timedelta) -> None:
        """Remove the versions older than ``keep``, and the files that only they need. The latest stays.

        LanceDB can do it too, in the same call that joins files. What readers open would then be gone before the
        version that takes its place is committed, so it is done here, afterwards.

        Raises:
            DamagedFileError: a manifest is not what was written, so what it needs is not known.
            OSError: a file cannot be removed.
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
        for version in old:  # first, so that nobody opens a version some of whose files are gone
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
        """What a version needs, its manifest compared; None where it has no checksums, or is an earlier one that went.

        Raises:
            DamagedFileError: the manifest is not what was written.
        """
        record = self.record()
        manifest = None if record is None else record.manifest_of(version)
        if record is None or manifest is None:
            return None
        if version != record.version and not (self.folder / manifest).exists():
            return None
        self._compare(record, version, [manifest], whole=True)
        return self.parsed(manifest)

    def parsed(self, path: str) -> VersionFiles:
        """What a manifest names, whether it has a checksum or not. Raises as ``named`` does."""
        try:
            return files_named((self.folder / path).read_bytes())
        except (OSError, ValueError, LookupError) as error:
            raise self._damaged(path, f"cannot be read ({error})") from error

    def _paths(self, known: Collection[str], needed: Iterable[str]) -> list[str]:
        """Those of the paths in the table that are known, as paths in the index's folder."""
        paths = [f"{TABLE_FOLDER}/{path}" for path in needed if path]
        folders = tuple(path for path in paths if path.endswith("/"))
        inside = [path for path in known if path.startswith(folders)] if folders else []
        return [path for path in (*paths, *inside) if path in known]

    def _compare(self, record: Record, version: int, paths: Iterable[str], *, whole: bool) -> None:
        """Compare files of a version with their checksums; what this object has compared before is left out.

        Raises:
            DamagedFileError: one is not what was written.
        """
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

    def _files_there(self) -> list[str]:
        """The files of the table that hold what a search reads, and the manifest of the index."""
        files = [self.folder / MANIFEST_NAME]
        for name in _FOLDERS:
            files += (self.table / name).rglob("*.manifest" if name == "_versions" else "*")
        return [path.relative_to(self.folder).as_posix() for path in files if path.is_file()]

    def _damaged(self, path: str, problem: str, version: int = 0, record: Record | None = None) -> DamagedFileError:
        if record is not None and version < record.version:
            problem += f" (version {version}, which needs it, is an earlier one: refresh or open the index again)"
        return DamagedFileError(self.folder / path, f"{problem}; {remedy_for(path)}")
