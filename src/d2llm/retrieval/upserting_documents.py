"""Upserts documents into an index's store: they are split, and what is left of their earlier forms is deleted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from d2llm.core.batches import batched
from d2llm.core.errors import DuplicateIdError, InputError
from d2llm.core.progress import progress_bar
from d2llm.core.types import Passage, piece_id
from d2llm.retrieval.protocols import SearchStudent
from d2llm.retrieval.reading import EncodedPassages
from d2llm.retrieval.upserting import UpsertReport, upsert_passages, warn_of_truncation
from d2llm.runners.runner import Workers
from d2llm.store.shards import Storage
from d2llm.store.side_files import Chunking, forget_chunking, read_chunking, write_chunking

if TYPE_CHECKING:
    from d2llm.retrieval.chunking import Chunker

_DOCUMENTS_AT_ONCE = 1_024


@dataclass(frozen=True, slots=True)
class DocumentsReport(UpsertReport):
    """What ``upsert_documents`` did: the ``UpsertReport``, the number of documents, and of deleted passages."""

    num_documents: int = 0
    num_deleted: int = 0


def upsert_documents(
    storage: Storage,
    student: SearchStudent,
    documents: Iterable[Passage],
    chunker: Chunker,
    *,
    only_new: bool = False,
    lenient_metadata: bool = False,
    num_documents: int | None = None,
    readers: Workers[Sequence[Passage], EncodedPassages] | None = None,
) -> DocumentsReport:
    """Split documents and add or update their passages (``Index.upsert_documents``).

    After an interruption, repeat the call to continue; until it has finished, passages of earlier versions of the
    documents may remain.
    """
    num_pieces: dict[str, int] = {}
    unfinished: deque[int] = deque()  # numbers of pieces of the documents being written

    def pieces() -> Iterator[Passage]:
        for block in batched(documents, _DOCUMENTS_AT_ONCE):
            if only_new:
                _refuse_present(block, storage)
            for document in block:
                if document.id in num_pieces:
                    problem = f"two documents share the id {document.id!r}; keep one of them"
                    raise DuplicateIdError(storage.folder, problem)
                parts = chunker.split(document)
                num_pieces[document.id] = len(parts)
                unfinished.append(len(parts))
                yield from parts

    with storage.writing(), progress_bar("indexing", num_documents) as advance:

        def finish(count: int, note: str = "", /) -> None:
            while unfinished and count >= unfinished[0]:
                count -= unfinished.popleft()
                advance(1, note)
            if unfinished:
                unfinished[0] -= count

        known, version = read_chunking(storage.folder), storage.version
        try:
            _keep_chunking(storage, chunker.chunking)
            report = upsert_passages(
                storage,
                student,
                pieces(),
                only_new=only_new,
                as_documents=True,
                lenient_metadata=lenient_metadata,
                advance=finish,
                readers=readers,
            )
            num_deleted = _delete_earlier_forms(storage, num_pieces)
        except BaseException:
            if known is None and storage.version == version:
                forget_chunking(storage.folder)  # nothing was written, so another chunking is still possible
            raise
        version = storage.version
    warn_of_truncation(report, _truncation_advice(chunker.chunking))
    values: dict[str, Any] = {item.name: getattr(report, item.name) for item in fields(report)} | {"version": version}
    return DocumentsReport(**values, num_documents=len(num_pieces), num_deleted=num_deleted)


def _truncation_advice(chunking: Chunking) -> str:
    if chunking.chunk_tokens is None:
        return "This index does not split texts; a new one (with --chunk-tokens) splits them into passages"
    return "Their titles take up more than half of a passage; shorten them, or use larger passages in a new index"


def _keep_chunking(storage: Storage, chunking: Chunking) -> None:
    """Store the chunking with the index; an empty index may still change it."""
    known = read_chunking(storage.folder)
    if known == chunking:
        return
    if known is not None and len(storage):
        raise InputError(
            f"{storage.folder}: its documents are split into {known}, and cannot also be split into {chunking}; omit "
            "the chunking, which the index stores, or make a new index"
        )
    write_chunking(storage.folder, chunking)


def _refuse_present(documents: Sequence[Passage], storage: Storage) -> None:
    present = storage.parts([document.id for document in documents])
    if present:
        name = min(document_id or passage_id for passage_id, document_id, _ in present)
        problem = f"some of the documents already exist, such as {name!r}; use upsert to update them"
        raise DuplicateIdError(storage.folder, problem)


def _delete_earlier_forms(storage: Storage, num_pieces: Mapping[str, int]) -> int:
    """Delete pieces that documents no longer have, and single passages that are now split; returns the number."""
    num_deleted = 0
    for some in batched(num_pieces, _DOCUMENTS_AT_ONCE):
        gone: list[str] = []
        for passage_id, document_id, position in storage.parts(some):
            if passage_id == piece_id(document_id, position) and passage_id not in num_pieces:
                kept = num_pieces[document_id]
                if kept == 1 or position > kept:
                    gone.append(passage_id)
            elif num_pieces.get(passage_id, 1) > 1:
                gone.append(passage_id)
        num_deleted += storage.delete(gone) if gone else 0
    return num_deleted
