"""Splits a text into pieces of a limited number of tokens, at ends of sentences, in time linear in its length."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from d2llm.models.tokens import TOKENIZING
from d2llm.ops.bm25_words import sentences

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
        place = bisect_left(stops, earliest)
        if place < len(stops) and stops[place] < end:
            return _skip_space(text, stops[place])
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
    place = bisect_right(paragraphs, end) - 1
    if place >= 0 and paragraphs[place] >= least:
        return paragraphs[place]
    place = bisect_right(stops, end) - 1
    if place >= 0 and stops[place] > start:
        return stops[place]
    half = start + (end - start) // 2
    clauses = [match.end() for match in _CLAUSE.finditer(text, half, end)]
    if clauses:
        return clauses[-1]
    if text[end].isspace():
        return end
    for place in range(end - 1, start, -1):
        if text[place].isspace():
            return place
    return _whole_character(text, start, end)


def _whole_character(text: str, start: int, end: int) -> int:
    """The nearest place before ``end`` that divides no letter from its marks and no sequence of signs."""
    place = end
    while place > start + 1 and (
        unicodedata.category(text[place])[0] == "M" or text[place] == "\u200d" or text[place - 1] == "\u200d"
    ):
        place -= 1
    return place if place > start + 1 else end


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start
