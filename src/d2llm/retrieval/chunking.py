"""Splitting long texts, and tables in them, into passages short enough for a student to read whole."""

from __future__ import annotations

import copy
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.core.types import LateChunk, Passage, SectionedPassage, Span, WholeText, piece_id
from d2llm.models.student import Student
from d2llm.models.tokens import TOKENIZING
from d2llm.ops.bm25_words import sentences
from d2llm.retrieval.settings import MIN_CHUNK_TOKENS
from d2llm.store.index_manifest import CHUNK_TOKENS, Chunking, read_chunking

HEADING_SEPARATOR = " > "
"""What stands between the headings in the title of a piece."""
_TEXTS_AT_ONCE = 1_024  # whose tokens are counted


class Chunker:
    """Splits documents into passages with a maximum number of the student's tokens, at sentence ends if possible.

    A piece ends where a sentence does if one fits, at the end of a paragraph if it is at least half full there
    (``TextSplitter``). Only white space between pieces is dropped. A table ends at the end of a row, and each of its
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


# Pieces of a limited number of tokens, at ends of sentences, in time linear in the length of the text -----------------

_BLOCK = 1 << 16  # characters tokenized at once
_LONGEST_TOKEN = 32  # characters; what is longer is a word that the tokenizer does not know, whose length counts
_CHARACTERS_PER_TOKEN = 4  # of such words
_LONGEST_GAP = 64  # characters without a token, such as white space, that cost nothing
_MIN_FRACTION = 0.5  # of a piece, before it ends at the end of a paragraph although another sentence would fit

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_STOP = re.compile(r"[.!?…。！？؟۔।॥։።።፧។။]+[\"'”’»›」』）)\]]*$")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[“\"'])(?:[A-Z]|(?:[A-Za-z]\.\s?)+[A-Za-z]|approx|bzw|ca|cf|Cf|Dr|e\.g|et al|etc|i\.e|incl|Jr|Mr|Mrs|Ms"
    r"|Prof|resp|Sr|St|usw|vgl|Vgl|viz|vs)\.$"
)
_BEFORE_NUMBER = re.compile(
    r"(?:^|[\s(\[“\"'])(?:abb|art|ch|chap|eq|eqs|fig|figs|no|nos|nr|p|para|pp|ref|refs|sec|sect|tab|vol)\.$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[,;:–—](?=\s)|[，、；：]|\n")
# A line of prose goes on in the next: it is long, and neither its end nor what follows looks like code or a list.
_WRAP = re.compile(
    r"^([ \t]*)(?=\S)(?![-*+|>#]|\d+[.)])([^\n]{39,}[\w,'’\"”)\-–—])([ \t]*\n)"
    r"(?=\1(?![-*+|>#]|\d+[.)])[\w\"'“‘(\[])",
    flags=re.MULTILINE,
)


class TextSplitter:
    """Splits texts into pieces of at most ``room`` tokens.

    A piece ends at the end of a paragraph if it is at least half full there, else at the end of its last sentence, list
    item, row or line of code, or if none fits, of a clause, a word, or a character with its marks. Words that the
    tokenizer does not know, and long white space, count by their length.
    """

    def __init__(
        self, tokenizer: Any, room: int, overlap: int = 0, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """``tokenizer``: of the library ``tokenizers``; ``overlap``: tokens that pieces repeat from those before.

        ``check`` is called for each piece, and may end the work with an exception.
        """
        self._tokenizer, self._room, self._overlap, self._check = tokenizer, room, overlap, check

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """The start of each piece, in characters, and its text; only white space between pieces is left out."""
        tokens = self._token_ends(text)
        if len(tokens) <= self._room:
            stripped = text.strip()
            return [(text.index(stripped), stripped)] if stripped else []
        paragraphs, stops = _boundaries(text)
        found: list[tuple[int, str]] = []
        start = _skip_space(text, 0)
        while start < len(text):
            self._check()
            end = self._end(text, start, tokens, paragraphs, stops)
            found.append((start, text[start:end].rstrip()))
            following = _skip_space(text, end)
            start = self._overlapped(text, start, end, tokens, stops) if following < len(text) else following
        return found

    def _end(
        self, text: str, start: int, tokens: Sequence[int], paragraphs: Sequence[int], stops: Sequence[int]
    ) -> int:
        """Where the piece ends that begins at ``start``."""
        first = bisect_right(tokens, start)
        room = self._room
        while True:
            if first + room >= len(tokens):
                end = len(text)
            else:
                least = tokens[first + int(_MIN_FRACTION * room)]
                end = _last_boundary(text, start, least, tokens[first + room - 1], paragraphs, stops)
            # Beside other text, a tokenizer may need fewer tokens for the same letters.
            excess = len(self._token_ends(text[start:end].strip())) - self._room
            if excess <= 0 or room == 1:
                return end
            room = max(1, room - excess)

    def _overlapped(self, text: str, start: int, end: int, tokens: Sequence[int], stops: Sequence[int]) -> int:
        """Where the next piece begins: at the end, or before it with what it repeats."""
        following = _skip_space(text, end)
        if not self._overlap:
            return following
        last = bisect_left(tokens, end)
        earliest = max(start + 1, tokens[last - self._overlap] if last >= self._overlap else 0)
        at = bisect_left(stops, earliest)
        if at < len(stops) and stops[at] < end:
            return _skip_space(text, stops[at])
        space = re.compile(r"\s").search(text, earliest, end)
        return _skip_space(text, space.end()) if space and text[space.end() : end].strip() else following

    def _token_ends(self, text: str) -> list[int]:
        """Where each token ends, in characters."""
        ends: list[int] = []
        at = 0
        for begin, end in _blocks(text):
            self._check()
            with TOKENIZING:
                spans: Sequence[tuple[int, int]] = self._tokenizer.encode(
                    text[begin:end], add_special_tokens=False
                ).offsets
            for first, last in spans:
                ends += range(at + _LONGEST_GAP, begin + first, _LONGEST_GAP)
                if last - first > _LONGEST_TOKEN:
                    ends += range(begin + first + _CHARACTERS_PER_TOKEN, begin + last, _CHARACTERS_PER_TOKEN)
                ends.append(begin + last)
                at = begin + last
        ends += range(at + _LONGEST_GAP, len(text), _LONGEST_GAP)
        return ends


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Parts of a text that can be tokenized by themselves: they end before white space, if there is any."""
    start = 0
    while start < len(text):
        end = start + _BLOCK
        if end < len(text):
            space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            end = space if space > start else end
        yield start, min(end, len(text))
        start = end


def _boundaries(text: str) -> tuple[list[int], list[int]]:
    """Where paragraphs end, and where sentences, list items, rows of tables and lines of code do."""
    paragraphs = [match.start() for match in _PARAGRAPH.finditer(text)]
    joined = _WRAP.sub(lambda line: f"{line[1]}{line[2]}{' ' * len(line[3])}", text)  # of the same length
    stops: list[int] = []
    for _, end in sentences(joined):
        before = joined[max(0, end - 40) : end]
        is_line = joined[end : end + 80].lstrip(" \t").startswith("\n") and before[-1] not in ",:;"
        if is_line or (_STOP.search(before) and not _is_abbreviation(before, joined[end : end + 80].lstrip())):
            stops.append(end)
    return paragraphs, stops


def _is_abbreviation(before: str, after: str) -> bool:
    return bool(_ABBREVIATION.search(before) or (after[:1].isdigit() and _BEFORE_NUMBER.search(before)))


def _last_boundary(text: str, start: int, least: int, end: int, paragraphs: Sequence[int], stops: Sequence[int]) -> int:
    """The best place to end a piece: a paragraph after ``least``, or anything after ``start``, up to ``end``."""
    at = bisect_right(paragraphs, end) - 1
    if at >= 0 and paragraphs[at] >= least:
        return paragraphs[at]
    at = bisect_right(stops, end) - 1
    if at >= 0 and stops[at] > start:
        return stops[at]
    half = start + (end - start) // 2
    clauses = [match.end() for match in _CLAUSE.finditer(text, half, end)]
    if clauses:
        return clauses[-1]
    if text[end].isspace():
        return end
    for at in range(end - 1, start, -1):
        if text[at].isspace():
            return at
    return _whole_character(text, start, end)


def _whole_character(text: str, start: int, end: int) -> int:
    """The nearest place before ``end`` that divides no letter from its marks and no sequence of signs."""
    at = end
    while at > start + 1 and (
        unicodedata.category(text[at])[0] == "M" or text[at] == "\u200d" or text[at - 1] == "\u200d"
    ):
        at -= 1
    return at if at > start + 1 else end


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


# Tables, written as in Markdown: each piece names the columns of its values -------------------------------------------

_DELIMITER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
_HEADER_OF_ROOM = 2  # a header is repeated if it takes at most one part in so many of a piece
_LABEL_OF_ROOM = 4  # the first value of a long row is, too
_LEAD_OF_ROOM = 4  # a text before a table that takes at most one part in so many is in the table's first piece

Split = Callable[[str, int], list[tuple[int, str]]]
Count = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text with its place there; its own text may begin with the header of its table."""

    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class _Table:
    """A table in a text: the places of its header with the row of hyphens, and of its rows."""

    header: Span
    rows: tuple[Span, ...]

    @property
    def span(self) -> Span:
        return self.header[0], self.rows[-1][1]


class TableSplitter:
    """Splits texts into pieces with a maximum number of tokens; each piece of a table names the columns of its values.

    What is no table, and tables that fit into a piece with their surroundings, are split as other text. Each piece of
    another table begins with the table's header; where this takes more than half of the room, or a row is too long, the
    row is written as lines of ``name: value``, and each piece of it has its first value. A short text right before a
    table begins its first piece.
    """

    def __init__(self, room: int, split: Split, count: Count) -> None:
        """Take what splits plain text.

        Args:
            room: tokens of a piece.
            split: splits a text into pieces of at most so many tokens; gives their places and texts.
            count: the numbers of tokens of texts.
        """
        self._room, self._split, self._count = room, split, count

    def split(self, text: str) -> list[Piece]:
        """The pieces of a text, in order."""
        pieces = self._split(text, self._room)
        tables = [] if len(pieces) < 2 else [table for table in _tables(text) if _is_cut(table, pieces)]
        if not tables:
            return [Piece(part, (start, start + len(part))) for start, part in pieces]
        result: list[Piece] = []
        at = 0
        for table in tables:
            start, end = table.span
            before = self._plain_pieces(text, (at, start))
            is_short = bool(before) and self._count([before[-1].text])[0] <= self._room // _LEAD_OF_ROOM
            lead = before.pop() if is_short else None
            result += before
            result += self._table_pieces(text, table, lead)
            at = end
        return result + self._plain_pieces(text, (at, len(text)))

    def _plain_pieces(self, text: str, span: Span) -> list[Piece]:
        start, end = span
        part = text[start:end]
        pieces = self._split(part, self._room) if part.strip() else []
        return [Piece(piece, (start + at, start + at + len(piece))) for at, piece in pieces]

    def _table_pieces(self, text: str, table: _Table, lead: Piece | None) -> Iterator[Piece]:
        header = text[slice(*table.header)]
        rows = [text[slice(*span)] for span in table.rows]
        names = _names(header)
        records = [_record(names, row) for row in rows]
        in_header, *in_rows = self._count([f"{row}\n" for row in (header, *rows)])
        repeats_header = in_header <= self._room // _HEADER_OF_ROOM
        entries = rows if repeats_header else records
        sizes = in_rows if repeats_header else self._count([f"{record}\n\n" for record in records])
        always = in_header if repeats_header else 0
        separator = "\n" if repeats_header else "\n\n"
        begun: list[str] = []
        first = taken = 0  # of the piece that has begun: its first row, and its tokens

        def finish(end: int) -> Iterator[Piece]:
            nonlocal lead
            if not begun and lead is None:
                return
            start = lead.span[0] if lead else table.rows[first][0] if first else table.header[0]
            body = separator.join([*([header] if repeats_header and begun else []), *begun])
            stop = table.rows[end - 1][1] if begun else lead.span[1] if lead else start
            yield Piece("\n\n".join([*([lead.text] if lead else []), *([body] if body else [])]), (start, stop))
            begun.clear()
            lead = None

        for index, size in enumerate(sizes):
            if begun and taken + size > self._room:
                yield from finish(index)
            if always + size > self._room:
                yield from finish(index)
                yield from self._record_pieces(records[index], table.rows[index])
                continue
            in_lead = self._count([lead.text])[0] if lead and not begun else 0
            if in_lead + always + size > self._room:
                yield from finish(index)
                in_lead = 0
            if not begun:
                first, taken = index, in_lead + always
            begun.append(entries[index])
            taken += size
        yield from finish(len(rows))

    def _record_pieces(self, record: str, span: Span) -> Iterator[Piece]:
        """The pieces of a long row, each with the row's first value and the name of the column that goes on."""
        label, _, rest = record.partition("\n")
        sizes = self._count([f"{label}\n", *(f"{line.partition(': ')[0]}: " for line in rest.split("\n"))])
        if not rest or sizes[0] > self._room // _LABEL_OF_ROOM:
            label, rest = "", record
        in_name = max(sizes[1:], default=0)
        in_name = in_name if in_name <= self._room // _LABEL_OF_ROOM else 0
        room = self._room - (sizes[0] if label else 0) - in_name
        for at, piece in self._split(rest, room):
            before = rest[:at].rpartition("\n")[2]
            name = before.partition(": ")[0] if in_name else ""
            goes_on = f"{name}: {piece}" if name and len(name) < len(before) else piece
            yield Piece(f"{label}\n{goes_on}" if label else goes_on, span)


def _tables(text: str) -> Iterator[_Table]:
    lines: list[Span] = []
    start = 0
    for line in text.split("\n"):
        lines.append((start, start + len(line)))
        start += len(line) + 1
    index = 1
    while index < len(lines):
        line = text[slice(*lines[index])]
        if "-" not in line or "|" not in line or not re.fullmatch(_DELIMITER, line):
            index += 1
            continue
        first = index - 1
        if "|" not in text[slice(*lines[first])]:
            index += 1
            continue
        while first and text[slice(*lines[first - 1])].startswith("|"):  # a header of several rows
            first -= 1
        end = index + 1
        while end < len(lines) and "|" in text[slice(*lines[end])]:
            end += 1
        if end > index + 1:
            yield _Table((lines[first][0], lines[index][1]), tuple(lines[index + 1 : end]))
        index = end


def _is_cut(table: _Table, pieces: Sequence[tuple[int, str]]) -> bool:
    start, end = table.span
    following = bisect_right(pieces, start, key=lambda piece: piece[0])
    return following < len(pieces) and pieces[following][0] < end


def _names(header: str) -> list[str]:
    """The names of the columns; those of a header of several rows are joined."""
    rows = [_cells(line) for line in header.split("\n")[:-1]]
    width = max(map(len, rows))
    columns = zip(*([*row, *[""] * (width - len(row))] for row in rows), strict=True)
    return [" ".join(dict.fromkeys(filter(None, column))) for column in columns]


def _record(names: Sequence[str], row: str) -> str:
    """A row as lines of ``name: value``, or as it is if it has more cells than the table has columns."""
    cells = _cells(row)
    if len(cells) > len(names):
        return row
    pairs = zip(names, cells, strict=False)
    return "\n".join(f"{name}: {cell}" if name else cell for name, cell in pairs if cell)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]
