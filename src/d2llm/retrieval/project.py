"""The ``project`` verb: store W_p b of every passage beside its vector, so that scoring skips that product."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from d2llm.core.errors import InputError
from d2llm.core.progress import progress_bar
from d2llm.retrieval.protocols import ProjectingStudent, SearchStudent
from d2llm.store.index_store import IndexStore
from d2llm.store.projections import as_codes, create_file, open_file, projections_of
from d2llm.store.storage import storage_errors
from d2llm.store.vector_file import VectorFile
from d2llm.store.view import PassageView

_log = logging.getLogger(__name__)
_BLOCK_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class ProjectReport:
    """What is stored: ``num_rows`` rows of ``width`` bfloat16 numbers, ``num_added`` of them added by this call."""

    folder: str
    version: int
    num_passages: int
    num_rows: int
    num_added: int
    width: int
    bytes_per_row: int
    num_bytes: int
    seconds: float


def project(store: IndexStore, student: SearchStudent) -> ProjectReport:
    """Store W_p b of all passages of the latest version; those that are already stored are not computed again.

    An interrupted run resumes where it stopped. Searches use the stored projections immediately and compute those of
    passages added later; every upsert calls ``extend_projections``. A compaction that renumbers rows drops them.

    Args:
        store: the index. Its write lock is held during the call.
        student: the student that made its vectors; its head must have the features ``concat``.

    Raises:
        InputError: the head's first product also depends on the query, or there are no passages.
        IndexMismatchError: another student made the index.
        IndexLockedError: another process is writing.
        StorageError: the file cannot be written.
    """
    begin = time.perf_counter()
    with store.writing():
        view = PassageView(store)
        view.check_student(student.fingerprint)
        if not isinstance(student, ProjectingStudent):
            raise InputError("this kind of student has no projections to store; use a d2llm student")
        width = student.project_passages(view.block(0, min(1, view.capacity))).shape[1]  # raises if the head has none
        if not len(view):
            raise InputError(f"{store.folder}: holds no passages; upsert some, then store their projections")
        vectors = view.vector_file
        if vectors is None:
            raise InputError(
                f"{store.folder}: its vectors could not be written beside the table; see the log and fix that first"
            )
        with storage_errors(store.folder):
            file = _file_to_extend(view, vectors, width)
            num_added = _append(view, student, file)
    return ProjectReport(
        folder=str(store.folder),
        version=view.version,
        num_passages=len(view),
        num_rows=file.capacity,
        num_added=num_added,
        width=width,
        bytes_per_row=file.code_size,
        num_bytes=file.num_bytes,
        seconds=time.perf_counter() - begin,
    )


def extend_projections(store: IndexStore, student: SearchStudent) -> None:
    """Store the projections of newly added passages, if usable projections of the earlier ones are stored."""
    if any(store.folder.glob("projections-*.bin")):
        view = PassageView(store)
        if view.projections is not None and len(view):
            project(store, student)


def _file_to_extend(view: PassageView, vectors: VectorFile, width: int) -> VectorFile:
    """The existing file, if it is complete and made from these vectors; else an empty one."""
    source = projections_of(view.student_fingerprint, view.format.name)
    if view.projections is not None and view.projections.width == width:
        return open_file(vectors, view.generation, source)
    return create_file(vectors, view.generation, source, width)


def _append(view: PassageView, student: ProjectingStudent, file: VectorFile) -> int:
    """Add the missing rows, up to the last that holds a passage; returns their number.

    Rows beyond that one were left by an interrupted writer; their numbers are reused if the vectors are rebuilt.
    """
    first = file.capacity
    end = view.capacity if view.live is None else int(np.flatnonzero(view.live)[-1]) + 1
    with progress_bar("projecting", max(end - first, 0)) as advance:
        for start in range(first, end, _BLOCK_ROWS):
            block = view.block(start, min(start + _BLOCK_ROWS, end))
            file.append(as_codes(student.project_passages(block)))
            advance(len(block))
    return max(end - first, 0)
