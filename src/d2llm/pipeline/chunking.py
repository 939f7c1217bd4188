"""Long texts as passages that a student reads whole."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.types import LateChunk, Passage, WholeText
from d2llm.models.backbone import TOKENIZING
from d2llm.models.student import Student
from d2llm.pipeline.index import Index, UpsertReport

_LEAST_TOKENS = 8
_DOCUMENTS_AT_ONCE = 1_024


class Chunker:
    """Splits documents into passages of at most so many of the student's tokens, at the ends of sentences if it can.

    A piece ends at the end of a chapter, paragraph, sentence or word, the first of these that fits, by Unicode's rules,
    which hold for every script. Nothing is lost but white space between pieces.

    Late chunks are the same pieces, but an index reads each document whole and pools every piece from states that have
    seen the rest (``models.late_chunking``). When anything in a document changes, all of it is encoded again.
    """

    def __init__(
        self,
        student: Student,
        max_tokens: int,
        overlap_tokens: int = 0,
        *,
        late: bool = False,
        window_tokens: int | None = None,
    ) -> None:
        """Prepare to split.

        Args:
            student: whose tokens are counted.
            max_tokens: of a passage with its title and the model's own tokens, as the student reads it.
            overlap_tokens: at most so many are repeated from the passage before, in whole sentences or words.
            late: make late chunks.
            window_tokens: of a document read at once for late chunks; by default as many as the backbone can.

        Raises:
            InputError: fewer than 8 tokens, more than the student reads, or as much overlap as text; the student cannot
                read late chunks, or a window is smaller than a passage or larger than the backbone reads.
            MissingExtraError: semantic-text-splitter is not installed.
        """
        limit = student.config.backbone.max_passage_tokens
        if not _LEAST_TOKENS <= max_tokens <= limit:
            raise InputError(
                f"a passage is to have {max_tokens} tokens, but this student reads {limit}; give {_LEAST_TOKENS} to "
                f"{limit}"
            )
        if not 0 <= overlap_tokens < max_tokens // 2:
            raise InputError(
                f"the overlap is {overlap_tokens} tokens, but must be at least 0 and less than half of {max_tokens}"
            )
        if window_tokens is not None and not late:
            raise InputError(
                f"a window of {window_tokens} tokens is for late chunks alone; ask for these, or leave it out"
            )
        if window_tokens is not None and window_tokens < max_tokens:
            raise InputError(
                f"a window of {window_tokens} tokens does not hold a passage of {max_tokens}; give more, or none"
            )
        self.window_tokens = student.chunk_reader.window(window_tokens) if late else None
        self.late = late
        self.max_tokens = max_tokens
        self.overlap_tokens = overlap_tokens
        self._tokenizer: Any = copy.deepcopy(student.backbone.tokenizer)  # two threads must not share one
        self._around = len(self._tokenizer(student.config.backbone.passage_prefix, verbose=False)["input_ids"])
        self._splitters: dict[int, Any] = {}

    def split(self, document: Passage) -> list[Passage]:
        """A document as passages ``<id>#1``, ``<id>#2``, ... at positions 1, 2, ..., with its title and metadata.

        Every passage has the title. One that leaves less than half of the tokens to the text makes the passages longer
        than the student reads; what it cuts is counted when they are encoded.

        Raises:
            InputError: the passage is a part of a document already.
        """
        if document.document_id not in ("", document.id):
            raise InputError(
                f"passage {document.id!r} is a part of document {document.document_id!r} already; index it as it is"
            )
        splitter = self._splitter(document.title)
        pieces: list[tuple[int, str]] = splitter.chunk_indices(document.text) or [(0, document.text)]
        passages = [
            replace(document, id=f"{document.id}#{n}", text=text, document_id=document.id, position=n)
            for n, (_, text) in enumerate(pieces, start=1)
        ]
        if not self.late:
            return passages
        whole = WholeText(document.text, document.title, self.window_tokens)
        return [
            LateChunk(p.id, p.text, p.title, p.document_id, p.position, p.metadata, whole, start, start + len(p.text))
            for p, (start, _) in zip(passages, pieces, strict=True)
        ]

    def _splitter(self, title: str) -> Any:
        room = self.max_tokens - self._around - (self._count(title + "\n") if title else 0)
        room = max(room, self.max_tokens // 2)
        if room not in self._splitters:
            package = require("semantic_text_splitter", extra="documents", purpose="splitting long texts")
            overlap = min(self.overlap_tokens, room - 1)
            with TOKENIZING:
                self._splitters[room] = package.TextSplitter.from_huggingface_tokenizer(
                    self._tokenizer.backend_tokenizer, room, overlap
                )
        return self._splitters[room]

    def _count(self, text: str) -> int:
        with TOKENIZING:
            return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class DocumentsReport:
    """What ``upsert_documents`` did: how many documents, what became of their passages, and how many went."""

    num_documents: int
    num_deleted: int
    passages: UpsertReport


def upsert_documents(index: Index, documents: Iterable[Passage], chunker: Chunker, **options: Any) -> DocumentsReport:
    """Split documents and add them, or change those that are there. Passages that a document no longer has are deleted.

    Interrupted, the same call goes on; until it has ended, passages of an earlier form may still be there.

    Args:
        index: where they go.
        documents: read one after another; each with a text of any length.
        chunker: splits them.
        options: of ``Index.upsert``.

    Raises:
        DuplicateIdError: two documents share an id.
        InputError: a document is a part of another already, or a reason of ``Index.upsert``.
    """
    num_pieces: dict[str, int] = {}

    def pieces() -> Iterator[Passage]:
        for document in documents:
            found = chunker.split(document)
            num_pieces[document.id] = len(found)
            yield from found

    report = index.upsert(pieces(), **options)
    num_deleted = 0
    names = list(num_pieces)
    for start in range(0, len(names), _DOCUMENTS_AT_ONCE):
        some = names[start : start + _DOCUMENTS_AT_ONCE]
        kept = {f"{name}#{n}" for name in some for n in range(1, num_pieces[name] + 1)}
        gone = [passage_id for passage_id in index.view.parts(some) if passage_id not in kept]
        num_deleted += index.delete(gone) if gone else 0
    return DocumentsReport(len(names), num_deleted, report)
