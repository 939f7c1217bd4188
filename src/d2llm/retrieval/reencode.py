"""Gives an index another student: a new index of the same passages is made beside it, and takes its place at the end.

The index can be searched, served and changed meanwhile. What has changed is brought over at the end, while writers
wait. After an interruption, the same call goes on after the last commit. The vectors of the old student are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.core.files import replace_folder
from d2llm.core.progress import progress_bar
from d2llm.core.types import EngineName, Passage
from d2llm.models.protocols import task_for
from d2llm.retrieval.index import Index
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.upserting import BLOCK_PASSAGES, upsert_passages
from d2llm.store.index_manifest import write_chunking
from d2llm.store.schema import FieldType, MetadataSchema


@dataclass(frozen=True, slots=True)
class ReencodeReport:
    """What ``reencode`` did; passages of an interrupted call are not encoded again.

    ``num_caught_up`` passages were added, changed or deleted while the others were encoded.
    """

    folder: Path
    student: str
    num_passages: int
    num_encoded: int
    num_caught_up: int


def reencode(
    folder: str | Path,
    student: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    engine: EngineName = "auto",
) -> ReencodeReport:
    """Encode the passages of an index with another student, and let it take the place of the index's student.

    Args:
        folder: the index, which is not sharded.
        student: the new student, its folder or the name of a shipped one.
        device: where it computes.
        dtype: its number format.
        engine: the engine that encodes.

    Raises:
        InputError: the index is sharded, has snapshots, or late chunks, or already has this student.
        ModelError: the student cannot be loaded.
        IndexLockedError: another process is writing at the end; repeat the call.
    """
    from d2llm.models.student import Student

    index = Index.open(folder)
    _check(index)
    loaded = Student.load(student, device=device, dtype=dtype, engine=engine)
    if index.view.student_fingerprint == loaded.fingerprint:
        raise InputError(f"{index.folder}: its passages are already encoded by this student; give another one")
    draft = index.folder.resolve().with_name(f".{index.folder.name}.reencoded-{loaded.fingerprint[:16]}")
    spec = index.spec.replace(
        task=task_for(loaded, index.view.task), window_vectors="auto", token_vectors="auto", metadata=None
    )
    new = Index.create(draft, loaded, spec, student_source=_source(loaded, student), exist_ok=True)
    known = new.view.metadata.fields
    fields: dict[str, FieldType] = {
        name: kind for name, kind in index.view.metadata.fields.items() if name not in known
    }
    if fields:
        new.storage.add_fields(MetadataSchema(fields))
    num_encoded, _ = _copy(index.view, new)
    with index.storage.writing():
        index.refresh()
        num_caught_up, num_deleted = _copy(index.view, new)
        write_chunking(draft, index.chunking)
        num_passages = len(new)
        new.close()
        del new
        replace_folder(draft, index.folder.resolve())
    return ReencodeReport(
        index.folder, loaded.fingerprint, num_passages, num_encoded + num_caught_up, num_caught_up + num_deleted
    )


def _copy(source: IndexView, target: Index) -> tuple[int, int]:
    """Give an index the passages of another; returns how many were encoded, and how many deleted."""
    rows = source.live_rows()

    def passages() -> Iterator[Passage]:
        for block in batched(rows.tolist(), BLOCK_PASSAGES):
            yield from source.passages(np.array(block, np.int64))

    with progress_bar("encoding", len(rows)) as advance:
        report = upsert_passages(target.storage, target.student, passages(), as_documents=True, advance=advance)
    target.refresh()
    names = target.view.ids(target.view.live_rows())
    gone: list[str] = []
    for block in batched(names, BLOCK_PASSAGES):
        present = {name for segment in source.segments for name in segment.rows_of(block)}
        gone += [name for name in block if name not in present]
    return report.num_encoded, target.delete(gone) if gone else 0


def _check(index: Index) -> None:
    """Refuse an index that cannot be encoded passage by passage, or would lose something."""
    if index.storage.num_shards is not None:
        raise InputError(
            f"{index.folder}: a sharded index cannot be encoded again in place; make another one from its passages "
            "(Index.to_arrow) or documents"
        )
    if index.chunking is not None and index.chunking.late:
        raise InputError(
            f"{index.folder}: its passages are late chunks, which are encoded with what stands around them; index the "
            "documents again"
        )
    if snapshots := index.store.snapshots():
        raise InputError(
            f"{index.folder}: its snapshots ({', '.join(snapshots)}) are of the old student and would go; copy them, "
            "and delete them first (d2llm index INDEX snapshot NAME --drop)"
        )


def _source(loaded: object, student: str | Path) -> str | None:
    source = getattr(loaded, "source", None)
    return source if isinstance(source, str) else str(student)
