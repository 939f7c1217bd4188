"""The sections of the Markdown that Kreuzberg makes of office files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from d2llm.core.types import Section

_FENCE = re.compile(r" {0,3}(```+|~~~+)((?<=~).*|[^`]*)")  # ```inline code``` is no fence
_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t](.*))?")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")
_NO_PARAGRAPH = re.compile(r"( {4}|\t| {0,3}([-+*>|#<]|\d+[.)]))")


def markdown_sections(text: str) -> Iterator[Section]:
    """The sections of a Markdown text, whose headings begin with ``#`` or are a line underlined with ``=`` or ``-``.

    What looks like a heading inside fenced code is none. The text of a heading with nothing below it is the heading.
    """
    headings: list[str] = []
    lines: list[str] = []
    current = 0  # level of the last heading, 0 before the first
    fence = ""
    for line in text.split("\n"):
        marker = _FENCE.fullmatch(line)
        if marker and not fence:
            fence = marker[1]
        elif marker and marker[1].startswith(fence) and not marker[2].strip():
            fence = ""
        heading = None if fence else _HEADING.fullmatch(line)
        underline = None if fence or heading else _UNDERLINE.fullmatch(line)
        if heading:
            level, title = len(heading[1]), _heading_title(heading[2] or "")
        elif underline and _can_be_title(lines):
            level, title = 1 if underline[1].startswith("=") else 2, lines.pop()
        else:
            lines.append(line)
            continue
        yield _section(lines, headings, is_leaf=level <= current)
        lines, current = [], level
        headings[level - 1 :] = []
        headings += [""] * (level - 1 - len(headings)) + [_plain_heading(title)]
    yield _section(lines, headings, is_leaf=current > 0)


def _heading_title(text: str) -> str:
    """What follows the ``#`` of a Markdown heading, without white space around it and without closing ``#``."""
    text = text.strip(" \t")
    opened = text.rstrip("#")
    return opened.rstrip(" \t") if not opened or opened[-1] in " \t" else text


def _section(lines: Sequence[str], headings: Sequence[str], *, is_leaf: bool) -> Section:
    """A section; that of a heading with no text and no headings below it has the heading as its text."""
    names = tuple(filter(None, headings))
    text = "\n".join(lines).strip()
    return Section(text or (names[-1] if names and is_leaf else ""), names)


def _can_be_title(lines: Sequence[str]) -> bool:
    """Whether the last line is a paragraph by itself, so that a line of ``-`` below it is no rule or table."""
    is_alone = len(lines) < 2 or not lines[-2].strip()
    return bool(lines) and is_alone and bool(lines[-1].strip()) and not _NO_PARAGRAPH.match(lines[-1])


def _plain_heading(text: str) -> str:
    without_links = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[*`]|\\(?=[^\w\s])|(?<!\w)_+|(?<!_)_+(?!\w)", "", without_links).strip()
