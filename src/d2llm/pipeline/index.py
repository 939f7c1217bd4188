"""An index that lives: a durable store of passages with the student that reads them and searches them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import DuplicateIdError
from d2llm.core.types import EngineName, Passage, Query, Ranking, Task
from d2llm.index.inspection import IndexStats, VerifyReport, stats, verify
from d2llm.index.passage_table import PassageTable
from d2llm.index.schema import FieldType, MetadataSchema
from d2llm.index.store import KEEP_VERSIONS, IndexStore
from d2llm.index.stored_vectors import VectorCopies
from d2llm.index.view import PassageView
from d2llm.models.student import Student
from d2llm.pipeline.cascade import Rereader
from d2llm.pipeline.exact_search import KeptReaches
from d2llm.pipeline.progress import Advance, progress_bar
from d2llm.pipeline.project import extend_projections
from d2llm.pipeline.protocols import SearchStudent
from d2llm.pipeline.reading import read_passages
from d2llm.pipeline.search import Searcher, SearchSettings
from d2llm.pipeline.student_source import find_source, source_of

BLOCK_PASSAGES = 2_048
"""Passages in one commit: what an interruption can cost at most."""


@dataclass(frozen=True, slots=True)
class UpsertReport:
    """What ``upsert`` did: passages that were new, got another text, got other metadata alone, or were as they are.

    Only new passages and other texts were encoded; ``num_truncated`` of them were too long and were read in part.
    ``num_tokens`` were read, padding not counted. Another text is also another document around a late chunk; documents
    of late chunks were read in ``num_windows`` windows.
    """

    folder: Path
    version: int
    num_passages: int = 0
    num_added: int = 0
    num_updated: int = 0
    num_metadata: int = 0
    num_unchanged: int = 0
    num_truncated: int = 0
    num_tokens: int = 0
    num_windows: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"folder": str(self.folder)}


class Index:
    """Passages that can be searched while they change. Make one with ``create``, open it with ``open``.

    Readers see one version until ``refresh``; a write through this object refreshes it.
    """

    def __init__(self, store: IndexStore, student: SearchStudent | str | Path | None, **loading: Any) -> None:
        self.store = store
        self._given = student
        self._loading = loading

    @classmethod
    def create(
        cls,
        folder: str | Path,
        student: SearchStudent | str | Path,
        *,
        task: Task = "asymmetric",
        vector_format: str = "bfloat16",
        vector_copies: VectorCopies = 2,
        metadata: Mapping[str, FieldType] | None = None,
        student_source: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        engine: EngineName = "torch",
    ) -> Index:
        """A new index without passages.

        Args:
            folder: where; must not exist, or be empty.
            student: whose vectors it holds: a student, its folder, or the name of a shipped one.
            task: what a search asks unless told otherwise.
            vector_format: how vectors are stored (``index.vectors.FORMATS``).
            vector_copies: 2, so that a damaged copy is made good from the other; 1 takes less space, and what is
                damaged must be encoded again (``verify``).
            metadata: fields with their types; fields that come later are inferred from their values all the same.
            student_source: where the student was loaded from, so that ``open`` finds it again; known where ``student``
                is a folder or name.
            device: of the student, if it is to be loaded.
            dtype: its number format.
            engine: what encodes texts with it (``models.engines``).

        Raises:
            InputError: something is in the way, or a format, field or type is unknown.
            ModelError: the student cannot be loaded.
        """
        is_named = isinstance(student, str | Path)
        loaded = Student.load(student, device=device, dtype=dtype, engine=engine) if is_named else student
        store = IndexStore.create(
            Path(folder),
            student_fingerprint=loaded.fingerprint,
            dim=loaded.vector_dim,
            task=task,
            vector_format=vector_format,
            vector_copies=vector_copies,
            metadata=MetadataSchema(metadata or {}),
            student_config=loaded.config.model_dump(mode="json"),
            student_source=source_of(student) if is_named else student_source,
        )
        return cls(store, loaded)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        student: SearchStudent | str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        engine: EngineName = "torch",
    ) -> Index:
        """An index that is there. Its student is loaded when it is first needed.

        Args:
            folder: of an index, or of a snapshot of one.
            student: the student that made it, if it is no longer where it was then.
            device: of the student.
            dtype: its number format.
            engine: what encodes texts with it (``models.engines``).

        Raises:
            DataFormatError: there is no index, or it is damaged.
        """
        return cls(IndexStore.open(Path(folder)), student, device=device, dtype=dtype, engine=engine)

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()

    def __len__(self) -> int:
        return len(self.view)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.store.folder

    @cached_property
    def student(self) -> SearchStudent:
        """The student that made the vectors.

        Raises:
            InputError: the index does not know where it is.
            IndexMismatchError: the one given, or found, is another.
        """
        given = self._given
        if given is None:
            given = find_source(self.store.manifest.get("student_source"), self.folder)
        student = Student.load(given, **self._loading) if isinstance(given, str | Path) else given
        self.store.check_student(student.fingerprint)
        return student

    @cached_property
    def view(self) -> PassageView:
        """The version that this object reads."""
        return PassageView(self.store)

    @cached_property
    def _reaches(self) -> KeptReaches:
        return KeptReaches()

    def refresh(self) -> None:
        """Read the latest version from now on."""
        for kept in ("view", "_reaches"):
            self.__dict__.pop(kept, None)

    # Changing ------------------------------------------------------------------------------------------------------

    def add(self, passages: Iterable[Passage], **options: Any) -> UpsertReport:
        """``upsert`` of passages none of which may be there.

        Raises:
            DuplicateIdError: one is; the blocks before it are kept.
        """
        return self.upsert(passages, only_new=True, **options)

    def upsert(
        self,
        passages: Iterable[Passage],
        *,
        only_new: bool = False,
        num_passages: int | None = None,
        show_progress: bool | None = False,
    ) -> UpsertReport:
        """Add passages, and change those whose id is there. Texts that are as they were are not encoded again.

        A late chunk is as it was if all of its document is. Every 2,048 passages are one commit. Interrupted, the same
        call goes on behind the last.

        Args:
            passages: read one after another, never held together.
            only_new: refuse passages whose id is there.
            num_passages: how many will come, for the progress bar.
            show_progress: None means: if standard error is a terminal.

        Raises:
            DuplicateIdError: two passages share an id.
            InputError: a passage cannot be stored, or its metadata do not fit; the blocks before it are kept.
            IndexLockedError: another process is writing.
            StorageError: it cannot be written; the blocks before are kept.
        """
        begin = time.perf_counter()
        report = UpsertReport(self.folder, 0)
        seen: set[int] = set()
        student = self.student
        with self.store.writing(), progress_bar("indexing", num_passages or 0, show=show_progress) as advance:
            try:
                # Ids are looked up in what was there before, which is indexed: no id comes twice. In the growing table
                # itself, whose new rows are not, each block would take longer than the last.
                self.store.settle()
                before = self.store.table()
                written = before.version
                for block in _blocks(passages):
                    _refuse_repeated(block, seen, self.folder)
                    table = self.store.table()
                    if table.version != written:  # whoever gives the passages has changed the index meanwhile
                        before = self.store.table()
                    report = self._write_block(student, block, report, table, before, advance, only_new=only_new)
                    written = report.version
                self.store.settle()
                extend_projections(self.store, student)
            finally:
                self.refresh()
            version = self.store.table().version
        return replace(report, version=version, seconds=time.perf_counter() - begin)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages from vectors, BM25 and results at once; returns how many there were.

        Raises:
            InputError: an id is no valid text.
            IndexLockedError: another process is writing.
        """
        num_deleted = self.store.delete(list(ids))
        self.refresh()
        return num_deleted

    def compact(self, keep: timedelta = KEEP_VERSIONS, *, dense: bool | None = None) -> tuple[int, int]:
        """Free the space of what is no longer there; bytes before and after. Arguments: ``IndexStore.compact``."""
        sizes = self.store.compact(keep, dense=dense)
        self.refresh()
        return sizes

    def snapshot(self, name: str) -> Path:
        """Keep the latest version under a name, as a folder that ``open`` takes; it takes hardly any space."""
        return self.store.snapshot(name)

    def restore(self, name: str) -> int:
        """Make a snapshot's passages those of the index; returns how many they are."""
        num_passages = self.store.restore(name)
        self.refresh()
        return num_passages

    # Reading -------------------------------------------------------------------------------------------------------

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in their order; those that are not there are left out."""
        return self.view.get(ids)

    def search(
        self,
        queries: Sequence[Query] | Sequence[str] | str,
        settings: SearchSettings | None = None,
        *,
        cascade: Rereader | None = None,
        **changes: Any,
    ) -> list[Ranking]:
        """Rank the passages for each query; ``changes`` are single fields of the settings (``SearchSettings``).

        With a ``cascade``, a teacher reads again what the student is unsure of.

        Raises:
            InputError: a setting or query is wrong.
            FilterError: the filter cannot be read, or does not fit the metadata.
        """
        asked = [queries] if isinstance(queries, str) else queries
        wanted = replace(settings or SearchSettings(), **changes)
        return Searcher(self.view, self.student, wanted, reaches=self._reaches, cascade=cascade).rank(asked)

    def stats(self) -> IndexStats:
        """What the latest version holds, and how many bytes it takes."""
        return stats(self.store)

    def verify(
        self, *, repair: bool = False, go_back: bool = False, show_progress: bool | None = False
    ) -> VerifyReport:
        """Whether all is as it was written; what ``repair`` and ``go_back`` do about it: ``index.inspection.verify``.

        Where the vectors are kept once, the student encodes again those that are lost; interrupted, the same call goes
        on where it was. ``show_progress`` None means: if standard error is a terminal.

        Raises:
            IndexLockedError: another process is writing, and there is to be repaired.
            StorageError: a repaired file cannot be written.
        """
        with ExitStack() as stack:
            advances: list[Advance] = []  # one, when there is something to encode

            def encode(passages: Sequence[Passage]) -> NDArray[np.float32]:
                if not advances:
                    advances.append(stack.enter_context(progress_bar("encoding again", None, show=show_progress)))
                encoded = self.student.encode_passages([passage.full_text for passage in passages])
                advances[0](len(passages))
                return encoded.vectors

            report = verify(self.store, repair=repair, go_back=go_back, encode=encode)
        self.refresh()
        return report

    def _write_block(
        self,
        student: SearchStudent,
        block: list[Passage],
        report: UpsertReport,
        table: PassageTable,
        before: PassageTable,
        advance: Advance,
        *,
        only_new: bool,
    ) -> UpsertReport:
        """One commit. ``table`` is the latest version, ``before`` an earlier one (``IndexStore.compare``)."""
        table = self._with_new_fields(block, table)
        changes = self.store.compare(block, table, before=before)
        if only_new and changes.num_new < len(block):
            there = before.by_ids([passage.id for passage in block], ["id"])["id"].to_pylist()
            problem = f"{len(there)} of the passages are there already, {there[0]!r} is one; upsert changes them"
            raise DuplicateIdError(self.folder, problem)
        advance(len(block) - len(changes.texts))
        read = read_passages(student, changes.texts, advance)
        version = self.store.write(changes, read.vectors, read.truncated, table)
        return replace(
            report,
            version=version,
            num_passages=report.num_passages + len(block),
            num_added=report.num_added + changes.num_new,
            num_updated=report.num_updated + len(changes.texts) - changes.num_new,
            num_metadata=report.num_metadata + len(changes.others),
            num_unchanged=report.num_unchanged + changes.num_unchanged,
            num_truncated=report.num_truncated + len(read.truncated),
            num_tokens=report.num_tokens + read.num_tokens,
            num_windows=report.num_windows + read.num_windows,
        )

    def _with_new_fields(self, block: list[Passage], table: PassageTable) -> PassageTable:
        known = MetadataSchema.from_arrow(table.metadata_fields)
        inferred = MetadataSchema.infer(block, known)
        new: dict[str, FieldType] = {name: kind for name, kind in inferred.fields.items() if name not in known.fields}
        if not new:
            return table
        self.store.add_fields(MetadataSchema(new))
        return self.store.table()


def _blocks(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    rest = iter(passages)
    while block := list(islice(rest, BLOCK_PASSAGES)):
        yield block


def _refuse_repeated(block: list[Passage], seen: set[int], folder: Path) -> None:
    """An id that comes twice in one call is a mistake: the second text would silently win."""
    for passage in block:
        digest = xxhash.xxh3_128_intdigest(passage.id.encode(errors="surrogatepass"))
        if digest in seen:
            which = f"two of the passages given share the id {passage.id!r}, the second is number {len(seen) + 1:,}"
            raise DuplicateIdError(folder, f"{which}; keep one of them")
        seen.add(digest)
