"""Upserts passages and documents into an index's store.

Only new or changed texts are encoded, and each commit adds a few thousand passages.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from d2llm.core.batches import batched
from d2llm.core.errors import DuplicateIdError, IndexMismatchError, InputError
from d2llm.core.progress import Advance, ignore, progress_bar
from d2llm.core.types import PartKind, Passage, piece_id
from d2llm.models.protocols import SearchStudent, expansion_fingerprint
from d2llm.retrieval.build_ann import renew_ann
from d2llm.retrieval.reading import EncodedPassages, read_passages
from d2llm.runners.runner import LocalWorkers, Workers
from d2llm.store.blocks import Changes
from d2llm.store.index_manifest import Chunking, read_chunking, write_chunking
from d2llm.store.passage_table import PassageTable
from d2llm.store.schema import FieldType, MetadataSchema
from d2llm.store.shards import Storage

if TYPE_CHECKING:
    from d2llm.retrieval.chunking import Chunker


BLOCK_PASSAGES = 2_048
"""Passages encoded at a time, for a commit or a file: the most work that an interruption can lose."""

_BLOCK_WITH_TOKENS = 512  # fewer, because the vectors of all their tokens are in memory together

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UpsertReport:
    """What ``upsert`` did: how many passages were new, changed, changed only in metadata, or unchanged.

    Only new and changed texts were encoded; ``num_truncated`` of them were too long and were truncated.
    ``num_tokens`` counts the tokens read, without padding, including those of windows if the index stores them. A late
    chunk also counts as changed if any part of its document has changed; documents of late chunks were read in
    ``num_windows`` windows. ``left_out`` counts, by field, metadata values that did not fit and were dropped on
    request. ``num_blank`` passages have only white space; ``first_blank`` is the id of the first.
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
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    num_blank: int = 0
    first_blank: str | None = None

    @property
    def num_encoded(self) -> int:
        """Number of passages that the student encoded."""
        return self.num_added + self.num_updated


def upsert_passages(
    storage: Storage,
    student: SearchStudent,
    passages: Iterable[Passage],
    *,
    only_new: bool = False,
    as_documents: bool = False,
    lenient_metadata: bool = False,
    advance: Advance = ignore,
    readers: Workers[Sequence[Passage], EncodedPassages] | None = None,
) -> UpsertReport:
    """Add passages to a store, sharded or not, or update existing ones (``Index.upsert``).

    ``as_documents``: the passages are whole documents or pieces of documents, and the caller deletes leftover pieces of
    their earlier versions; a document stored in pieces may then become one passage.
    ``readers`` do ``read_passages`` elsewhere, instead of ``student``. They read ahead, so ``passages`` must not be an
    iterable that itself changes the index.
    """
    begin = time.perf_counter()
    kinds: tuple[PartKind, ...] = tuple(storage.part_formats)
    if "token" in kinds:
        check_projection(storage, student)
    check_expansion(storage, student)
    if readers is None:
        readers = LocalWorkers(partial(read_passages, student, parts=kinds, expand=storage.stores[0].adds_words))
    with storage.writing():
        upsert = _Upsert(
            storage, advance, only_new=only_new, as_documents=as_documents, lenient_metadata=lenient_metadata
        )
        for read in readers.map(upsert.texts(passages), advance):
            upsert.write(read)
        for store in storage.stores:
            store.update_word_files()
        report = replace(upsert.report, version=storage.version)
    for store in storage.stores:
        renew_ann(store, student, report.num_encoded)
    if report.left_out:
        named = ", ".join(f"{name} ({count:,})" for name, count in report.left_out.items())
        _log.warning("%s metadata values did not fit and were dropped: %s", f"{sum(report.left_out.values()):,}", named)
    if report.num_blank:
        _log.warning(
            "%s of the %s passages have only white space as text, the first is %r: no query can find them. Add text, "
            "or leave them out",
            f"{report.num_blank:,}",
            f"{report.num_passages:,}",
            report.first_blank,
        )
    return replace(report, seconds=time.perf_counter() - begin)


class _Upsert:
    """An upsert under way: its passages are compared with the store block by block, encoded, and written.

    Every block goes to one shard. Blocks may be compared before earlier ones are written.
    """

    def __init__(
        self, storage: Storage, advance: Advance, *, only_new: bool, as_documents: bool, lenient_metadata: bool
    ) -> None:
        self.report = UpsertReport(storage.folder, 0)
        self._storage = storage
        self._advance = advance
        self._only_new, self._as_documents, self._lenient_metadata = only_new, as_documents, lenient_metadata
        self._before = storage.tables()  # as they were before
        self._tables = list(self._before)  # their latest versions
        self._versions = [table.version for table in self._before]  # those that this upsert has made, or found
        self._seen_ids: set[int] = set()
        self._unwritten: deque[tuple[int, list[Passage], Changes]] = deque()  # with their shards

    def texts(self, passages: Iterable[Passage]) -> Iterator[list[Passage]]:
        """For each block, the passages that must be encoded."""
        size = _BLOCK_WITH_TOKENS if "token" in self._storage.part_formats else BLOCK_PASSAGES
        for shard, block in _blocks(passages, size, self._storage):
            _refuse_repeated(block, self._seen_ids, self._storage.folder)
            self.report = _count_blank(block, self.report)
            changes = self._compare(shard, block)
            self._unwritten.append((shard, block, changes))
            self._advance(len(block) - len(changes.texts))
            yield changes.texts

    def _compare(self, shard: int, block: list[Passage]) -> Changes:
        store = self._storage.stores[shard]
        self._tables[shard] = store.table()
        if self._tables[shard].version != self._versions[shard]:  # the iterable itself has changed the index
            self._before[shard] = self._tables[shard]
        if not self._as_documents:
            for before in self._before:
                _refuse_documents(block, before)
        known = self._tables[shard].metadata
        if self._lenient_metadata:
            block, left_out = known.leave_out_misfits(block)
            self.report = replace(self.report, left_out=Counter(self.report.left_out) + left_out)
        if _add_new_fields(self._storage, block, known):
            for index, other in enumerate(self._storage.stores):
                self._tables[index] = other.table()
                self._versions[index] = self._tables[index].version
        self._versions[shard] = self._tables[shard].version
        changes = store.compare(block, self._tables[shard])
        if self._only_new and (changes.num_new < len(block) or len(self._before) > 1):
            ids = [passage.id for passage in block]
            present = [row for before in self._before for row in before.by_ids(ids, ["id"])]
            if present:
                problem = f"{len(present)} of the passages already exist, such as {present[0]['id']!r}"
                raise DuplicateIdError(self._storage.folder, f"{problem}; use upsert to update them")
        return changes

    def write(self, read: EncodedPassages) -> None:
        """Write the earliest unwritten block in one commit."""
        shard, block, changes = self._unwritten.popleft()
        store = self._storage.stores[shard]
        self._versions[shard] = store.write(
            changes, read.vectors, read.truncated, self._tables[shard], read.parts, read.added
        )
        num_moved = self._delete_elsewhere(shard, block)
        report = self.report
        self.report = replace(
            report,
            version=self._versions[shard],
            num_passages=report.num_passages + len(block),
            num_added=report.num_added + changes.num_new - num_moved,
            num_updated=report.num_updated + len(changes.texts) - changes.num_new + num_moved,
            num_metadata=report.num_metadata + len(changes.others),
            num_unchanged=report.num_unchanged + changes.num_unchanged,
            num_truncated=report.num_truncated + len(read.truncated),
            num_tokens=report.num_tokens + read.num_tokens + sum(part.num_tokens for part in read.parts.values()),
            num_windows=report.num_windows + read.num_windows,
        )

    def _delete_elsewhere(self, shard: int, block: Sequence[Passage]) -> int:
        """Delete the passages that were in other shards before, under another document; returns how many moved.

        Of an upsert that was interrupted here, some may be in both shards; these do not count as moved again.
        """
        ids = [passage.id for passage in block]
        moved: set[str] = set()
        for index, store in enumerate(self._storage.stores):
            if index != shard and (elsewhere := self._ids_before(index, ids)):
                store.delete(elsewhere)
                moved.update(elsewhere)
                self._tables[index] = store.table()
                self._versions[index] = self._tables[index].version
        return len(moved.difference(self._ids_before(shard, list(moved)))) if moved else 0

    def _ids_before(self, shard: int, ids: list[str]) -> list[str]:
        """Those of the ids that the shard had before the upsert."""
        before = self._before[shard]
        return [record["id"] for record in before.by_ids(ids, ["id"])]


def _count_blank(block: Sequence[Passage], report: UpsertReport) -> UpsertReport:
    blank = [passage.id for passage in block if not passage.full_text.strip()]
    if not blank:
        return report
    first = report.first_blank if report.num_blank else blank[0]
    return replace(report, num_blank=report.num_blank + len(blank), first_blank=first)


def warn_of_truncation(report: UpsertReport, advice: str) -> None:
    """Warn if passages were too long to be read whole."""
    if report.num_truncated:
        fraction = report.num_truncated / report.num_encoded
        _log.warning(
            "%s of the %s encoded passages (%.0f%%) are longer than the student reads: their ends are ignored. %s",
            f"{report.num_truncated:,}",
            f"{report.num_encoded:,}",
            100 * fraction,
            advice,
        )


def check_projection(storage: Storage, student: SearchStudent) -> None:
    """Refuse a student whose token embeddings cannot be compared with those that the index stores."""
    made_by = storage.manifest["token_projection"]
    projection = student.token_fingerprint
    if projection != made_by:
        raise IndexMismatchError(
            f"{storage.folder}: its token embeddings were made by projection {made_by}, but the student has "
            f"{projection}; use the student that made the index (a StudentWithTokens exists only in Python), or index "
            "the corpus again"
        )


def check_expansion(storage: Storage, student: SearchStudent) -> None:
    """Refuse a student that would add other words to passages than the index has."""
    made_by, expansion = storage.manifest["document_expansion"], expansion_fingerprint(student)
    if made_by is not None and expansion != made_by:
        raise IndexMismatchError(
            f"{storage.folder}: its passages have words added by document expansion {made_by}, but the student has "
            f"{expansion or 'none'}; use the student that made the index, or index the corpus again"
        )


def _add_new_fields(storage: Storage, block: list[Passage], known: MetadataSchema) -> bool:
    """Add metadata fields that the store does not have yet, to all shards; returns whether there were any."""
    try:
        inferred = MetadataSchema.infer(block, known)
    except InputError as error:
        raise InputError(
            f"{error}. To drop values that do not fit, use --lenient-metadata on the command line (--no-metadata drops "
            "all), or lenient_metadata in Python and over HTTP"
        ) from error
    new: dict[str, FieldType] = {name: kind for name, kind in inferred.fields.items() if name not in known.fields}
    if new:
        storage.add_fields(MetadataSchema(new))
    return bool(new)


def _blocks(passages: Iterable[Passage], size: int, storage: Storage) -> Iterator[tuple[int, list[Passage]]]:
    """Blocks of passages of one shard each, with its number; those of one shard are in the order of ``passages``.

    At most ``size`` passages a shard are in memory, so that a sharded index takes as many as there are shards.
    """
    waiting: dict[int, list[Passage]] = {}
    for passage in passages:
        shard = storage.shard_of(passage)
        block = waiting.setdefault(shard, [])
        block.append(passage)
        if len(block) == size:
            yield shard, waiting.pop(shard)
    yield from sorted(waiting.items())


def _refuse_repeated(block: list[Passage], seen_ids: set[int], folder: Path) -> None:
    """Refuse an id that occurs twice in one call: the second text would silently replace the first."""
    for passage in block:
        digest = xxhash.xxh3_128_intdigest(passage.id.encode(errors="surrogatepass"))
        if digest in seen_ids:
            problem = f"two passages share the id {passage.id!r}, the second is number {len(seen_ids) + 1:,}"
            raise DuplicateIdError(folder, f"{problem}; keep one of them")
        seen_ids.add(digest)


def _refuse_documents(block: Sequence[Passage], before: PassageTable) -> None:
    """Refuse ids of documents that are stored in pieces: such a document would be in the index twice."""
    names = [passage.id for passage in block if passage.document_id in ("", passage.id)]
    pieces = before.by_ids([piece_id(name, 1) for name in names], ["id", "document_id"])
    split = [piece["document_id"] for piece in pieces if piece["id"] == piece_id(piece["document_id"], 1)]
    if split:
        raise InputError(
            f"{before.folder}: {len(split)} of the passages have the id of a document stored in pieces, such as "
            f"{split[0]!r}; delete the document first (on the command line delete --document), or upsert it as a "
            "document (upsert_documents, or /v1/documents)"
        )


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
                new_pieces = chunker.split(document)
                num_pieces[document.id] = len(new_pieces)
                unfinished.append(len(new_pieces))
                yield from new_pieces

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
                write_chunking(storage.folder, None)  # nothing was written, so another chunking is still possible
            raise
        version = storage.version
    warn_of_truncation(report, _truncation_advice(chunker.chunking))
    values: dict[str, Any] = {item.name: getattr(report, item.name) for item in fields(report)} | {"version": version}
    return DocumentsReport(**values, num_documents=len(num_pieces), num_deleted=num_deleted)


def _truncation_advice(chunking: Chunking) -> str:
    if chunking.chunk_tokens is None:
        return "This index does not split texts; a new one splits them into passages, unless it is told not to"
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
    present = storage.positions_of([document.id for document in documents])
    if present:
        name = min(document_id or passage_id for passage_id, document_id, _ in present)
        problem = f"some of the documents already exist, such as {name!r}; use upsert to update them"
        raise DuplicateIdError(storage.folder, problem)


def _delete_earlier_forms(storage: Storage, num_pieces: Mapping[str, int]) -> int:
    """Delete pieces that documents no longer have, and single passages that are now split; returns the number."""
    num_deleted = 0
    for some in batched(num_pieces, _DOCUMENTS_AT_ONCE):
        gone: list[str] = []
        for passage_id, document_id, position in storage.positions_of(some):
            if passage_id == piece_id(document_id, position) and passage_id not in num_pieces:
                kept = num_pieces[document_id]
                if kept == 1 or position > kept:
                    gone.append(passage_id)
            elif num_pieces.get(passage_id, 1) > 1:
                gone.append(passage_id)
        num_deleted += storage.delete(gone) if gone else 0
    return num_deleted
