"""HTTP routes that read and change an index: passages, documents, files, snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.convertors import StringConvertor, register_url_convertor

from d2llm.core.settings import bound
from d2llm.core.types import Passage
from d2llm.models.student import Student
from d2llm.retrieval.chunking import Chunker, changed_chunking
from d2llm.retrieval.index import Index
from d2llm.retrieval.results import num_repeated
from d2llm.retrieval.upserting import DocumentsReport
from d2llm.server.batching import Stop, in_stoppable_thread
from d2llm.server.errors import NotFoundError
from d2llm.server.logs import note_items
from d2llm.server.response_schemas import (
    DeletedResponse,
    DocumentListResponse,
    DocumentPassagesResponse,
    DocumentsResponse,
    FilesResponse,
    Joined,
    ListedDocumentResponse,
    PassageListResponse,
    PassageResponse,
    PassagesResponse,
    RestoredResponse,
    SnapshotResponse,
)
from d2llm.server.schemas import DocumentsRequest, PassagesRequest, SnapshotName, SnapshotRequest
from d2llm.server.served_index import ServedIndex, passage_of
from d2llm.server.services import (
    ERRORS,
    StrictRoute,
    TheIndex,
    WritableIndex,
    few_enough,
    few_enough_characters,
    short_enough,
)
from d2llm.server.uploads import FILES_PATH, UPLOAD_BODY, documents_of

router = APIRouter(tags=["d2llm"], responses=ERRORS, route_class=StrictRoute)


class _AnyText(StringConvertor):
    """The rest of a path, slashes and line feeds too, unlike ``path``: an id may have both."""

    regex = "(?s:.*)"


_uploads = ThreadPoolExecutor(2, thread_name_prefix="upload")  # reading files may take minutes
register_url_convertor("anypath", _AnyText())


def _query(name: str) -> Any:
    """The query parameter with the help text and bound of a field of the request with documents."""
    field = DocumentsRequest.model_fields[name]
    return Query(ge=bound(field, "ge"), description=field.description)


Cursor = Annotated[str, Query(description="The next_cursor of the previous page; empty: start from the beginning.")]
Limit = Annotated[int, Query(ge=1, le=1_000, description="Maximum number of items on a page.")]
ChunkTokens = Annotated[int | None, _query("chunk_tokens")]
ChunkOverlap = Annotated[int | None, _query("chunk_overlap")]
Lenient = Annotated[bool, _query("lenient_metadata")]


@router.get("/v1/passages")
async def list_passages(index: TheIndex, cursor: Cursor = "", limit: Limit = 100) -> PassageListResponse:
    """List the ids of all passages, page by page."""
    entries = await index.read(lambda version: version.view.list_passages(cursor, limit + 1))
    page = entries[:limit]
    return PassageListResponse(ids=page, next_cursor=page[-1] if len(entries) > limit else None)


@router.post("/v1/passages")
async def upsert_passages(body: PassagesRequest, index: WritableIndex) -> PassagesResponse:
    """Add passages, or update those whose id exists; searches find them once this request is answered."""
    few_enough(len(body.passages), index.settings, "passages")
    short_enough([passage.title + passage.text for passage in body.passages], index.settings, "passages")
    passages = [Passage(**passage.model_dump()) for passage in body.passages]
    note_items([passage.text for passage in passages])
    report = await index.write(
        lambda opened, _, stop: opened.upsert(stop.between(passages), lenient_metadata=body.lenient_metadata)
    )
    return PassagesResponse.model_validate(report)


@router.get("/v1/passages/{passage_id:anypath}")
async def get_passage(passage_id: str, index: TheIndex) -> PassageResponse:
    """Get a passage by its id."""
    return PassageResponse.model_validate(await index.read(lambda version: passage_of(version, passage_id)))


@router.delete("/v1/passages/{passage_id:anypath}")
async def delete_passage(passage_id: str, index: WritableIndex) -> DeletedResponse:
    """Delete a passage; no search finds it once this request is answered."""
    num_deleted = await index.write(lambda opened, _student, _stop: opened.delete([passage_id]))
    if not num_deleted:
        raise NotFoundError(f"there is no passage {passage_id!r} in the index")
    return DeletedResponse(num_deleted=num_deleted, version=index.version.view.version)


@router.get("/v1/documents")
async def list_documents(index: TheIndex, cursor: Cursor = "", limit: Limit = 100) -> DocumentListResponse:
    """List all documents with their passage counts, page by page; a passage without a document counts as one."""
    entries = await index.read(lambda version: version.view.list_documents(cursor, limit + 1))
    page = entries[:limit]
    return DocumentListResponse(
        documents=[ListedDocumentResponse.model_validate(entry) for entry in page],
        next_cursor=page[-1].id if len(entries) > limit else None,
    )


@router.post("/v1/documents")
async def upsert_documents(body: DocumentsRequest, index: WritableIndex) -> DocumentsResponse:
    """Split long texts into passages and add or update these; passages that a document no longer has are deleted.

    The index stores its chunking and refuses documents with a different one.
    """
    few_enough(len(body.documents), index.settings, "documents")
    for position, document in enumerate(body.documents):
        short_enough([document.title], index.settings, f"documents.{position}.title")
    documents = [Passage(**document.model_dump()) for document in body.documents]
    few_enough_characters(documents, index.settings, "documents")
    report = await _upsert_documents(
        index, documents, body.chunk_tokens, body.chunk_overlap, lenient_metadata=body.lenient_metadata
    )
    return DocumentsResponse.model_validate(report)


@router.get("/v1/documents/{document_id:anypath}")
async def get_document(document_id: str, index: TheIndex) -> DocumentPassagesResponse:
    """Get the passages of a document, ordered by position."""
    passages = await index.read(lambda version: version.view.document(document_id))
    if not passages:
        raise NotFoundError(f"there is no document {document_id!r} in the index")
    return DocumentPassagesResponse(
        id=document_id,
        passages=[PassageResponse.model_validate(passage) for passage in passages],
        repeated=num_repeated(passages) if index.version.repeats_text else [0] * len(passages),
    )


@router.delete("/v1/documents/{document_id:anypath}")
async def delete_document(document_id: str, index: WritableIndex) -> DeletedResponse:
    """Delete all passages of a document; no search finds them once this request is answered."""
    num_deleted = await index.write(lambda opened, _student, _stop: opened.delete_documents([document_id]))
    if not num_deleted:
        raise NotFoundError(f"there is no document {document_id!r} in the index")
    return DeletedResponse(num_deleted=num_deleted, version=index.version.view.version)


@router.post(FILES_PATH, openapi_extra=UPLOAD_BODY)
async def upload_files(
    request: Request,
    index: WritableIndex,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = None,
    lenient_metadata: Lenient = False,
) -> FilesResponse:
    """Add the documents in files, which are read as from a folder: a document each, or one for each row of a table.

    The id of a document is the file name, with "/" and the number for a row. JSON lines (.jsonl, .jsonl.gz) and other
    tables whose rows have an id and a text are corpora: their documents have these ids. Parts of files that were left
    out (a chapter that is a picture, an attached file) are named.
    """
    body, kind = await request.body(), request.headers.get("content-type", "")
    documents = await in_stoppable_thread(_uploads, partial(documents_of, body, kind, index.settings))
    for document in documents:  # texts are split, titles are not
        short_enough([document.title], index.settings, f"title of {document.id}")
    lenient_metadata = lenient_metadata or not documents.is_corpus
    report = await _upsert_documents(index, documents, chunk_tokens, chunk_overlap, lenient_metadata=lenient_metadata)
    return FilesResponse.model_validate(Joined(report, skipped=documents.skipped))


async def _upsert_documents(
    index: ServedIndex,
    documents: Sequence[Passage],
    chunk_tokens: int | None,
    chunk_overlap: int | None,
    *,
    lenient_metadata: bool,
) -> DocumentsReport:
    """Split documents and add or update their passages.

    Raises:
        InputError: the index has a different chunking, or a document cannot be stored.
    """
    note_items([document.text for document in documents])

    def work(opened: Index, student: Student, stop: Stop) -> DocumentsReport:
        chunking = changed_chunking(opened.folder, student, chunk_tokens=chunk_tokens, chunk_overlap=chunk_overlap)
        chunker = Chunker(student, chunking, check=stop.check)
        return opened.upsert_documents(stop.between(documents), chunker, lenient_metadata=lenient_metadata)

    return await index.write(work)


async def _snapshots(index: ServedIndex, *, having: str | None = None) -> SnapshotResponse:
    """The names of all snapshots.

    Raises:
        NotFoundError: ``having`` is not among them.
    """
    names = await index.read(lambda _: index.open_storage().snapshots())
    if having is not None and having not in names:
        raise NotFoundError(f"there is no snapshot {having!r} of the index")
    return SnapshotResponse(snapshots=names)


@router.get("/v1/index/snapshots")
async def list_snapshots(index: TheIndex) -> SnapshotResponse:
    """List the names of all snapshots."""
    return await _snapshots(index)


@router.post("/v1/index/snapshots")
async def take_snapshot(body: SnapshotRequest, index: WritableIndex) -> SnapshotResponse:
    """Save the current state of the index under a name."""
    await index.write(lambda opened, _student, _stop: opened.snapshot(body.name))
    return await _snapshots(index)


@router.delete("/v1/index/snapshots/{name}")
async def drop_snapshot(name: SnapshotName, index: WritableIndex) -> SnapshotResponse:
    """Delete a snapshot."""
    await _snapshots(index, having=name)
    await index.write(lambda opened, _student, _stop: opened.store.drop_snapshot(name))
    return await _snapshots(index)


@router.post("/v1/index/snapshots/{name}/restore")
async def restore_snapshot(name: SnapshotName, index: WritableIndex) -> RestoredResponse:
    """Replace the index's passages by a snapshot's; searches find those once this request is answered."""
    await _snapshots(index, having=name)
    num_passages = await index.write(lambda opened, _student, _stop: opened.restore(name))
    return RestoredResponse(num_passages=num_passages, version=index.version.view.version)
