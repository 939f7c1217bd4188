"""Where the vectors of an index are stored: in its table and its vector file (two copies), or only in the file (one).

With two copies the table is the source of truth, and a missing or damaged file is rebuilt from it. With one copy the
texts are the source of truth: a lost vector must be encoded again by the student, which only ``repair`` does; until
then readers and writers get an error that says so.

Both options are needed: with bfloat16, one copy takes 1,017 bytes per passage and two take 1,784 (docs/log), but
late chunks, which cannot be encoded again from the table, need two.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import DataFormatError, InputError, StorageError
from d2llm.core.fallbacks import count_fallback
from d2llm.core.names import counted
from d2llm.core.types import Passage
from d2llm.store import vector_file
from d2llm.store.blocks import GENERATION_SHIFT, ROW_MASK, codes_of, rows_of
from d2llm.store.passage_table import PassageTable, Record
from d2llm.store.schema import TEXT_COLUMNS
from d2llm.store.storage import storage_errors
from d2llm.store.vector_file import Salvage, VectorFile, VectorRows
from d2llm.store.vector_formats import VectorFormat

_log = logging.getLogger(__name__)
_REPAIRED_ROWS = 2_048  # rows per step of a repair: the most that an interruption can lose

Encode = Callable[[Sequence[Passage]], NDArray[np.float32]]
"""Returns the student's vectors [n, dim] of some passages; only their id, title and text are reliable."""


class StoredVectors(ABC):
    """The vectors in a store's folder. Methods that change files require the write lock.

    ``writing`` returns what takes the write lock; None in a snapshot. It is a weak reference to a method of the store,
    which otherwise stayed in memory, with the files that it has open, until a garbage collection found the circle.
    """

    def __init__(
        self,
        folder: Path,
        vector_format: VectorFormat,
        writing: Callable[[], Callable[[], AbstractContextManager[None]] | None] | None,
    ) -> None:
        self.folder, self.format, self.code_size = folder, vector_format, vector_format.code_size
        self._writing = writing

    def generation(self, table: PassageTable) -> int:
        """The generation of a version's vectors, shared by all its rows; a version without rows uses the newest."""
        row = table.last_row()
        return max(vector_file.generations(self.folder), default=0) if row is None else row >> GENERATION_SHIFT

    def unused_generations(self, table: PassageTable) -> set[int]:
        """Those on disk of which no version that is kept has a row; if no version has any row, all but the newest."""
        made = set(vector_file.generations(self.folder))
        used = {
            generation
            for generation in made
            if table.has_row_between(generation << GENERATION_SHIFT, (generation + 1) << GENERATION_SHIFT)
        }
        return made - (used or {max(made, default=0)})

    def num_rows(self, table: PassageTable) -> int:
        """Number of rows that a version needs, including dead ones before its last live one."""
        row = table.last_row()
        return 0 if row is None else (row & ROW_MASK) + 1

    def read(self, table: PassageTable, rows: NDArray[np.int64]) -> VectorRows:
        """All vectors of a version with these rows (d2_row); checksums are not compared.

        Raises:
            DataFormatError: the file is missing or damaged or lacks rows, and there is no other copy.
        """
        needed = int(rows.max() & ROW_MASK) + 1 if len(rows) else 0
        try:
            generation = int(rows[0]) >> GENERATION_SHIFT if len(rows) else self.generation(table)
            file = VectorFile.open(self.folder, generation, self.code_size)
            if file.capacity >= needed and file.since <= table.version:
                return VectorRows(file.codes(), file)
            problem = f"{file.path.name} does not have the vectors of version {table.version}"
        except (DataFormatError, OSError, ValueError) as error:  # the last two: replaced while it was opened
            problem = str(error)
        return self.recover(table, problem)

    def file_to_extend(self, table: PassageTable) -> VectorFile:
        """The file of the latest version. It must hold all rows of the version, or new rows would reuse their numbers.

        Raises:
            DataFormatError: the file lacks rows, and there is no other copy.
        """
        generation = self.generation(table)
        try:
            file = VectorFile.open(self.folder, generation, self.code_size)
            if file.since <= table.version and self.num_rows(table) <= file.capacity:
                return file
            problem = f"{file.path.name} does not have the vectors of version {table.version}"
        except DataFormatError as error:
            problem = str(error)
        return self.recover_file(table, problem)

    @abstractmethod
    def recover(self, table: PassageTable, problem: str) -> VectorRows:
        """The vectors of a version whose file cannot be used, from the other copy.

        Raises:
            DataFormatError: there is no other copy; the message contains ``problem`` and a remedy.
        """

    @abstractmethod
    def recover_file(self, table: PassageTable, problem: str) -> VectorFile:
        """A new file for the latest version, whose own file cannot be used. Raises as ``recover`` does."""

    @abstractmethod
    def column(self, table: PassageTable, codes: NDArray[np.uint8], kept: Sequence[int]) -> NDArray[np.uint8] | None:
        """Content of the table's vector column: new codes, then those of the kept rows; None if there is no column."""

    @abstractmethod
    def codes_of_batches(self, table: PassageTable) -> Callable[[Sequence[Record]], NDArray[np.uint8]]:
        """A function that returns the verified codes [n, code_size] of a batch of the table's rows.

        Raises:
            DataFormatError: some codes are lost.
        """

    @abstractmethod
    def problems(self, table: PassageTable) -> Iterator[str]:
        """Read everything and report damage."""

    @abstractmethod
    def repair(self, table: PassageTable, encode: Encode | None) -> None:
        """Rewrite the file of the latest version, durably. Rows that the version lacks become zeros.

        Raises:
            InputError: passages must be encoded, but ``encode`` is None.
            StorageError: the file cannot be written; the existing one is kept.
        """


class CopiedVectors(StoredVectors):
    """Two copies: in the table, which is the source of truth, and in the vector file, which makes scans fast."""

    def recover(self, table: PassageTable, problem: str) -> VectorRows:
        """From the table, and written to the file for later readers; if that is impossible, held in memory.

        (No write permission, another active writer, or an old version.)
        """
        count_fallback("vector file")
        _log.warning("%s: %s; its vectors are read from the table again", self.folder, problem)
        writing = self._writing and self._writing()
        if writing is not None and table.version == PassageTable.open(self.folder).version:
            try:
                with writing():
                    if table.version == PassageTable.open(self.folder).version:  # no newer one was written meanwhile
                        file = self._write_file(table)
                        return VectorRows(file.codes(), file)
            except StorageError as error:
                _log.warning("%s: its vectors are held in memory (%s)", self.folder, error)
        return VectorRows(table.codes(self.code_size), None)

    def recover_file(self, table: PassageTable, problem: str) -> VectorFile:
        """From the table."""
        _log.warning("%s: %s; it is rewritten", self.folder, problem)
        return self._write_file(table)

    def column(self, table: PassageTable, codes: NDArray[np.uint8], kept: Sequence[int]) -> NDArray[np.uint8]:
        """New and kept codes."""
        return np.concatenate([codes, codes_of(table.by_rows(kept, ["d2_vector"]), self.code_size)])

    def codes_of_batches(self, table: PassageTable) -> Callable[[Sequence[Record]], NDArray[np.uint8]]:
        """From the table."""
        del table
        return lambda records: codes_of(records, self.code_size)

    def problems(self, table: PassageTable) -> Iterator[str]:
        """Damaged parts of the file, or vectors that differ from those of the table."""
        try:
            file = VectorFile.open(self.folder, self.generation(table), self.code_size)
        except DataFormatError as error:
            yield str(error)
            return
        codes, differing = file.codes(), 0
        damaged = file.damaged(codes)
        if damaged:
            yield f"{file.path.name}: {len(damaged)} of {len(file.extents)} parts are not what was written"
        for batch in table.batches(["d2_row", "d2_vector"]):
            rows, stored = rows_of(batch), codes_of(batch, self.code_size)
            inside = rows < len(codes)
            differing += int((~inside).sum()) + int((codes[rows[inside]] != stored[inside]).any(axis=1).sum())
        if differing and not damaged:
            yield f"{file.path.name}: {counted(differing, 'vector is', 'vectors are')} not those of the table"

    def repair(self, table: PassageTable, encode: Encode | None) -> None:
        """From the table; nothing is encoded."""
        del encode
        self._write_file(table)

    def _write_file(self, table: PassageTable) -> VectorFile:
        """Rows that the latest version lacks become zeros, so the file records the first version that it serves."""
        with storage_errors(self.folder):
            codes = table.codes(self.code_size)
            return VectorFile.replace(self.folder, self.generation(table), codes, since=table.version)


class SoleVectors(StoredVectors):
    """One copy, in the vector file. Lost vectors are encoded again from the texts by ``repair``."""

    def recover(self, table: PassageTable, problem: str) -> VectorRows:
        """An error, unless the version has no passages."""
        if len(table):
            self._refuse(table, problem)
        return VectorRows(np.zeros((0, self.code_size), np.uint8), None)

    def recover_file(self, table: PassageTable, problem: str) -> VectorFile:
        """An error, unless the version has no passages."""
        if len(table):
            self._refuse(table, problem)
        with storage_errors(self.folder):
            nothing = np.zeros((0, self.code_size), np.uint8)
            return VectorFile.replace(self.folder, self.generation(table), nothing, since=table.version)

    def column(self, table: PassageTable, codes: NDArray[np.uint8], kept: Sequence[int]) -> None:
        """The table has no column of vectors."""
        del table, codes, kept

    def codes_of_batches(self, table: PassageTable) -> Callable[[Sequence[Record]], NDArray[np.uint8]]:
        """From the file, after comparing all its checksums."""
        codes, file = self.read(table, table.rows())
        if file is not None and file.damaged(codes):  # copying them would create matching checksums
            self._refuse(table, f"{file.path.name} is damaged")

        return lambda records: codes[rows_of(records)]

    def problems(self, table: PassageTable) -> Iterator[str]:
        """Damaged parts of the file, and how many passages have lost their vectors."""
        rows, salvaged = table.rows() & ROW_MASK, self._salvage(table)
        num_lost = len(rows) - int(salvaged.whole[rows[rows < len(salvaged.whole)]].sum())
        # A version without rows has no file of its own: a killed writer may have left a later one beside it.
        is_unused = salvaged.is_later and not len(rows)
        if (salvaged.problem and not is_unused) or num_lost:
            problem = salvaged.problem or f"{vector_file.path_of(self.folder, self.generation(table)).name} lacks rows"
            yield f"{problem}; {num_lost:,} of {len(rows):,} passages have lost their vectors"

    def repair(self, table: PassageTable, encode: Encode | None) -> None:
        """Keeps intact rows and encodes lost ones again. If interrupted, the next repair continues there."""
        rows = table.rows()
        salvaged, generation = self._salvage(table), self.generation(table)
        live = np.zeros(int(rows[-1] & ROW_MASK) + 1 if len(rows) else 0, np.bool_)
        live[rows & ROW_MASK] = True
        with storage_errors(self.folder):
            draft = VectorFile.begin(
                self.folder, generation, self.code_size, since=table.version, purpose=_contents_of(table)
            )
        for start in range(draft.capacity, len(live), _REPAIRED_ROWS):
            codes = self._repaired_codes(
                table, salvaged, live[start : start + _REPAIRED_ROWS], start, generation, encode
            )
            with storage_errors(self.folder):
                draft.append(codes)
        with storage_errors(self.folder):
            draft.take_place(self.folder)

    def _repaired_codes(
        self,
        table: PassageTable,
        salvaged: Salvage,
        live: NDArray[np.bool_],
        start: int,
        generation: int,
        encode: Encode | None,
    ) -> NDArray[np.uint8]:
        """The codes of the rows from ``start`` on; ``live`` marks those that are passages."""
        codes, whole = np.zeros((len(live), self.code_size), np.uint8), np.zeros(len(live), np.bool_)
        intact = salvaged.whole[start : start + len(live)]
        whole[: len(intact)] = intact
        codes[whole] = salvaged.codes[start : start + len(live)][intact]
        lost = np.flatnonzero(live & ~whole)
        if len(lost):
            if encode is None:
                raise InputError(
                    f"{self.folder}: its vectors are kept once; to repair them, a student must encode texts"
                )
            stored = (lost + start) | generation << GENERATION_SHIFT
            passages = [Passage(**record) for record in table.by_rows(stored.tolist(), TEXT_COLUMNS)]
            codes[lost] = self.format.encode(encode(passages), [passage.id for passage in passages])
        return codes

    def _salvage(self, table: PassageTable) -> Salvage:
        return vector_file.salvage(self.folder, self.generation(table), self.code_size, version=table.version)

    def _refuse(self, table: PassageTable, problem: str) -> NoReturn:
        if table.version < PassageTable.open(self.folder).version:
            message = f"version {table.version} no longer has vectors ({problem}); refresh or open the index again"
        else:
            message = (
                f"vectors are lost ({problem}), and this index keeps them once; "
                f"`d2llm index {self.folder} verify --repair` encodes their passages again"
            )
        raise DataFormatError(self.folder, message)


def _contents_of(table: PassageTable) -> str:
    """A hash of the assignment of passages to rows, to recognise an interrupted repair that can be continued."""
    total = 0  # a sum, because the rows come in no order
    for batch in table.batches(["d2_row", "d2_hash"]):
        total += sum(xxhash.xxh3_64_intdigest(f"{one['d2_row']}:{one['d2_hash']}".encode()) for one in batch)
    return f"-{table.version}-{total % (1 << 64):016x}"
