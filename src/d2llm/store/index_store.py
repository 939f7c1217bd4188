"""An on-disk store of passages and their vectors that one writer changes while many readers search.

INDEX/
  manifest.json         kind "index": student, task, vector format; and how documents were chunked, if they were
  passages.db           the table (``passage_table``): the source of truth, with versions
  vectors-<g>.bin/json  the vectors of generation g (``vector_file``): a copy of those in the table, or the only one
                        (``stored_vectors``); beside it, an approximate index (``ann``), which is not trusted
  words-<g>-...         the words of the same rows (``word_files``) for BM25, derived from the texts
  window-, token-...-<g>  vectors of parts of the same rows, if the index has them (``part_vectors``)
  snapshots/<name>      a read-only index folder: a copy of the table, and links to the other files
  write.lock            held by the writer

Every write is one atomic commit: readers see all of it or nothing. Vectors are on disk before the commit that names
their rows.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any, cast
from weakref import WeakMethod

import filelock
import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import DamagedFileError, DataFormatError, IndexLockedError, IndexMismatchError, InputError
from d2llm.core.files import MANIFEST_NAME, check_replaceable, folder_bytes, new_folder, sync_directory
from d2llm.core.shipped import name_student
from d2llm.core.types import PART_KINDS, PART_NAMES, PartKind, Passage, is_text
from d2llm.store import vector_file, word_files
from d2llm.store.blocks import (
    COMPARED,
    GENERATION_SHIFT,
    KEPT,
    Changes,
    check_passages,
    compare,
    record_of,
    rows_of,
    write_words,
)
from d2llm.store.index_manifest import (
    KIND,
    VectorCopies,
    change_manifest,
    copy_notes,
    read_index_manifest,
    write_index_manifest,
)
from d2llm.store.index_spec import StoredSpec
from d2llm.store.part_vectors import (
    EncodedParts,
    EncodeParts,
    PartVectors,
    append_parts,
    create_parts,
    open_parts,
    replace_parts,
)
from d2llm.store.passage_table import PassageTable, Record
from d2llm.store.schema import FieldType, MetadataSchema
from d2llm.store.storage import LOCK_NAME, REMEDY, link_or_copy, storage_errors, warn_of_network
from d2llm.store.stored_vectors import CopiedVectors, SoleVectors, StoredVectors
from d2llm.store.vector_file import IntactExtents, VectorFile
from d2llm.store.vector_formats import VectorFormat, make_format
from d2llm.store.word_segment import WordSegment

KEEP_VERSIONS = timedelta(hours=1)
"""How long ``compact`` keeps an old version for readers that have it open."""
_SNAPSHOTS = "snapshots"
_SNAPSHOT_NAME = re.compile(r"[\w][\w.-]{0,99}")
_COMPARED_BYTES = 8 << 20
"""A table of at most so many bytes is compared with its hashes when an index is opened; a larger one by ``verify``."""
_PART_ROWS = 256  # rows whose parts are encoded together in a repair


class IndexStore:
    """The store in a folder. Reading goes through ``view`` (``store.view``); writing needs ``writing``."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.format: VectorFormat = make_format(manifest["vector_format"], manifest["dim"])
        self.vector_copies: VectorCopies = manifest["vector_copies"]
        self.part_formats = _part_formats(manifest)
        kind = SoleVectors if self.vector_copies == 1 else CopiedVectors
        writing = None if self.is_snapshot else WeakMethod(self.writing)
        self.vectors: StoredVectors = kind(folder, self.format, writing)
        self.intact = IntactExtents()
        """What views of this store have compared; a store that is opened later may take it over."""
        self._is_compared = False
        self._lock = filelock.FileLock(folder / LOCK_NAME, timeout=0)  # one writer; a killed one releases it
        warn_of_network(folder)

    @classmethod
    def create(
        cls,
        folder: Path,
        spec: StoredSpec,
        *,
        metadata: MetadataSchema | None = None,
        shard: Mapping[str, Any] | None = None,
    ) -> IndexStore:
        """A new store without passages; it appears at ``folder`` when it is complete.

        ``shard`` says which shard of which sharded index this is (``shards``); None: of none.

        Raises:
            InputError: the folder is not empty, or the format is unknown.
            StorageError: the store cannot be written.
        """
        check_replaceable(folder, KIND)  # its error names what is in the way, if that is not an index
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already exists; open it (or give exist_ok=True), or give another folder")
        code_size = make_format(spec.vector_format, spec.dim).code_size
        content = {**spec.model_dump(), "snapshot": None, **({} if shard is None else {"shard": dict(shard)})}
        part_formats = _part_formats(content)
        with storage_errors(folder), new_folder(folder, kind=KIND) as draft:
            PassageTable.create(draft, metadata or MetadataSchema()).close()
            VectorFile.create(draft, 0, code_size)
            for kind, part_format in part_formats.items():
                create_parts(draft, 0, kind, part_format)
            write_index_manifest(draft, content)
        return cls.open(folder)

    @classmethod
    def from_snapshot(cls, snapshot: Path, folder: Path) -> IndexStore:
        """A new store with the passages of a snapshot, or of a copy of one; errors as for ``create`` and ``open``."""
        manifest = cls.open(snapshot).manifest
        store = cls.create(folder, StoredSpec.of_manifest(manifest), shard=manifest.get("shard"))
        store.restore(snapshot)
        return store

    @classmethod
    def open(cls, folder: Path) -> IndexStore:
        """The store in a folder.

        Raises:
            DataFormatError: there is no store, or its manifest is damaged or has another format.
        """
        manifest = read_index_manifest(folder)
        try:
            return cls(folder, manifest)
        except (InputError, TypeError) as error:
            raise DataFormatError(folder / MANIFEST_NAME, f"is damaged ({error}); restore it from a copy") from error

    def table(self, version: int | None = None) -> PassageTable:
        """The table at a version, the latest by default.

        Raises:
            DamagedFileError: its file is damaged.
            DataFormatError: it cannot be opened, or is that of another index.
        """
        table = PassageTable.open(self.folder, version)
        if len(table) and table.code_size() != (self.format.code_size if self.vector_copies == 2 else None):
            raise DataFormatError(self.folder, "its table has other vectors than its manifest says; restore a copy")
        if not self._is_compared and table.num_bytes <= _COMPARED_BYTES:
            for problem in table.problems():
                raise DamagedFileError(table.path, f"{problem}; {REMEDY}")
        self._is_compared = True
        return table

    @property
    def adds_words(self) -> bool:
        """Whether passages have words beside those of their texts (``models.document_expansion``)."""
        return self.manifest["document_expansion"] is not None

    @property
    def version(self) -> int:
        """The latest version, which ``table`` would open; a server asks for it every second, so no row is read."""
        return PassageTable.open(self.folder).version

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields of the latest version of the table."""
        return self.table().metadata

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        check_maker(self.folder, self.manifest, fingerprint)

    @property
    def is_snapshot(self) -> bool:
        """Whether this is a snapshot of an index."""
        return bool(self.manifest["snapshot"])

    @contextmanager
    def writing(self) -> Generator[None]:
        """Hold the write lock; may be nested.

        Raises:
            IndexLockedError: another process or thread holds it.
            IndexMismatchError: another index has taken this one's place since it was opened.
            InputError: this is a snapshot.
            StorageError: the folder cannot be written.
        """
        if self.is_snapshot:
            remedy = f"`d2llm index INDEX restore {self.folder}` puts its passages into an index"
            raise InputError(
                f"{self.folder}: this is the snapshot {self.manifest['snapshot']!r}, which never changes; {remedy}"
            )
        with self.locked():
            yield

    @contextmanager
    def locked(self) -> Generator[None]:
        """Like ``writing``, but also for a snapshot: its passages never change, but its vectors can be repaired."""
        with storage_errors(self.folder):
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                raise IndexLockedError(
                    f"{self.folder}: another process or thread is writing to it; try again later"
                ) from error
        try:
            if self._lock.lock_counter == 1:
                self._check_identity()
            yield
        finally:
            self._lock.release()

    @contextmanager
    def reading(self) -> Generator[None]:
        """Read files within it: they are found by the folder's name, so by now they may belong to another index.

        Raises:
            IndexMismatchError: they do, whatever else is wrong with them.
        """
        try:
            yield
        finally:
            self._check_identity()

    def _check_identity(self) -> None:
        if read_index_manifest(self.folder) != self.manifest:
            raise IndexMismatchError(f"{self.folder}: another index has taken this one's place; open it again")

    # Changing passages ---------------------------------------------------------------------------------------------

    def compare(self, passages: Sequence[Passage], table: PassageTable | None = None) -> Changes:
        """Find out which passages are new, have another text, differ otherwise, or are unchanged.

        ``table`` is the latest version, opened under the lock.

        Raises:
            DuplicateIdError: two of the passages share an id.
            InputError: a passage does not fit the schema, or has no id.
        """
        table = self.table() if table is None else table  # an empty one is falsy
        check_passages(passages, table.metadata, self.folder)
        if self.vector_copies == 1 and any(passage.context for passage in passages):
            problem = "it keeps its vectors once, but those of late chunks cannot be encoded again from its table"
            raise InputError(f"{self.folder}: {problem}; chunk early, or use an index with two copies")
        stored = table.by_ids([passage.id for passage in passages], [*COMPARED, *KEPT])
        return compare(passages, {record["id"]: record for record in stored}, table.metadata)

    def write(
        self,
        changes: Changes,
        vectors: NDArray[np.float32],
        truncated: Collection[int] = (),
        table: PassageTable | None = None,
        parts: Mapping[PartKind, EncodedParts] | None = None,
        added: Sequence[Mapping[str, float]] | None = None,
    ) -> int:
        """Make the changes in one commit; returns the new version.

        Args:
            changes: the result of ``compare`` under the same lock.
            vectors: [len(changes.texts), dim].
            truncated: indices into ``changes.texts`` of passages that the student truncated.
            table: the latest version, opened under the same lock; it is moved to the new version.
            parts: parts of ``changes.texts``, of each kind that the index stores.
            added: words, with counts, that ``changes.texts`` lack, if the index adds some.

        Raises:
            InputError: a vector is not finite, the number or width of vectors is wrong, or parts or words are missing.
            StorageError: the changes cannot be written; none of them is in the index.
        """
        if vectors.shape != (expected := (len(changes.texts), self.manifest["dim"])):
            raise InputError(
                f"vectors of shape {vectors.shape} were given, but the texts need {expected} in this index"
            )
        names: list[str] = [passage.id for passage in changes.texts]
        codes, part_codes = self.format.encode(vectors, names), self._part_codes(parts or {}, names)
        if self.adds_words and (added is None or len(added) != len(names)):
            raise InputError(f"{self.folder}: it adds words to passages; give those of each of the {len(names)} texts")
        words_of = added if added is not None and self.adds_words else [{}] * len(names)
        with self.writing():
            table = self.table() if table is None else table
            if not changes.texts and not changes.others:
                return table.version
            file, generation = self.vectors.file_to_extend(table), self.vectors.generation(table)
            kept_rows = np.array([row for _, row, _ in changes.others], np.int64)
            column = self.vectors.column(table, codes, kept_rows.tolist())
            with storage_errors(self.folder):
                first = file.append(codes) if len(codes) else file.capacity
                words = WordSegment.from_texts(passage.full_text for passage in changes.texts).with_added(words_of)
                word_files.write_segment(self.folder, generation, first, words)
                if len(codes):
                    for kind, (kind_codes, counts) in part_codes.items():
                        append_parts(self.folder, generation, kind, self.part_formats[kind], first, kind_codes, counts)
            rows = np.concatenate([np.arange(first, first + len(codes)) | generation << GENERATION_SHIFT, kept_rows])
            kept = [
                *(
                    {"d2_truncated": index in truncated, "d2_words": write_words(added_words)}
                    for index, added_words in enumerate(words_of)
                ),
                *(columns for _, _, columns in changes.others),
            ]
            passages = [*changes.texts, *(passage for passage, _, _ in changes.others)]
            coded: Iterator[bytes | None] = repeat(None) if column is None else (code.tobytes() for code in column)
            table.put(
                record_of(passage, table.metadata, row, columns | {"d2_vector": code})
                for passage, row, columns, code in zip(passages, rows.tolist(), kept, coded, strict=False)
            )
            return table.version

    def append_rows(
        self,
        records: Sequence[Record],
        codes: NDArray[np.uint8],
        words: WordSegment,
        parts: Mapping[PartKind, tuple[NDArray[np.uint8], NDArray[np.int64]]],
    ) -> int:
        """Add rows of another store's table as they are, without encoding anything, in one commit.

        Args:
            records: all columns of passages that this store does not have; ``d2_row`` is replaced.
            codes: [len(records), code_size], their vectors in the format of this store.
            words: their words, in the same order.
            parts: codes and counts of their parts, of each kind that the index stores.

        Returns:
            The new version.

        Raises:
            StorageError: they cannot be written; none of them is in the store.
        """
        with self.writing():
            table = self.table()
            file, generation = self.vectors.file_to_extend(table), self.vectors.generation(table)
            with storage_errors(self.folder):
                first = file.append(codes)
                word_files.write_segment(self.folder, generation, first, words)
                for kind, (part_codes, counts) in parts.items():
                    append_parts(self.folder, generation, kind, self.part_formats[kind], first, part_codes, counts)
            table.put(
                record | {"d2_row": (first + index) | generation << GENERATION_SHIFT}
                for index, record in enumerate(records)
            )
            return table.version

    def _part_codes(
        self, parts: Mapping[PartKind, EncodedParts], names: Sequence[str]
    ) -> dict[PartKind, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """The codes and counts of parts of the passages with these names, of each kind that the index stores."""
        coded: dict[PartKind, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}
        for kind, part_format in self.part_formats.items():
            read = parts.get(kind)
            if read is None or len(read.counts) != len(names) or len(read.vectors) != read.counts.sum():
                raise InputError(
                    f"{self.folder}: it stores {PART_NAMES[kind]}; give those of each of the {len(names)} texts"
                )
            owners: list[int] = np.repeat(np.arange(len(names)), read.counts).tolist()
            coded[kind] = part_format.encode(read.vectors, [names[owner] for owner in owners]), read.counts
        return coded

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids, at once from every result; returns their number."""
        for wrong in (value for value in ids if not is_text(value)):
            raise InputError(f"{wrong!r} cannot be a passage's id; give strings of valid Unicode")
        with self.writing():
            return self.table().delete(list(dict.fromkeys(ids)))

    def add_fields(self, fields: MetadataSchema) -> None:
        """Add metadata fields that do not exist yet; existing passages have no value in them.

        Raises:
            InputError: a field exists with another type, or under a name that differs only in case.
        """
        with self.writing():
            known = self.metadata
            extended = known.extend(fields).fields
            new: dict[str, FieldType] = {name: kind for name, kind in extended.items() if name not in known.fields}
            if new:
                self.table().add_fields(MetadataSchema(new))

    def update_word_files(self) -> None:
        """Write missing word files of the latest version, and join small ones."""
        with self.locked():
            if len(table := self.table()):
                generation, num_rows = self.vectors.generation(table), self.vectors.file_to_extend(table).capacity
                with storage_errors(self.folder):
                    word_files.update_word_files(self.folder, generation, num_rows, self._segment_of(table))

    def words(self, table: PassageTable, num_rows: int, *, whole: bool = False) -> word_files.Coverage:
        """The words of the first ``num_rows`` rows of a version; words that are in no file are read from the table."""
        generation = self.vectors.generation(table)
        return word_files.open_words(self.folder, generation, num_rows, self._segment_of(table), whole=whole)

    def parts(
        self, table: PassageTable, kind: PartKind, capacity: int | None = None, *, whole: bool = False
    ) -> PartVectors:
        """The vectors of parts of the first ``capacity`` rows (default: those of the version), if they are stored.

        With ``whole``, all their checksums are compared, also those of what is already ``intact``.
        """
        generation, num_rows = self.vectors.generation(table), self.vectors.num_rows(table)
        return open_parts(
            self.folder,
            generation,
            kind,
            self.part_formats[kind],
            num_rows=num_rows,
            capacity=capacity or num_rows,
            version=table.version,
            intact=IntactExtents() if whole else self.intact,
        )

    def read_parts_again(self, table: PassageTable, kind: PartKind, read: EncodeParts) -> None:
        """Encode all parts of the latest version again and rewrite them; requires the write lock.

        If they cannot be written, the existing files are kept.
        """
        vector_format, generation = self.part_formats[kind], self.vectors.generation(table)
        num_rows, first_row = self.vectors.num_rows(table), generation << GENERATION_SHIFT

        def blocks() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
            for start in range(0, num_rows, _PART_ROWS):
                end = min(start + _PART_ROWS, num_rows)
                encoded = read(kind, list(table.texts(first_row + start, first_row + end)))
                owners = np.repeat(np.arange(start, end), encoded.counts).tolist()
                yield vector_format.encode(encoded.vectors, [f"row {row}" for row in owners]), encoded.counts

        with storage_errors(self.folder):
            replace_parts(self.folder, generation, kind, vector_format, blocks(), since=table.version)

    def _segment_of(self, table: PassageTable) -> word_files.SegmentOf:
        """Reads the words of rows from a version of the table."""
        first_row = self.vectors.generation(table) << GENERATION_SHIFT

        def read(first: int, end: int) -> WordSegment:
            segment = WordSegment.from_texts(table.texts(first_row + first, first_row + end))
            if not self.adds_words:
                return segment
            return segment.with_added([*table.added_words(first_row + first, first_row + end)])

        return read

    # Snapshots and maintenance -------------------------------------------------------------------------------------

    def snapshot_folder(self, name: str) -> Path:
        """The index folder of the snapshot of this name, which must be a valid folder name (else ``InputError``)."""
        if not isinstance(cast("object", name), str) or not _SNAPSHOT_NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot name a snapshot; use letters, digits, '-', '_' and '.', at most 100")
        return self.folder / _SNAPSHOTS / name

    def snapshots(self) -> list[str]:
        """The names of the snapshots, sorted."""
        folder = self.folder / _SNAPSHOTS
        return sorted(path.parent.name for path in folder.glob(f"[!.]*/{MANIFEST_NAME}"))

    def snapshot(self, name: str) -> Path:
        """Keep the latest version under a new name. It shares files with the index, so it takes hardly any space."""
        target = self.snapshot_folder(name)
        with self.writing():
            if target.exists():
                raise InputError(f"{self.folder}: there is already a snapshot {name!r}; choose another name")
            with storage_errors(target), new_folder(target, kind=KIND) as draft:
                self.vectors.file_to_extend(table := self.table())  # ensures that the vectors are complete
                table.copy_to(draft)
                kept = vector_file.files_of(self.folder, self.vectors.generation(table))
                for path in filter(Path.is_file, kept):
                    link_or_copy(path, draft / path.name)
                change_manifest(self.folder, draft, snapshot=name)
        return target

    def drop_snapshot(self, name: str) -> None:
        """Remove an existing snapshot."""
        with self.writing():
            folder = self._existing_snapshot(name)
            with storage_errors(folder):
                retired = folder.with_name(f".{folder.name}.old")
                shutil.rmtree(retired, ignore_errors=True)  # left by an interrupted removal
                folder.rename(retired)
                sync_directory(folder.parent)  # or a power cut might bring back the folder with a part of its files
                shutil.rmtree(retired)

    def restore(self, snapshot: str | Path) -> int:
        """Replace the passages of the index by those of a snapshot, in one commit; returns their number.

        Further documents are chunked like those of the snapshot, and errors measured then are known again. The previous
        passages stay in the earlier version until ``compact`` removes it. ``snapshot`` is its name, or the folder of a
        copy.

        Raises:
            IndexMismatchError: the copy is that of an index with other vectors.
        """
        with self.writing():
            source = IndexStore.open(snapshot if isinstance(snapshot, Path) else self._existing_snapshot(snapshot))
            made, ours = (StoredSpec.of_manifest(store.manifest) for store in (source, self))
            if made.model_copy(update={"student_source": ours.student_source}) != ours:
                problem = f"its vectors are not made and stored as those of {self.folder}"
                raise IndexMismatchError(f"{source.folder}: {problem}; restore it to the name of a new index")
            num_passages = self._rewrite(source)
            copy_notes(source.folder, self.folder)
            self.update_word_files()
            return num_passages

    def compact(self, keep: timedelta = KEEP_VERSIONS, *, dense: bool | None = None) -> tuple[int, int]:
        """Free the space of deleted data; returns the size of the index in bytes before and after.

        Args:
            keep: versions younger than this are kept for readers that have them open.
            dense: rewrite the vector file without the gaps that deletions leave; by default if they are over a quarter.
        """
        with self.writing(), storage_errors(self.folder):
            before, table = folder_bytes(self.folder), self.table()
            if dense or (dense is None and len(table) < 0.75 * self.vectors.file_to_extend(table).capacity):
                self._rewrite(self)
            self.update_word_files()
            (table := self.table()).remove_older(keep)
            for generation in self.vectors.unused_generations(table):
                vector_file.remove(self.folder, generation)
            self._sweep()
            return before, folder_bytes(self.folder)

    def _rewrite(self, source: IndexStore) -> int:
        """Replace the table by all rows of ``source``, with vectors of a new generation; returns the number of rows."""
        table, rows = self.table(), source.table()
        codes_of_batch = source.vectors.codes_of_batches(rows)
        num_rows = source.vectors.num_rows(rows)
        words = source.words(rows, num_rows, whole=True).words
        parts = {kind: source.parts(rows, kind, whole=True) for kind in self.part_formats}
        generation = max(self.vectors.generation(table), *vector_file.generations(self.folder), 0) + 1
        # No version before the commit may read the file, not even one that lost its own file of this number.
        file = VectorFile.create(self.folder, generation, self.format.code_size, since=table.version + 1)
        for kind, part_format in self.part_formats.items():
            create_parts(self.folder, generation, kind, part_format, since=table.version + 1)

        def batches() -> Iterator[list[Record]]:
            for batch in rows.intact_batches():  # copied damage would get matching hashes
                first, old = file.append(codes_of_batch(batch)), rows_of(batch)
                word_files.write_segment(self.folder, generation, first, words.take(old))
                for kind, part_format in self.part_formats.items():
                    append_parts(self.folder, generation, kind, part_format, first, *parts[kind].take(old))
                yield [
                    record | {"d2_row": (first + index) | generation << GENERATION_SHIFT}
                    for index, record in enumerate(batch)
                ]

        table.replace_all(rows.metadata, batches())
        return len(rows)

    def _sweep(self) -> None:
        """Remove leftovers of interrupted writers."""
        for path in [
            *self.folder.glob(".vectors-*.new*"),
            *(path for kind in PART_KINDS for path in self.folder.glob(f".{kind}-*.new*")),
            *(self.folder / _SNAPSHOTS).glob(".*"),
        ]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        word_files.sweep(self.folder)

    def _existing_snapshot(self, name: str) -> Path:
        folder, present = self.snapshot_folder(name), self.snapshots()
        if name not in present:
            raise InputError(f"{self.folder}: there is no snapshot {name!r}; there are: {', '.join(present) or 'none'}")
        return folder


def _part_formats(manifest: Mapping[str, Any]) -> dict[PartKind, VectorFormat]:
    """The formats of the vectors of parts that an index stores, by kind."""
    dims: dict[PartKind, Any] = {"window": manifest["dim"], "token": manifest["token_dim"]}
    return {kind: make_format(name, dims[kind]) for kind in PART_KINDS if (name := manifest[f"{kind}_format"])}


def check_maker(folder: Path, manifest: Mapping[str, Any], fingerprint: str) -> None:
    """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors of an index."""
    if fingerprint != manifest["student"]:
        maker = name_student(manifest["student"], manifest["student_source"])
        raise IndexMismatchError(
            f"{folder}: the index was made by student {maker}, but the student given is {name_student(fingerprint)}; "
            "search with the student that made it, or index the corpus again"
        )
