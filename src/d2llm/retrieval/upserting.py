"""Upserts passages into an index's store. Only new or changed texts are encoded; each commit adds a few thousand."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from d2llm.core.errors import DuplicateIdError, IndexMismatchError, InputError
from d2llm.core.progress import Advance, ignore
from d2llm.core.types import PartKind, Passage
from d2llm.retrieval.project import extend_projections
from d2llm.retrieval.protocols import SearchStudent, TokenStudent
from d2llm.retrieval.reading import read_passages, read_windows
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import ReadParts
from d2llm.store.passage_table import PassageTable
from d2llm.store.schema import FieldType, MetadataSchema

BLOCK_PASSAGES = 2_048
"""Passages encoded at a time, for a commit or a file: the most work that an interruption can lose."""

_BLOCK_WITH_TOKENS = 512  # fewer, because the vectors of all their tokens are in memory together
_WINDOWS_AT_ONCE = 128  # passages whose windows are encoded together

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
    store: IndexStore,
    student: SearchStudent,
    passages: Iterable[Passage],
    *,
    only_new: bool = False,
    as_documents: bool = False,
    lenient_metadata: bool = False,
    advance: Advance = ignore,
) -> UpsertReport:
    """Add passages to a store, or update existing ones (``Index.upsert``).

    ``as_documents``: the passages are whole documents or pieces of documents, and the caller deletes leftover pieces of
    their earlier versions; a document stored in pieces may then become one passage.
    """
    begin = time.perf_counter()
    report = UpsertReport(store.folder, 0)
    seen_ids: set[int] = set()
    with store.writing():
        # Ids are looked up in the table as it was before, which is indexed; no id can occur twice in one call. New rows
        # of the growing table are not indexed, so that looking ids up there would get slower with each block.
        store.update_indices()
        before = store.table()
        written = before.version
        size = _BLOCK_WITH_TOKENS if "token" in store.part_formats else BLOCK_PASSAGES
        for block in _blocks(passages, size):
            _refuse_repeated(block, seen_ids, store.folder)
            report = _count_blank(block, report)
            table = store.table()
            if table.version != written:  # the iterable itself has changed the index
                before = store.table()
            if not as_documents:
                _refuse_documents(block, before)
            known = MetadataSchema.from_arrow(table.metadata_fields)
            if lenient_metadata:
                block, left_out = known.leave_out_misfits(block)
                report = replace(report, left_out=Counter(report.left_out) + left_out)
            table = _with_new_fields(store, block, known, table)
            report = _write_block(store, student, block, report, table, before, advance, only_new=only_new)
            written = report.version
        store.update_indices()
        extend_projections(store, student)
        version = store.table().version
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
    return replace(report, version=version, seconds=time.perf_counter() - begin)


def _count_blank(block: Sequence[Passage], report: UpsertReport) -> UpsertReport:
    blank = [passage.id for passage in block if not passage.full_text.strip()]
    if not blank:
        return report
    first = report.first_blank if report.num_blank else blank[0]
    return replace(report, num_blank=report.num_blank + len(blank), first_blank=first)


def warn_of_truncation(report: UpsertReport, advice: str) -> None:
    """Warn if passages were too long to be read whole."""
    if report.num_truncated:
        share = report.num_truncated / report.num_encoded
        _log.warning(
            "%s of the %s encoded passages (%.0f%%) are longer than the student reads: their ends are ignored. %s",
            f"{report.num_truncated:,}",
            f"{report.num_encoded:,}",
            100 * share,
            advice,
        )


def _write_block(
    store: IndexStore,
    student: SearchStudent,
    block: list[Passage],
    report: UpsertReport,
    table: PassageTable,
    before: PassageTable,
    advance: Advance,
    *,
    only_new: bool,
) -> UpsertReport:
    """Write one commit. ``table`` is the latest version, ``before`` an earlier one (``IndexStore.compare``)."""
    changes = store.compare(block, table, before=before)
    if only_new and changes.num_new < len(block):
        present = before.by_ids([passage.id for passage in block], ["id"])["id"].to_pylist()
        problem = f"{len(present)} of the passages already exist, such as {present[0]!r}; use upsert to update them"
        raise DuplicateIdError(store.folder, problem)
    advance(len(block) - len(changes.texts))
    with_windows, with_tokens = "window" in store.part_formats, "token" in store.part_formats
    if with_tokens:
        check_projection(store, student)
    read = read_passages(student, changes.texts, None if with_windows else advance, with_tokens=with_tokens)
    parts: dict[PartKind, ReadParts] = {}
    if with_windows:
        parts["window"] = _read_windows(student, changes.texts, advance)
    if read.tokens is not None:
        parts["token"] = read.tokens
    version = store.write(changes, read.vectors, read.truncated, table, parts)
    return replace(
        report,
        version=version,
        num_passages=report.num_passages + len(block),
        num_added=report.num_added + changes.num_new,
        num_updated=report.num_updated + len(changes.texts) - changes.num_new,
        num_metadata=report.num_metadata + len(changes.others),
        num_unchanged=report.num_unchanged + changes.num_unchanged,
        num_truncated=report.num_truncated + len(read.truncated),
        num_tokens=report.num_tokens + read.num_tokens + sum(part.num_tokens for part in parts.values()),
        num_windows=report.num_windows + read.num_windows,
    )


def check_projection(store: IndexStore, student: SearchStudent) -> None:
    """Refuse a student whose vectors of tokens cannot be compared with those that the index stores."""
    made_by = store.manifest["token_projection"]
    own = student.token_fingerprint if isinstance(student, TokenStudent) else None
    if own != made_by:
        raise IndexMismatchError(
            f"{store.folder}: its vectors of tokens were made by projection {made_by}, but the student has {own}; "
            "use the student that made the index, or index the corpus again"
        )


def _read_windows(student: SearchStudent, passages: Sequence[Passage], advance: Advance) -> ReadParts:
    """Encode the windows of some passages at a time, to advance the progress bar, which counts passages."""
    parts = [ReadParts(np.zeros((0, student.vector_dim), np.float32), np.zeros(0, np.int64), 0)]
    for start in range(0, len(passages), _WINDOWS_AT_ONCE):
        block = passages[start : start + _WINDOWS_AT_ONCE]
        parts.append(read_windows(student, [passage.full_text for passage in block]))
        advance(len(block))
    vectors, counts, num_tokens = zip(*parts, strict=True)
    return ReadParts(np.concatenate(vectors), np.concatenate(counts), sum(num_tokens))


def _with_new_fields(
    store: IndexStore, block: list[Passage], known: MetadataSchema, table: PassageTable
) -> PassageTable:
    try:
        inferred = MetadataSchema.infer(block, known)
    except InputError as error:
        raise InputError(
            f"{error}. To drop values that do not fit, use --lenient-metadata on the command line (--no-metadata drops "
            "all), or lenient_metadata in Python and over HTTP"
        ) from error
    new: dict[str, FieldType] = {name: kind for name, kind in inferred.fields.items() if name not in known.fields}
    if not new:
        return table
    store.add_fields(MetadataSchema(new))
    return store.table()


def _blocks(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    rest = iter(passages)
    while block := list(islice(rest, size)):
        yield block


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
    pieces = before.by_ids([piece_id(name, 1) for name in names], ["id", "document_id"]).to_pylist()
    split = [piece["document_id"] for piece in pieces if piece["id"] == piece_id(piece["document_id"], 1)]
    if split:
        raise InputError(
            f"{before.folder}: {len(split)} of the passages have the id of a document stored in pieces, such as "
            f"{split[0]!r}; delete the document first (on the command line delete --document), or upsert it as a "
            "document (upsert_documents, or /v1/documents)"
        )


def piece_id(document_id: str, number: int) -> str:
    """The id of a document's piece; pieces are numbered from 1."""
    return f"{document_id}#{number}"
