"""Reads Word documents (WordprocessingML): what a reader of the document sees, and its notes and comments.

Deleted text of tracked changes and the instructions of fields are no text; hidden text is. Footnotes and the text of
boxes follow the paragraph that they belong to; comments, diagrams, charts, and headers and footers come last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from d2llm.data.contents import FileContents, SectionWriter, UnreadableFileError, markdown_table
from d2llm.data.office_archives import (
    Archive,
    Element,
    attribute,
    chart_text,
    choice,
    drawing_text,
    equation,
    is_description,
    local_name,
)
from d2llm.data.word_lists import ListLabels

_PRIVATE = 0xF000  # where Word puts the characters of such fonts
_SYMBOL = dict(
    zip(
        (*range(0x20, 0x7F), *range(0xA1, 0xF0), *range(0xF1, 0xFF)),
        " !∀#∃%&∍()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
        "ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪"
        "〉∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭",
        strict=True,
    )
)
_WINGDINGS = {
    0x21: "✏", 0x22: "✂", 0x28: "☎", 0x2A: "✉", 0x4A: "☺", 0x4C: "☹", 0x6C: "●", 0x6E: "■", 0x6F: "□", 0x71: "❑",
    0x76: "❖", 0x9F: "•", 0xA7: "▪", 0xA8: "◻", 0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑", 0xE2: "↓", 0xE8: "➔",
    0xF0: "⇨", 0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑",
}  # fmt: skip
_FONTS = {"symbol": _SYMBOL, "wingdings": _WINGDINGS}


def symbol(font: str, digits: str) -> str:
    """The character at a place, in hexadecimal digits, of a font; U+FFFD if it is not known."""
    try:
        code = int(digits, 16)
    except ValueError:
        return "\N{REPLACEMENT CHARACTER}"
    known = _FONTS.get(font.casefold())
    if known is None:
        return "\N{REPLACEMENT CHARACTER}" if 0xE000 <= code < 0xF900 or code > 0x10FFFF else chr(code)
    return known.get(code & 0xFF, "\N{REPLACEMENT CHARACTER}")


def with_symbols(text: str, run: Any) -> str:
    """The text of a run whose characters may be places in such a font."""
    if not any(_PRIVATE <= ord(character) < _PRIVATE + 256 for character in text):
        return text
    fonts = run.find("{*}rPr/{*}rFonts")
    font = attribute(fonts, "ascii") or attribute(fonts, "hAnsi") if fonts is not None else ""
    known = _FONTS.get(font.casefold(), _SYMBOL)
    return "".join(
        known.get(ord(c) - _PRIVATE, "\N{REPLACEMENT CHARACTER}") if _PRIVATE <= ord(c) < _PRIVATE + 256 else c
        for c in text
    )


_CONTAINERS = frozenset({"sdt", "sdtContent", "customXml", "smartTag", "ins", "moveTo", "body", "dir", "bdo"})
"""Elements around paragraphs, rows, cells and runs that say nothing by themselves."""
_NO_TEXT = frozenset({"del", "moveFrom", "instrText", "delText", "delInstrText", "sectPr"})
_SIGNS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_NOTES = {"footnoteReference": "footnotes", "endnoteReference": "endnotes"}
_LONGEST_REPEATED_CELL = 100  # characters; a cell over several rows is repeated in each
_PAGE_NUMBERS = re.compile(r"\s*(PAGE|NUMPAGES|SECTIONPAGES)\b", flags=re.IGNORECASE)
_BODY_LEVEL = 9  # the outline level of text that is no heading


def read_word(path: Path) -> FileContents:
    """Title and sections of a document.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    with Archive(path) as archive:
        return _Document(archive).read()


class _Document:
    """A document that is being read."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._main = archive.main_part("word/document.xml")
        self._relations = archive.relations(self._main)
        self._writer = SectionWriter()
        self._notes: dict[str, dict[str, Element]] = {kind: self._read_notes(kind) for kind in _NOTES.values()}
        styles = self._related("styles")
        numbering = self._related("numbering")
        self._styles = _Styles(styles[0] if styles else None)
        self._labels = ListLabels(numbering[0] if numbering else None)
        self._fields: list[_Field] = []  # those that have begun, the innermost last
        self._after: list[Element] = []  # boxes and notes whose paragraph is being read
        self._joined = ""  # text of a paragraph whose end has been deleted
        self._in_list = False
        self.title = archive.title()
        self._readers: dict[str, Callable[[Element], str]] = {
            "t": lambda element: self._shown(_text(element)),
            **{name: (lambda _, sign=sign: self._shown(sign)) for name, sign in _SIGNS.items()},
            **dict.fromkeys(_NOTES, self._note),
            "sym": lambda element: symbol(attribute(element, "font"), attribute(element, "char")),
            "r": lambda element: with_symbols(self._runs(element), element),
            "oMath": equation,
            "oMathPara": equation,
            "fldChar": self._field,
            "fldSimple": self._simple_field,
            "instrText": self._instruct,
            "AlternateContent": self._alternative,
            "ruby": self._ruby,
            "txbxContent": self._box,
            "docPr": _description,
            "textpath": lambda element: f" {element.get('string', '')} ",
        }

    def read(self) -> FileContents:
        body = self._archive.xml(self._main).find("{*}body")
        if body is None:
            raise UnreadableFileError("it cannot be parsed (it is no Word document)")
        self._blocks(body)
        if self._joined:
            self._writer.block(self._joined)
        self._write_last()
        self._archive.skip_embedded(self._relations)
        return FileContents(self.title, tuple(self._writer.finish()), skipped=tuple(self._archive.skipped))

    def _related(self, kind: str) -> list[Element]:
        names = dict.fromkeys(relation.target for relation in self._relations.values() if relation.kind == kind)
        roots = [self._archive.optional_xml(name) for name in names if name]
        return [root for root in roots if root is not None]

    def _read_notes(self, kind: str) -> dict[str, Element]:
        return {
            attribute(note, "id"): note
            for root in self._related(kind)
            for note in root
            if attribute(note, "type") in ("", "normal")
        }

    def _write_last(self) -> None:
        """What belongs to no place of the text, and notes that no place refers to."""
        notes = [note for notes in self._notes.values() for note in notes.values()]
        self._write_section("Notes", [self._content(note) for note in notes])
        comments = self._archive.matching(r"word/comments\.xml")
        self._write_section("Comments", [self._content(c) for root in self._roots(comments) for c in _comments(root)])
        diagrams = self._archive.matching(r"word/diagrams/data\d+\.xml")
        self._write_section("Diagrams", map(drawing_text, self._roots(diagrams)))
        charts = self._archive.matching(r"word/charts/chart\d+\.xml")
        self._write_section("Charts", map(chart_text, self._roots(charts)))
        around = [*self._related("header"), *self._related("footer")]
        self._write_section("Headers and footers", [self._content(root) for root in around])

    def _roots(self, names: Iterable[str]) -> list[Element]:
        return [root for name in names if (root := self._archive.optional_xml(name)) is not None]

    def _write_section(self, heading: str, texts: Iterable[str]) -> None:
        known = dict.fromkeys(text.strip() for text in texts)
        if any(known):
            self._writer.part(heading)
            for text in known:
                self._writer.block(text)

    def _content(self, element: Element) -> str:
        """The blocks of a note, comment, header or cell as text of its own."""
        writer, self._writer = self._writer, SectionWriter()
        after, self._after = self._after, []
        joined, self._joined = self._joined, ""
        try:
            self._blocks(element, is_body=False)
            if self._joined:
                self._writer.block(self._joined)
            return "\n\n".join(section.text for section in self._writer.finish())
        finally:
            self._writer, self._after, self._joined = writer, after, joined

    def _blocks(self, element: Element, *, is_body: bool = True) -> None:
        """Write the paragraphs and tables of an element."""
        for child in element:
            name = local_name(child)
            if name == "p":
                self._paragraph(child, is_body=is_body)
            elif name == "tbl":
                self._table(child, is_body=is_body)
            elif name == "AlternateContent":
                for alternative in child:
                    if len(alternative):
                        self._blocks(alternative, is_body=is_body)
                        break
            elif name in ("oMath", "oMathPara"):
                self._writer.block(equation(child))
            elif name in _CONTAINERS or (name not in _NO_TEXT and not name.endswith("Pr") and len(child)):
                self._blocks(child, is_body=is_body)

    def _paragraph(self, paragraph: Element, *, is_body: bool) -> None:
        properties = paragraph.find("{*}pPr")
        text = self._joined + self._runs(paragraph)
        self._joined = ""
        after, self._after = self._after, []
        if properties is not None and properties.find("{*}rPr/{*}del") is not None:
            self._joined = text
        elif text.strip():
            self._write_paragraph(text, properties, is_body=is_body)
        for sibling in after:
            self._writer.block(self._content(sibling))
            self._in_list = False

    def _write_paragraph(self, text: str, properties: Element, *, is_body: bool) -> None:
        style = _child_value(properties, "pStyle")
        level = self._styles.heading_level(style, properties)
        label = self._labels.next(*self._styles.numbering(style, properties))
        indent, label = label if level is None else ("", label[1].removeprefix("- "))
        text = f"{label}{text.strip(' ')}"
        if level is None or not is_body:
            self._writer.block(indent + text.strip("\n"), follows_closely=bool(label) and self._in_list)
            self._in_list = bool(label)
            return
        self._in_list = False
        if level == 0 and not self.title:
            self.title = " ".join(text.split())
        if level or " ".join(text.split()) != self.title:
            self._writer.heading(level, text)

    def _runs(self, element: Element) -> str:
        return "".join(self._texts(element))

    def _texts(self, element: Element) -> Iterator[str]:
        for child in element:
            name = local_name(child)
            reader = self._readers.get(name)
            if reader is not None:
                yield reader(child)
            elif name not in _NO_TEXT and not name.endswith("Pr"):
                yield from self._texts(child)

    def _shown(self, text: str) -> str:
        """A text, unless it is among the instructions of a field."""
        return text if all(field.has_result for field in self._fields) else ""

    def _instruct(self, element: Element) -> str:
        if self._fields:
            self._fields[-1].code += element.text or ""
        return ""

    def _simple_field(self, element: Element) -> str:
        text = self._runs(element)
        return "" if re.match(_PAGE_NUMBERS, attribute(element, "instr")) else text

    def _note(self, reference: Element) -> str:
        note = self._notes[_NOTES[local_name(reference)]].pop(attribute(reference, "id"), None)
        if note is not None:
            self._after.append(note)
        return ""

    def _box(self, element: Element) -> str:
        self._after.append(element)
        return ""

    def _alternative(self, alternatives: Element) -> str:
        def read(branch: Element) -> str:
            before = len(self._after)
            text = self._runs(branch)
            return text or " " * (len(self._after) - before)

        return next((text for text in choice(alternatives, read) if text.strip(" ")), "")

    def _ruby(self, ruby: Element) -> str:
        base, reading = (
            ("".join(self._runs(element) for element in ruby.iterfind(f"{{*}}{name}"))) for name in ("rubyBase", "rt")
        )
        return f"{base}({reading})" if reading else base

    def _field(self, mark: Element) -> str:
        """Note the begin, middle or end of a field; of a list to choose from, the text is the entry that was chosen."""
        kind = attribute(mark, "fldCharType")
        if kind == "begin":
            self._fields.append(_Field(_chosen(mark)))
        elif kind == "separate" and self._fields:
            self._fields[-1].has_result = not re.match(_PAGE_NUMBERS, self._fields[-1].code)
        elif kind == "end" and self._fields:
            return self._fields.pop().chosen
        return ""

    def _table(self, table: Element, *, is_body: bool) -> None:
        self._in_list = False
        rows = list(_rows(table))
        cells = [list(_cells(row)) for row in rows]
        if all(len(row) < 2 for row in cells):  # a frame around text
            for row in cells:
                for cell in row:
                    self._blocks(cell, is_body=is_body)
            return
        after, self._after = self._after, []
        self._writer.block(markdown_table(_with_one_header(rows, [self._row_texts(row) for row in self._spans(cells)])))
        notes, self._after = self._after, after
        for note in notes:
            self._writer.block(self._content(note))

    def _row_texts(self, row: list[tuple[str, int]]) -> list[str]:
        return [text for cell, width in row for text in (cell, *[""] * (width - 1))]

    def _spans(self, rows: list[list[Element]]) -> Iterator[list[tuple[str, int]]]:
        """Text and width of each cell; a short cell over several rows is repeated in each."""
        above: dict[int, str] = {}  # column -> text
        for row in rows:
            texts: list[tuple[str, int]] = []
            column = 0
            for cell in row:
                properties = cell.find("{*}tcPr")
                width = max(1, int(_child_value(properties, "gridSpan") or 1))
                merged = properties.find("{*}vMerge") if properties is not None else None
                text = self._cell(cell)
                if merged is not None and attribute(merged, "val") != "restart" and not text:
                    text = above.get(column, "")
                above[column] = text if len(text) <= _LONGEST_REPEATED_CELL else ""
                texts.append((text, width))
                column += width
            yield texts

    def _cell(self, cell: Element) -> str:
        after, self._after = self._after, []
        text = self._content(cell)
        self._after = [*after, *self._after]
        return _without_table_lines(text)


class _Field:
    """A field that has begun: its code, whether its result has begun, and the entry that was chosen from its list."""

    def __init__(self, chosen: str) -> None:
        self.code, self.chosen, self.has_result = "", chosen, False


class _Styles:
    """The styles of paragraphs that make headings and lists."""

    def __init__(self, root: Element | None) -> None:
        self._styles = {attribute(style, "styleId"): style for style in (root if root is not None else ())}

    def heading_level(self, style: str, properties: Element | None) -> int | None:
        """The level of a heading, 0 for a title; None for other text."""
        for name, source in self._sources(style, properties):
            level = _child_value(source, "outlineLvl")
            if level.isdigit():
                return int(level) + 1 if int(level) < _BODY_LEVEL else None
            if match := re.fullmatch(r"heading ?([1-9])", name):
                return int(match[1])
            if name == "title":
                return 0
        return None

    def numbering(self, style: str, properties: Element | None) -> tuple[str, int]:
        """The number of a list, "" if there is none, and the level in it."""
        level = ""
        for _, source in self._sources(style, properties):
            found = source.find("{*}numPr") if source is not None else None
            level = level or _child_value(found, "ilvl")
            if list_id := _child_value(found, "numId"):
                return list_id, int(level) if level.isdigit() else 0
        return "", 0

    def _sources(self, style: str, properties: Element | None) -> Iterator[tuple[str, Element | None]]:
        """The names ("" for none) and properties of a paragraph, of its style, and of those that this is based on."""
        yield "", properties
        seen: set[str] = set()
        while style and style not in seen:
            seen.add(style)
            element = self._styles.get(style)
            yield (_child_value(element, "name") or style).lower(), None if element is None else element.find("{*}pPr")
            style = _child_value(element, "basedOn")


def _child_value(element: Element | None, name: str) -> str:
    child = element.find(f"{{*}}{name}") if element is not None else None
    return attribute(child, "val") if child is not None else ""


def _text(element: Element) -> str:
    text = element.text or ""
    kept = attribute(element, "space") == "preserve"
    return text.replace("\r", "\n") if kept else re.sub(r"\s+", " ", text)


def _comments(root: Element) -> list[Element]:
    return [child for child in root if local_name(child) == "comment"] or [root]


def _chosen(mark: Element) -> str:
    """The entry of a list that an older form's field shows."""
    choices = mark.find("{*}ffData/{*}ddList")
    if choices is None:
        return ""
    entries = [attribute(entry, "val") for entry in choices.iterfind("{*}listEntry")]
    index = int(_child_value(choices, "result") or _child_value(choices, "default") or 0)
    return entries[index] if index < len(entries) else ""


def _description(properties: Element) -> str:
    """What an author wrote about a picture, but not its file's name."""
    text = " ".join(properties.get("descr", "").split())
    return f" {text} " if is_description(text) else ""


def _rows(table: Element) -> Iterator[Element]:
    for child in table:
        name = local_name(child)
        if name == "tr":
            if child.find("{*}trPr/{*}del") is None:
                yield child
        elif name in _CONTAINERS:
            yield from _rows(child)


def _cells(row: Element) -> Iterator[Element]:
    for child in row:
        name = local_name(child)
        if name == "tc":
            yield child
        elif name in _CONTAINERS:
            yield from _cells(child)


def _with_one_header(rows: list[Element], texts: list[list[str]]) -> list[list[str]]:
    """The rows of a table, those at the top that are repeated on each page joined into one."""
    count = 0
    for row in rows:
        if row.find("{*}trPr/{*}tblHeader") is None:
            break
        count += 1
    if count < 2 or count == len(rows):
        return texts
    width = max(map(len, texts[:count]))
    padded = [[*row, *[""] * (width - len(row))] for row in texts[:count]]
    header = [" ".join(dict.fromkeys(filter(None, column))) for column in zip(*padded, strict=True)]
    return [header, *texts[count:]]


def _without_table_lines(text: str) -> str:
    """The text of a cell, in which a table's rows are lines of values."""
    if "| --- |" not in text:
        return text
    lines = [line for line in text.split("\n") if not re.fullmatch(r"\|( --- \|)+", line)]
    return "\n".join(
        line[2:-2].replace(" | ", ", ") if line.startswith("| ") and line.endswith(" |") else line for line in lines
    )
