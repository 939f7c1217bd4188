"""Documents of titled sections. Every report that d2llm writes is one of these, as Markdown and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import Protocol, cast

from d2llm.core.table import escape_markdown


class Part(Protocol):
    """A part of a section. Markdown leaves it out if it has no text there, such as a plot. A ``Table`` is a part."""

    def to_markdown(self) -> str:
        """The part in GitHub's Markdown."""
        ...

    def __html__(self) -> str:
        """The part in HTML, escaped."""
        ...


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph, which is shown verbatim."""

    text: str

    def to_markdown(self) -> str:
        """The text on one line, escaped."""
        return escape(self.text)

    def __html__(self) -> str:
        return f'<p class="muted"><bdi>{escape_html(self.text)}</bdi></p>'


@dataclass(frozen=True, slots=True)
class Items:
    """A list with bullets, whose texts are shown verbatim, after an introduction, if there is one."""

    texts: Sequence[str]
    introduction: str = ""

    def to_markdown(self) -> str:
        """The list, escaped."""
        lines = "\n".join(f"- {escape(text)}" for text in self.texts)
        return f"{self.introduction}\n\n{lines}" if self.introduction and self.texts else lines

    def __html__(self) -> str:
        introduction = f"<p>{escape_html(self.introduction)}</p>" if self.introduction else ""
        items = "".join(f"<li><bdi>{escape_html(text)}</bdi></li>\n" for text in self.texts)
        return f"{introduction}<ul>\n{items}</ul>" if self.texts else ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Pictures side by side, each with its caption; only pages show them. The pictures are HTML, such as an SVG."""

    pictures: Sequence[tuple[str, str]]
    is_wide: bool = False

    def to_markdown(self) -> str:
        """Nothing."""
        return ""

    def __html__(self) -> str:
        class_, opening, end = "", "", ""
        if self.is_wide:
            class_, end = ' class="wide"', "</div>"
            opening = '<div class="scroll" tabindex="0" role="region" aria-label="Plot">'
        figures = "\n".join(
            f"<figure{class_}>\n{opening}{picture}{end}\n"
            f"<figcaption><bdi>{escape_html(caption)}</bdi></figcaption>\n</figure>"
            for picture, caption in self.pictures
        )
        return figures if self.is_wide else f'<div class="pair">\n{figures}\n</div>'


@dataclass(frozen=True, slots=True)
class Values:
    """Named values as JSON; a page shows them folded, under a title."""

    values: object
    title: str = "Settings"

    def to_markdown(self) -> str:
        """JSON in a fence, which no line can end, because each starts with a quote, bracket or digit."""
        return "```json\n" + json.dumps(self.values, indent=2, ensure_ascii=False, default=str) + "\n```"

    def __html__(self) -> str:
        return f"<details><summary><bdi>{escape_html(self.title)}</bdi></summary>{_tree(self.values)}</details>"


@dataclass(frozen=True, slots=True)
class Section:
    """Parts under a heading, if they have one."""

    title: str
    parts: Sequence[Part]
    level: int = 2


@dataclass(frozen=True, slots=True)
class Document:
    """A title, an introduction below it, and sections; a page reloads itself after ``refresh`` seconds.

    Every title and text is shown verbatim.
    """

    title: str
    sections: Sequence[Section]
    introduction: str = ""
    refresh: int | None = None

    def to_markdown(self) -> str:
        """The document in GitHub's Markdown, without what only a page can show."""
        texts = [f"# {escape(self.title)}", escape(self.introduction)]
        for section in self.sections:
            blocks = [text for part in section.parts if (text := part.to_markdown())]
            heading = f"{'#' * section.level} {escape(section.title)}"
            texts += [heading, *blocks] if blocks and section.title else blocks
        text = "\n\n".join(text for text in texts if text) + "\n"
        # Truncated JSON texts may contain lone surrogates, which are replaced.
        return text.encode("utf-8", "replace").decode("utf-8")


def escape(text: str) -> str:
    """Text on one line, escaped so that Markdown treats it as plain text even at the start of a line."""
    # What starts a list or a heading gets its first character escaped.
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda start: f"&#{ord(start[0][0])};{start[0][1:]}", escape_markdown(text))


def _tree(value: object) -> str:
    if isinstance(value, Mapping):
        named = cast("Mapping[str, object]", value or {"–": ""})
        lines = (f"<dt><bdi>{escape_html(key)}</bdi></dt><dd>{_tree(item)}</dd>\n" for key, item in named.items())
        return f'<dl class="tree">\n{"".join(lines)}</dl>'
    if isinstance(value, list | tuple):
        listed = cast("Sequence[object]", value)
        if any(isinstance(item, Mapping) for item in listed):
            return "".join(_tree(item) for item in listed)
        value = ", ".join(map(str, listed))
    return "–" if value is None else f"<bdi>{escape_html(str(value))}</bdi>"
