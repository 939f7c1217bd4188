"""The sections of Markdown and of reStructuredText."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from d2llm.core.types import Section

_FENCE = re.compile(r" {0,3}(```+|~~~+)(.*)")
_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#*)?[ \t]*")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")
_NO_PARAGRAPH = re.compile(r"( {4}|\t| {0,3}([-+*>|#<]|\d+[.)]))")


def markdown_sections(text: str, *, page: int | None = None, above: Sequence[str] = ()) -> Iterator[Section]:
    """The sections of a Markdown text, whose headings begin with ``#`` or are a line underlined with ``=`` or ``-``.

    What looks like a heading inside fenced code is none. ``above``: headings open before the text.
    """
    headings = list(above)
    lines: list[str] = []
    fence = ""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)  # front matter
    for line in body.split("\n"):
        marker = _FENCE.fullmatch(line)
        if marker and not fence:
            fence = marker[1]
        elif marker and marker[1].startswith(fence) and not marker[2].strip():
            fence = ""
        heading = None if fence else _HEADING.fullmatch(line)
        underline = None if fence or heading else _UNDERLINE.fullmatch(line)
        if heading:
            level, title = len(heading[1]), heading[2] or ""
        elif underline and _can_be_title(lines):
            level, title = 1 if underline[1].startswith("=") else 2, lines.pop()
        else:
            lines.append(line)
            continue
        yield Section("\n".join(lines).strip(), tuple(name for name in headings if name), page)
        lines = []
        headings[level - 1 :] = []
        headings += [""] * (level - 1 - len(headings)) + [_plain_heading(title)]
    yield Section("\n".join(lines).strip(), tuple(name for name in headings if name), page)


def rst_sections(text: str) -> Iterator[Section]:
    """The sections of a reStructuredText, whose titles are underlined, and may be overlined, with punctuation."""
    styles: list[str] = []  # of the levels, in the order in which they first occur
    headings: list[str] = []
    lines: list[str] = []
    rows = text.split("\n")
    at = 0
    while at < len(rows):
        over = _is_adornment(rows[at]) and at + 2 < len(rows) and _is_adornment(rows[at + 2])
        title_at = at + 1 if over else at
        title = rows[title_at].strip()
        under = rows[title_at + 1] if title_at + 1 < len(rows) else ""
        if title and not _is_adornment(title) and _is_adornment(under) and len(under.rstrip()) >= len(title):
            style = under[0] * (2 if over else 1)
            if style not in styles:
                styles.append(style)
            yield Section("\n".join(lines).strip(), tuple(headings))
            lines = []
            headings[styles.index(style) :] = [title]
            at = title_at + 2
        else:
            lines.append(rows[at])
            at += 1
    yield Section("\n".join(lines).strip(), tuple(headings))


def _can_be_title(lines: Sequence[str]) -> bool:
    """Whether the last line is a paragraph by itself, so that a line of ``-`` below it is no rule or table."""
    is_alone = len(lines) < 2 or not lines[-2].strip()
    return bool(lines) and is_alone and bool(lines[-1].strip()) and not _NO_PARAGRAPH.match(lines[-1])


def _plain_heading(text: str) -> str:
    without_links = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[*`]|\\(?=[^\w\s])|(?<!\w)_+|_+(?!\w)", "", without_links).strip()


def _is_adornment(line: str) -> bool:
    line = line.rstrip()
    return len(line) > 1 and line[0] in "=-`:'\"~^_*+#<>.!$%&(),/;?@[\\]{|}" and line == line[0] * len(line)
