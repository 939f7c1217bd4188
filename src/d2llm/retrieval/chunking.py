"""Splitting long texts into passages short enough for a student to read whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.core.types import LateChunk, Passage, SectionedPassage, WholeText, piece_id
from d2llm.models.student import Student
from d2llm.models.tokens import TOKENIZING
from d2llm.retrieval.settings import MIN_CHUNK_TOKENS
from d2llm.retrieval.text_splitter import TableSplitter, TextSplitter
from d2llm.store.index_manifest import CHUNK_TOKENS, Chunking, read_chunking

HEADING_SEPARATOR = " > "
"""What stands between the headings in the title of a piece."""
_TEXTS_AT_ONCE = 1_024  # whose tokens are counted


class Chunker:
    """Splits documents into passages with a maximum number of the student's tokens, at sentence ends if possible.

    A piece ends where a sentence does if one fits, at the end of a paragraph if it is at least half full there
    (``text_splitter``). Only white space between pieces is dropped. A table ends at the end of a row, and each of its
    pieces names its columns (``split_tables``).

    Late chunks are the same pieces, but an index reads each document whole and pools every piece from states that
    attend to the rest of the document (``models.late_chunking``). If any part of a document changes, all of it is
    encoded again.
    """

    def __init__(
        self, student: Student, chunking: Chunking | None = None, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Check the settings and load the tokenizer.

        Args:
            student: its tokenizer counts the tokens.
            chunking: how to split; None means ``default_chunking``.
            check: called between the parts of a long split; what it raises ends the split.

        Raises:
            InputError: a passage has fewer than 8 tokens or more than the student reads, the overlap is not less than
                half of a passage, the student cannot read late chunks, or a window is smaller than a passage or larger
                than the backbone reads.
        """
        chunking = chunking or default_chunking(student)
        _check(chunking, student.config.backbone.max_passage_tokens)
        if chunking.late:
            chunking = replace(chunking, late_window=student.chunk_reader.window(chunking.late_window))
        self.chunking = chunking
        self._check = check
        self._tokenizer: Any = copy.deepcopy(student.backbone.tokenizer)  # threads must not share a tokenizer
        self._tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer.backend_tokenizer.no_padding()
        self._around = len(self._tokenizer(student.config.backbone.passage_prefix, verbose=False)["input_ids"])

    def split(self, document: Passage) -> list[Passage]:
        """A document as passages ``<id>#1``, ``<id>#2``, ... at positions 1, 2, ..., with its title and metadata.

        A short document is returned unchanged, under its own id; so is a passage that already belongs to a document.
        Every piece has the title. If the title leaves less than half of the tokens for the text, passages become longer
        than the student reads; the truncated ones are counted when they are encoded.

        A document with sections is split section by section. The title of a piece then also has the section's headings,
        and its metadata have them as ``heading``, the ``page`` if there is one, and ``num_passages``, the number of
        pieces of the document.
        """
        if self.chunking.chunk_tokens is None or document.document_id not in ("", document.id):
            return [document]
        if isinstance(document, SectionedPassage):
            return self._split_sections(document)
        room = self._room(document.title, self.chunking.chunk_tokens)
        pieces = TableSplitter(room, self._split_plain, self._counts).split(document.text)
        if len(pieces) < 2:
            return [document]
        passages = [
            replace(document, id=piece_id(document.id, n), text=piece.text, document_id=document.id, position=n)
            for n, piece in enumerate(pieces, start=1)
        ]
        if not self.chunking.late:
            return passages
        whole = WholeText(document.text, document.title, self.chunking.late_window)
        return [
            LateChunk(p.id, p.text, p.title, p.document_id, p.position, p.metadata, whole, *piece.span)
            for p, piece in zip(passages, pieces, strict=True)
        ]

    def _split_sections(self, document: SectionedPassage) -> list[Passage]:
        """The pieces of each section; those of late chunking share an encoding of their section."""
        pieces: list[Passage] = []
        for section in document.sections:
            headings = [name for name in section.headings if name != document.title]
            metadata = dict(document.metadata)
            if headings:
                metadata["heading"] = HEADING_SEPARATOR.join(headings)
            if section.page is not None:
                metadata["page"] = section.page
            title = HEADING_SEPARATOR.join([name for name in (document.title, *headings) if name])
            pieces += self.split(Passage(document.id, section.text, title, metadata=metadata))
        counted = [replace(piece, metadata={**piece.metadata, "num_passages": len(pieces)}) for piece in pieces]
        if len(pieces) == 1:
            return counted
        return [
            replace(piece, id=piece_id(document.id, n), document_id=document.id, position=n)
            for n, piece in enumerate(counted, start=1)
        ]

    def _room(self, title: str, chunk_tokens: int) -> int:
        """How many tokens of text a piece has beside its title."""
        room = chunk_tokens - self._around - (self._counts([title + "\n"])[0] if title else 0)
        return max(room, chunk_tokens // 2)

    def _split_plain(self, text: str, room: int) -> list[tuple[int, str]]:
        overlap = min(self.chunking.chunk_overlap, room - 1)
        return TextSplitter(self._tokenizer.backend_tokenizer, room, overlap, check=self._check).pieces(text)

    def _counts(self, texts: Sequence[str]) -> list[int]:
        lengths: list[int] = []
        for some in batched(texts, _TEXTS_AT_ONCE):
            self._check()
            with TOKENIZING:
                encoded = self._tokenizer(list(some), add_special_tokens=False, verbose=False)
            lengths += map(len, encoded["input_ids"])
        return lengths


def default_chunking(student: Student) -> Chunking:
    """The default chunking: passages of 128 tokens, or fewer if the student reads fewer."""
    return Chunking(min(CHUNK_TOKENS, student.config.backbone.max_passage_tokens))


def choose_chunking(folder: Path, student: Student, requested: Chunking | None = None) -> Chunking:
    """The chunking for the index in a folder: as requested, else as stored with the index, else the default.

    ``upsert_documents``, which holds the lock, refuses a chunking that differs from the index's.
    """
    return requested or read_chunking(folder) or default_chunking(student)


def changed_chunking(folder: Path | None, student: Student, **changes: int | None) -> Chunking:
    """The chunking of the index in a folder, or the default, with the fields in ``changes`` that are not None."""
    chunking = (None if folder is None else read_chunking(folder)) or default_chunking(student)
    values: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return replace(chunking, **values)


def _check(chunking: Chunking, limit: int) -> None:
    tokens, window = chunking.chunk_tokens, chunking.late_window
    if tokens is None:
        if chunking != Chunking(None):
            raise InputError("an overlap and late chunks require documents to be split; give chunk_tokens as well")
        return
    if not MIN_CHUNK_TOKENS <= tokens <= limit:
        raise InputError(
            f"chunk_tokens is {tokens}, but this student reads {limit} tokens; give {MIN_CHUNK_TOKENS} to {limit}"
        )
    if not 0 <= chunking.chunk_overlap < tokens // 2:
        raise InputError(
            f"the overlap is {chunking.chunk_overlap} tokens, but must be at least 0 and less than half of {tokens}"
        )
    if window is not None and not chunking.late:
        raise InputError(f"a window of {window} tokens only applies to late chunks; enable them, or omit the window")
    if window is not None and window < tokens:
        raise InputError(f"a window of {window} tokens is smaller than a passage of {tokens}; enlarge or omit it")
