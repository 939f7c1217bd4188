"""Repair of a damaged table; requires the write lock.

The rows that can be read and are what was written go into a new file. What is lost is taken from a snapshot, if that
has the passage with a vector of the same generation. Passages that are in no snapshot are lost: their ids are named,
and they leave the index only on request, because then nothing tells any more that they are missing.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from d2llm.core.errors import D2LLMError
from d2llm.core.files import new_folder
from d2llm.store.blocks import GENERATION_SHIFT
from d2llm.store.passage_table import NAME, PassageTable, Record, is_intact
from d2llm.store.storage import storage_errors

_FOLDER = ".passages.new"
_SCANNED_AT_ONCE = 4_096


def repair_table(folder: Path, others: Iterable[Path], *, drop_lost: bool = False) -> list[str]:
    """Write the table in the folder of an index anew, as far as possible; returns messages about what was done.

    ``others`` are folders of indexes with the same passages, such as its snapshots. ``drop_lost``: passages that cannot
    be restored leave the index; without it, nothing is changed if there are some.

    Raises:
        StorageError: the new file cannot be written.
        DamagedFileError: nothing of the file can be read.
    """
    others = list(others)
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)  # left by an interrupted repair
    try:
        table = PassageTable.open(folder)
    except D2LLMError as error:
        return _replaced(folder, others, str(error))
    with closing(table):
        intact = list(_readable(table))
        if not intact and len(table):
            return _replaced(folder, others, f"{NAME}: none of its {len(table):,} passages can be read")
        missing = table.listed_ids() - {record["id"] for record in intact}
        num_lost = max(len(missing), len(table) - len(intact))
        restored = list(_from_others(others, missing, intact)) if num_lost else []
        num_lost -= len(restored)
        if num_lost and not drop_lost:
            named = f", the first is {min(missing)!r}" if missing else ""
            problem = f"{NAME}: {num_lost:,} of {len(table):,} passages are lost and in no snapshot{named}"
            remedy = "`d2llm index ... verify --repair --drop-lost` keeps the others; then upsert the lost ones again"
            return [f"{problem}; {remedy}"]
        _rewrite(folder, table, [*intact, *restored])
    done = [f"{NAME} was rebuilt: {len(intact):,} passages were read from it; earlier versions were left out"]
    if restored:
        done.append(f"{len(restored):,} damaged passages were taken from snapshots")
    if num_lost:
        lost = sorted(missing - {record["id"] for record in restored})
        done.append(f"{num_lost:,} passages are lost: {', '.join(map(repr, lost[:20])) or 'their ids cannot be read'}")
    return done


def _readable(table: PassageTable) -> Iterator[Record]:
    """The passages of the latest version that can be read and are what was written."""
    top = table.last_key()
    spans = [(start, min(start + _SCANNED_AT_ONCE, top + 1)) for start in range(0, top + 1, _SCANNED_AT_ONCE)]
    while spans:
        first, end = spans.pop()
        try:
            yield from (
                {name: record[name] for name in table.columns}
                for record in table.between(first, end)
                if is_intact(record)
            )
        except D2LLMError:  # a damaged page: read around it
            if end - first > 1:
                middle = (first + end) // 2
                spans += [(first, middle), (middle, end)]


def _from_others(others: Sequence[Path], missing: set[str], intact: Sequence[Record]) -> Iterator[Record]:
    generations = {record["d2_row"] >> GENERATION_SHIFT for record in intact}
    used, wanted = {record["d2_row"] for record in intact}, set(missing)
    for folder in others:
        with suppress(D2LLMError, sqlite3.Error), closing(PassageTable.open(folder)) as table:
            for record in table.by_ids(sorted(wanted), (*table.columns, "d2_seal")):
                fits = not generations or record["d2_row"] >> GENERATION_SHIFT in generations
                if fits and record["d2_row"] not in used and is_intact(record):
                    used.add(record["d2_row"])
                    wanted.discard(record["id"])
                    yield {name: record[name] for name in table.columns}


def _rewrite(folder: Path, table: PassageTable, records: Sequence[Record]) -> None:
    """A new file with these passages, at the version after the latest, takes the place of the damaged one."""
    with storage_errors(folder), new_folder(folder / _FOLDER) as draft:
        PassageTable.create(draft, table.metadata, table.version).close()
        with closing(PassageTable.open(draft)) as new:
            new.replace_all(table.metadata, [records])
    _take_place(folder)


def _replaced(folder: Path, others: Sequence[Path], problem: str) -> list[str]:
    """Of a file that cannot be opened at all: the newest whole snapshot takes its place."""
    present = [path for path in others if (path / NAME).is_file()]
    for other in sorted(present, key=lambda path: (path / NAME).stat().st_mtime, reverse=True):
        with suppress(D2LLMError), closing(PassageTable.open(other)) as table:
            if not list(table.problems()):
                with storage_errors(folder), new_folder(folder / _FOLDER) as draft:
                    table.copy_to(draft)
                _take_place(folder)
                return [f"{problem}; the table of {other.name!r} took its place: later changes are lost"]
    return [f"{problem}; no snapshot has a whole copy: index the corpus again"]


def _take_place(folder: Path) -> None:
    """Move the new file to where the damaged one was. Its WAL goes first: it must never be read into the new file."""
    with storage_errors(folder):
        for ending in ("-wal", "-shm"):
            (folder / f"{NAME}{ending}").unlink(missing_ok=True)
        (folder / _FOLDER / NAME).replace(folder / NAME)
        (folder / _FOLDER).rmdir()
