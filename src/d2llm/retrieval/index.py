"""An index that lives: a durable store of passages with the student that reads them and searches them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import InputError
from d2llm.core.progress import Advance, progress_bar
from d2llm.core.types import EngineName, Passage, Query, Ranking, Task
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.row_evidence import evidence_weights
from d2llm.store import listing
from d2llm.store.index_store import KEEP_VERSIONS, IndexStore
from d2llm.store.inspection import IndexStats, VerifyReport, stats, verify
from d2llm.store.listing import ListedDocument
from d2llm.store.schema import FieldType, MetadataSchema
from d2llm.store.side_files import Chunking, read_chunking
from d2llm.store.stored_vectors import VectorCopies
from d2llm.store.view import PassageView
from d2llm.store.window_vectors import ReadWindows

# Whoever reads an index without searching it needs neither torch nor a student: they are imported where they are used.
if TYPE_CHECKING:
    from d2llm.models.student import Student
    from d2llm.retrieval.cascade import Rereader
    from d2llm.retrieval.chunking import DocumentsReport
    from d2llm.retrieval.exact_search import KeptReaches
    from d2llm.retrieval.settings import SearchSettings
    from d2llm.retrieval.upserting import UpsertReport


WINDOW_FORMAT = "int3"
"""How the vectors of windows are stored by default (``store.vector_formats``)."""


def window_format(student: SearchStudent, task: Task, requested: str | None) -> str | None:
    """The format of the windows' vectors in a new index, None for none of them.

    ``asked`` "none" is None; "auto" as well, unless the student's score counts windows.
    """
    if requested != "auto":
        return None if requested == "none" else requested
    return WINDOW_FORMAT if evidence_weights(student, task).counts_windows else None


def find_source(source: object, folder: Path) -> str:
    """The student that an index remembers.

    Raises:
        InputError: it remembers none, or the folder is gone.
    """
    if not isinstance(source, str):
        raise InputError(f"{folder}: the index does not know where its student is; name it with --student")
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise InputError(f"{folder}: its student was in {source}, which is not there; name it with --student")
    return source


def source_of(student: str | Path) -> str:
    """What an index remembers of where its student was loaded from."""
    return str(Path(student).resolve()) if Path(student).is_dir() else str(student)


class Index:
    """Passages that can be searched while they change. Make one with ``create``, open it with ``open``.

    Readers see one version until ``refresh``; a write through this object refreshes it.
    """

    def __init__(self, store: IndexStore, student: SearchStudent | str | Path | None, **loading: Any) -> None:
        self.store = store
        self._student_or_source = student
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
        window_vectors: str | None = "auto",
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
            task: what a search asks by default.
            vector_format: how vectors are stored (``store.vector_formats.FORMATS``).
            vector_copies: 2, so that a damaged copy is made good from the other; 1 takes less space, and what is
                damaged must be encoded again (``verify``).
            window_vectors: how the vectors of passages' windows are stored, which the student's score may count
                (``models.evidence``): a format, None for none of them, or "auto": as int3 where its score counts them.
            metadata: fields with their types; fields that come later are inferred from their values all the same.
            student_source: where the student was loaded from, so that ``open`` finds it again; known where ``student``
                is a folder or name.
            device: of the student, if it has to be loaded.
            dtype: its number format.
            engine: what encodes texts with it (``models.engines.engines``).

        Raises:
            InputError: something is in the way, or a format, field or type is unknown.
            ModelError: the student cannot be loaded.
        """
        from d2llm.models.student import Student

        is_named = isinstance(student, str | Path)
        loaded = Student.load(student, device=device, dtype=dtype, engine=engine) if is_named else student
        store = IndexStore.create(
            Path(folder),
            student_fingerprint=loaded.fingerprint,
            dim=loaded.vector_dim,
            task=task,
            vector_format=vector_format,
            vector_copies=vector_copies,
            window_format=window_format(loaded, task, window_vectors),
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
        lean: bool = False,
    ) -> Index:
        """Open an existing index. Its student is loaded when it is first needed.

        Args:
            folder: of an index, or of a snapshot of one.
            student: the student that made it, if it is no longer where it was then.
            device: of the student.
            dtype: its number format.
            engine: what encodes texts with it (``models.engines.engines``).
            lean: load what encodes queries and scores, and no more, where the student allows (``Student.load``):
                quicker, for one who asks a few questions and changes nothing.

        Raises:
            DataFormatError: there is no index, or it is damaged.
        """
        return cls(IndexStore.open(Path(folder)), student, device=device, dtype=dtype, engine=engine, lean=lean)

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
        source = self._student_or_source
        if source is None:
            source = find_source(self.store.manifest.get("student_source"), self.folder)
        if isinstance(source, str | Path):
            from d2llm.models.student import Student

            student: SearchStudent = Student.load(source, **self._loading)
        else:
            student = source
        self.store.check_student(student.fingerprint)
        return student

    @cached_property
    def view(self) -> PassageView:
        """The version that this object reads."""
        return PassageView(self.store)

    @cached_property
    def _reaches(self) -> KeptReaches:
        from d2llm.retrieval.exact_search import KeptReaches

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
        lenient_metadata: bool = False,
        num_passages: int | None = None,
        show_progress: bool | None = False,
    ) -> UpsertReport:
        """Add passages, and change those whose id is there. Texts that are as they were are not encoded again.

        A late chunk is as it was if all of its document is. Every 2,048 passages are one commit. Interrupted, the same
        call goes on behind the last.

        Args:
            passages: read one after another, never held together.
            only_new: refuse passages whose id is there.
            lenient_metadata: leave out metadata values that do not fit, and count them.
            num_passages: how many will come, for the progress bar.
            show_progress: None means: if standard error is a terminal.

        Raises:
            DuplicateIdError: two passages share an id.
            InputError: a passage cannot be stored, its metadata do not fit, or its id is that of a document that was
                split; the blocks before it are kept.
            IndexLockedError: another process is writing.
            StorageError: it cannot be written; the blocks before are kept.
        """
        from d2llm.retrieval.upserting import upsert_passages, warn_of_truncation

        student = self.student
        try:
            with progress_bar("indexing", num_passages or 0, show=show_progress) as advance:
                report = upsert_passages(
                    self.store, student, passages, only_new=only_new, lenient_metadata=lenient_metadata, advance=advance
                )
        finally:
            self.refresh()
        warn_of_truncation(
            report,
            "Give long texts as documents, which are split into passages: with --chunk-tokens on the command line, "
            "upsert_documents in Python, /v1/documents over HTTP",
        )
        return report

    def upsert_documents(
        self,
        documents: Iterable[Passage],
        chunking: Chunking | None = None,
        *,
        only_new: bool = False,
        lenient_metadata: bool = False,
        num_documents: int | None = None,
        show_progress: bool | None = False,
    ) -> DocumentsReport:
        """Add texts of any length, or change those that are there: long ones are split into passages.

        The index remembers how its documents are cut, and refuses to cut others in another way.

        Args:
            documents: read one after another.
            chunking: how to split; None: as the index does, or as its first documents are: ``Chunking()``.
            only_new: refuse documents that are there.
            lenient_metadata: leave out metadata values that do not fit, and count them.
            num_documents: how many will come, for the progress bar.
            show_progress: None means: if standard error is a terminal.

        Raises:
            DuplicateIdError: two documents share an id, or one is there already (``only_new``).
            InputError: the index cuts documents in another way, or a reason of ``upsert`` or ``Chunker``.
            IndexLockedError: another process is writing.
            StorageError: it cannot be written; the blocks before are kept.
        """
        from d2llm.retrieval.chunking import Chunker, choose_chunking, upsert_documents

        student = cast("Student", self.student)  # the only one that has a tokenizer to count with
        chunker = Chunker(student, choose_chunking(self.folder, student, chunking))
        return upsert_documents(
            self,
            documents,
            chunker,
            only_new=only_new,
            lenient_metadata=lenient_metadata,
            num_documents=num_documents,
            show_progress=show_progress,
        )

    @property
    def chunking(self) -> Chunking | None:
        """How it cuts documents into passages; None where it has no documents so far."""
        return read_chunking(self.folder)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages from vectors, BM25 and results at once; returns their number.

        Raises:
            InputError: an id is no valid text.
            IndexLockedError: another process is writing.
        """
        num_deleted = self.store.delete(list(ids))
        self.refresh()
        return num_deleted

    def delete_documents(self, ids: Iterable[str]) -> int:
        """Delete all passages of these documents; returns the number of passages.

        Raises:
            InputError: an id is no valid text.
            IndexLockedError: another process is writing.
        """
        with self.store.writing():
            ids_by_document = listing.passages_of(self.store.table(), list(ids))
            passage_ids = [passage_id for pieces in ids_by_document.values() for passage_id in pieces]
            return self.delete(passage_ids) if passage_ids else 0

    def compact(self, keep: timedelta = KEEP_VERSIONS, *, dense: bool | None = None) -> tuple[int, int]:
        """Free the space of what is no longer there; bytes before and after. Arguments: ``IndexStore.compact``."""
        sizes = self.store.compact(keep, dense=dense)
        self.refresh()
        return sizes

    def snapshot(self, name: str) -> Path:
        """Keep the latest version under a name, as a folder that ``open`` takes; it takes hardly any space."""
        return self.store.snapshot(name)

    def restore(self, name: str) -> int:
        """Make a snapshot's passages those of the index; returns their number."""
        num_passages = self.store.restore(name)
        self.refresh()
        return num_passages

    # Reading -------------------------------------------------------------------------------------------------------

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in their order; missing ones are left out."""
        return self.view.get(ids)

    def get_document(self, document_id: str) -> list[Passage]:
        """The passages of a document, by position; none if it is missing.

        Raises:
            InputError: the id is no valid text.
        """
        return self.view.document(document_id)

    def list_passages(self, cursor: str = "", limit: int = listing.PAGE_SIZE) -> list[str]:
        """The ids of passages, in order, a page at a time: the first ``limit`` behind the id ``cursor``.

        Raises:
            InputError: ``cursor`` is no valid text, or ``limit`` is below 1.
        """
        return self.view.list_passages(cursor, limit)

    def list_documents(self, cursor: str = "", limit: int = listing.PAGE_SIZE) -> list[ListedDocument]:
        """``list_passages`` for documents, with their numbers of passages; one without a document is its own."""
        return self.view.list_documents(cursor, limit)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that the latest version does not have, in their order, each once."""
        present = set(self.store.table().by_ids(list(dict.fromkeys(ids)), ["id"])["id"].to_pylist())
        return [passage_id for passage_id in dict.fromkeys(ids) if passage_id not in present]

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
        from d2llm.retrieval.search import Searcher
        from d2llm.retrieval.settings import changed

        query_list = [queries] if isinstance(queries, str) else queries
        return Searcher(
            self.view, self.student, changed(settings, changes), reaches=self._reaches, cascade=cascade
        ).rank(query_list)

    def stats(self) -> IndexStats:
        """What the latest version holds, and how many bytes it takes."""
        return stats(self.store)

    def verify(
        self, *, repair: bool = False, go_back: bool = False, show_progress: bool | None = False
    ) -> VerifyReport:
        """Whether all is as it was written; what ``repair`` and ``go_back`` do about it: ``store.inspection.verify``.

        Where the vectors are kept once, the student encodes again those that are lost; interrupted, the same call goes
        on where it was. Vectors of windows are kept once: where some are damaged, all are read again.
        ``show_progress`` None means: if standard error is a terminal.

        Raises:
            IndexLockedError: another process is writing, and something has to be repaired.
            StorageError: a repaired file cannot be written.
        """
        with ExitStack() as stack:
            from d2llm.retrieval.reading import read_windows

            advances: list[Advance] = []  # one, when there is something to encode
            windows: list[Advance] = []

            def encode(passages: Sequence[Passage]) -> NDArray[np.float32]:
                if not advances:
                    advances.append(stack.enter_context(progress_bar("encoding again", None, show=show_progress)))
                encoded = self.student.encode_passages([passage.full_text for passage in passages])
                advances[0](len(passages))
                return encoded.vectors

            def encode_windows(texts: Sequence[str]) -> ReadWindows:
                if not windows:
                    windows.append(stack.enter_context(progress_bar("reading windows again", None, show=show_progress)))
                windows_read = read_windows(self.student, texts)
                windows[0](len(texts))
                return windows_read

            report = verify(self.store, repair=repair, go_back=go_back, encode=encode, encode_windows=encode_windows)
        self.refresh()
        return report
