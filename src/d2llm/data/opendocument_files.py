"""Reads OpenDocument texts: what a reader of the document sees, and its notes and comments.

Deleted text of tracked changes is no text. Notes and the text of boxes follow the paragraph that they belong to;
comments, and headers and footers come last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from d2llm.data.contents import FileContents, SectionWriter, UnreadableFileError, markdown_table
from d2llm.data.office_archives import Archive, Element, attribute, is_description, local_name
from d2llm.data.word_lists import written_number

_NO_TEXT = frozenset(
    [
        "tracked-changes",
        "forms",
        "binary-data",
        "script",
        "note-citation",
        "change-info",
        "annotation-end",
        "meta-template",
        "sequence-decls",
        "variable-decls",
        "user-field-decls",
        "dde-connection-decls",
        "event-listeners",
        "glue-point",
    ]
)
_MAX_REPETITIONS = 1_000  # of a row or cell with text; programs fill a table's end with a million empty ones
_LONGEST_REPEATED_CELL = 100  # characters; a cell over several rows is repeated in each


def read_opendocument(path: Path) -> FileContents:
    """Title and sections of a text.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    with Archive(path) as archive:
        manifest = archive.optional_xml("META-INF/manifest.xml")
        if manifest is not None and next(manifest.iter("{*}encryption-data"), None) is not None:
            raise UnreadableFileError("it is encrypted")
        return _Text(archive).read()


class _Text:
    """A text that is being read."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._writer = SectionWriter()
        self._content = archive.xml("content.xml")
        self._styles = archive.optional_xml("styles.xml")
        self._after: list[Element] = []  # boxes and notes whose paragraph is being read
        self._comments: list[str] = []
        self._title_styles = {"Title"}
        self._list_levels: dict[tuple[str, int], tuple[str, str, int]] = {}  # number format, ending, first number
        for root in (self._styles, self._content):
            self._know_styles(root)
        meta = archive.optional_xml("meta.xml")
        title = meta.findtext("{*}meta/{*}title") if meta is not None else ""
        self.title = " ".join((title or "").split())

    def _know_styles(self, root: Element | None) -> None:
        for style in root.iter("{*}style") if root is not None else ():
            if attribute(style, "parent-style-name") in self._title_styles:
                self._title_styles.add(attribute(style, "name"))
        for style in root.iter("{*}list-style") if root is not None else ():
            for level in style:
                kind = attribute(level, "num-format") if local_name(level).endswith("number") else ""
                first = attribute(level, "start-value", "1")
                key = attribute(style, "name"), int(attribute(level, "level", "1"))
                self._list_levels[key] = kind, attribute(level, "num-suffix", "."), int(first) if first.isdigit() else 1

    def read(self) -> FileContents:
        body = self._content.find("{*}body/{*}text")
        if body is None:
            raise UnreadableFileError("it cannot be parsed (it is no OpenDocument text)")
        self._blocks(body)
        if self._comments:
            self._writer.part("Comments")
            for comment in dict.fromkeys(self._comments):
                self._writer.block(comment)
        self._headers_and_footers()
        return FileContents(self.title, tuple(self._writer.finish()), skipped=tuple(self._archive.skipped))

    def _headers_and_footers(self) -> None:
        around = [
            child
            for page in (self._styles.iter("{*}master-page") if self._styles is not None else ())
            for child in page
            if local_name(child).startswith(("header", "footer"))
        ]
        for counter in [field for child in around for field in child.iter("{*}page-number", "{*}page-count")]:
            counter.text = ""
        texts = [text for text in dict.fromkeys(map(self._apart, around)) if text]
        if texts:
            self._writer.part("Headers and footers")
            for text in texts:
                self._writer.block(text)

    def _apart(self, element: Element) -> str:
        """The blocks of a note, comment or cell as text of its own."""
        writer, self._writer = self._writer, SectionWriter()
        after, self._after = self._after, []
        try:
            self._blocks(element, is_body=False)
            return "\n\n".join(section.text for section in self._writer.finish())
        finally:
            self._writer, self._after = writer, after

    def _blocks(self, element: Element, *, is_body: bool = True) -> None:
        """Write the paragraphs, headings, lists and tables of an element."""
        for child in element:
            name = local_name(child)
            if name == "h":
                self._heading(child, is_body=is_body)
            elif name == "p":
                self._paragraph(child, is_body=is_body)
            elif name == "list":
                self._list(child, 1, attribute(child, "style-name"))
            elif name == "table":
                self._table(child, is_body=is_body)
            elif name in ("annotation", "note", "object"):
                self._writer.block(self._line(child, within=element))
                self._write_after()
            elif name not in _NO_TEXT and not name.endswith("-source"):
                self._blocks(child, is_body=is_body)

    def _heading(self, element: Element, *, is_body: bool) -> None:
        text = self._line(element)
        level = attribute(element, "outline-level", "1")
        if is_body:
            self._writer.heading(int(level) if level.isdigit() else 1, text)
        else:
            self._writer.block(text)
        self._write_after()

    def _paragraph(self, element: Element, *, is_body: bool) -> None:
        text = self._line(element)
        if is_body and attribute(element, "style-name") in self._title_styles and text:
            self.title = self.title or " ".join(text.split())
            if " ".join(text.split()) != self.title:
                self._writer.heading(0, text)
        else:
            self._writer.block(text)
        self._write_after()

    def _write_after(self) -> None:
        after, self._after = self._after, []
        for sibling in after:
            self._writer.block(self._apart(sibling))

    def _list(self, element: Element, depth: int, style: str) -> None:
        kind, ending, item_number = self._list_levels.get((style, depth), ("", "", 1))
        is_first = depth == 1
        for item in element:
            start = attribute(item, "start-value")
            item_number = int(start) if start.isdigit() else item_number
            has_label = local_name(item) == "list-item"
            label = f"{_written_number(item_number, kind)}{ending} " if kind else "- "
            for child in item:
                if local_name(child) == "list":
                    self._list(child, depth + 1, attribute(child, "style-name") or style)
                elif local_name(child) in ("p", "h"):
                    text = self._line(child)
                    mark = label if has_label else "  " * has_label
                    indent = "  " * (depth - 1)
                    self._writer.block(f"{indent}{mark}{text}" if text else "", follows_closely=not is_first)
                    has_label = has_label and not text
                    is_first = is_first and not text
                    self._write_after()
                else:
                    self._blocks([child], is_body=False)
            item_number += local_name(item) == "list-item"

    def _line(self, element: Element, within: Element | None = None) -> str:
        """The text of a paragraph, in which white space counts once, as ODF has elements for more."""
        pieces = list(self._texts(element) if within is None else self._piece(element))
        text = re.sub(r"[ \t\r\n]+", " ", "".join(pieces)).strip(" ")
        return text.replace("\v", "\n").replace("\x1f", "\t").replace("\x1e", " ").strip()

    def _texts(self, element: Element) -> Iterator[str]:
        yield element.text or ""
        for child in element:
            yield from self._piece(child)
            yield child.tail or ""

    def _piece(self, child: Element) -> Iterator[str]:
        """The text of an element within a paragraph; signs stand for white space that counts."""
        name = local_name(child)
        if name == "s":
            count = attribute(child, "c", "1")
            yield "\x1e" * min(int(count) if count.isdigit() else 1, 1_000)
        elif name == "tab":
            yield "\x1f"
        elif name == "line-break":
            yield "\v"
        elif name == "note":
            self._after += child.iterfind("{*}note-body")
        elif name == "annotation":
            texts = (self._apart([part]) for part in child if local_name(part) in ("p", "list"))
            self._comments.append("\n".join(filter(None, texts)))
        elif name in ("text-box", "p", "h", "list", "table"):  # of a frame or shape
            self._after.append(child if name == "text-box" else [child])
        elif name == "ruby":
            base, reading = ("".join(self._inside(child, part)) for part in ("ruby-base", "ruby-text"))
            yield f"{base}({reading})" if reading else base
        elif name == "object":
            yield f" {self._object(child)} "
        elif name == "desc" or (name == "title" and child.getparent().find("{*}desc") is None):
            text = " ".join((child.text or "").split())
            yield f" {text} " if is_description(text) else ""
        elif name not in _NO_TEXT and name != "title":
            yield from self._texts(child) if name not in ("frame", "image", "g") else self._within_frame(child)

    def _within_frame(self, frame: Element) -> Iterator[str]:
        for child in frame:
            yield from self._piece(child)

    def _inside(self, element: Element, name: str) -> Iterator[str]:
        for part in element.iterfind(f"{{*}}{name}"):
            yield from self._texts(part)

    def _object(self, element: Element) -> str:
        """The text of an embedded object: a formula as its author wrote it, or the paragraphs of a chart."""
        inline = next(iter(element), None)
        name = attribute(element, "href").removeprefix("./")
        root = inline if inline is not None else self._archive.optional_xml(f"{name}/content.xml")
        if root is None:
            if name:
                self._archive.skip(name, "it is an object within the document")
            return ""
        written = next(root.iter("{*}annotation"), None) if local_name(root) == "math" else None
        if written is not None:
            return " ".join((written.text or "").split())
        if local_name(root) == "math":
            return " ".join("".join(root.itertext()).split())
        return "; ".join(filter(None, (self._line(paragraph) for paragraph in root.iter("{*}p"))))

    def _table(self, table: Element, *, is_body: bool) -> None:
        rows = list(_repeated(table, "table-row", is_blank=lambda row: not any(map(_has_content, row))))
        if all(len(row) < 2 for row in rows):  # a frame around text
            for cell in [cell for row in rows for cell in row]:
                self._blocks(cell, is_body=is_body)
            return
        outer, self._after = self._after, []
        above: dict[int, tuple[str, int]] = {}  # column -> the text of a cell over several rows, and how many are left
        texts: list[list[str]] = []
        for row in rows:
            cells: list[str] = []
            for column, cell in enumerate(_repeated_cells(row)):
                text, left = above.pop(column, ("", 0))
                if local_name(cell) != "covered-table-cell":
                    text, left = self._cell(cell), int(attribute(cell, "number-rows-spanned", "1"))
                if left > 1 and len(text) <= _LONGEST_REPEATED_CELL:
                    above[column] = text, left - 1
                cells.append(text)
            texts.append(cells)
        self._writer.block(markdown_table(texts))
        self._write_after()
        self._after = outer

    def _cell(self, cell: Element) -> str:
        after, self._after = self._after, []
        text = self._apart(cell)
        self._after = [*after, *self._after]
        lines = [line for line in text.split("\n") if not re.fullmatch(r"\|( --- \|)+", line)]
        if len(lines) == len(text.split("\n")):
            return text
        return "\n".join(line[2:-2].replace(" | ", ", ") if line.startswith("| ") else line for line in lines)


def _has_content(element: Element) -> bool:
    return len(element) > 0


def _repeated(element: Element, name: str, is_blank: Callable[[Element], bool]) -> Iterator[Element]:
    """The rows of a table, each as often as it stands for."""
    for child in element:
        kind = local_name(child)
        if kind == name:
            count = int(attribute(child, "number-rows-repeated", "1"))
            yield from [child] * (0 if is_blank(child) else min(count, _MAX_REPETITIONS))
        elif kind in ("table-header-rows", "table-rows", "table-row-group"):
            yield from _repeated(child, name, is_blank)


def _repeated_cells(row: Element) -> Iterator[Element]:
    cells = [child for child in row if local_name(child) in ("table-cell", "covered-table-cell")]
    while cells and not _has_content(cells[-1]) and local_name(cells[-1]) == "table-cell":
        cells.pop()
    for cell in cells:
        yield from [cell] * min(int(attribute(cell, "number-columns-repeated", "1")), _MAX_REPETITIONS)


def _written_number(value: int, kind: str) -> str:
    kinds = {"a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman"}
    return written_number(value, kinds.get(kind, "decimal"))
