"""Title and sections of an HTML page, as its reader sees them; Markdown and reStructuredText are read as pages, too.

What surrounds a page's text is left out (``data.html_frame``), and so is what a browser does not show: the head,
scripts, comments, templates, hidden elements. Everything else is kept, without the marks that only make it look nice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import turbohtml
from turbohtml import CData, DocumentFragment, Element, Node, Text

from d2llm.core.types import Section
from d2llm.data.html_frame import attribute, is_drawing, is_frame, is_hidden

_LONGEST_REPEATED = 100  # characters; a longer cell over several rows or columns stands once
_MAX_COLUMNS = 1_000  # of one cell, as in browsers


@dataclass(frozen=True, slots=True)
class _Row:
    cells: Sequence[str]
    is_header: bool


def is_grid(table: Element) -> bool:
    """Whether a table is one of values; others arrange parts of a page, or have more in their cells than words."""
    if table.attrs.get("role") in ("presentation", "none") or table.select_one("table, h1, h2, h3, h4, h5, h6, pre"):
        return False
    rows = table.find_all("tr")
    return any(len(_cells(row)) > 1 for row in rows) or any(
        cell.tag == "th" for row in rows[:1] for cell in _cells(row)
    )


def grid_rows(table: Element, text_of: Callable[[Element], str]) -> list[_Row]:
    """The rows of a table of values; a cell over several rows or columns stands in each."""
    rows: list[_Row] = []
    below: dict[int, tuple[int, str]] = {}  # column -> rows that a cell above still takes, and its text
    for row in table.find_all("tr"):
        texts: list[str] = []

        def fill(texts: list[str] = texts) -> None:
            while len(texts) in below:
                num_rows, text = below.pop(len(texts))
                if num_rows > 1:
                    below[len(texts)] = (num_rows - 1, text)
                texts.append(text)

        cells = _cells(row)
        for cell in cells:
            fill()
            text = text_of(cell)
            repeated = text if len(text) <= _LONGEST_REPEATED else ""
            num_rows, num_columns = _span(cell, "rowspan"), _span(cell, "colspan")
            for column in range(num_columns):
                if num_rows > 1:
                    below[len(texts)] = (num_rows - 1, repeated)
                texts.append(repeated if column else text)
        fill()
        if any(texts):
            is_header = all(cell.tag == "th" for cell in cells) or (
                isinstance(row.parent, Element) and row.parent.tag == "thead"
            )
            rows.append(_Row(texts, is_header))
    return rows


def table_lines(rows: Sequence[_Row]) -> str:
    """A table in the form of Markdown; a row of hyphens ends its header, if it has one."""
    lines: list[str] = []
    for index, row in enumerate(rows):
        lines.append(f"| {' | '.join(row.cells)} |")
        is_last_header = row.is_header and (index + 1 == len(rows) or not rows[index + 1].is_header)
        if is_last_header and all(header_row.is_header for header_row in rows[:index]):
            lines.append("|" + " --- |" * len(row.cells))
    return "\n".join(lines)


def _cells(row: Element) -> list[Element]:
    return [cell for cell in row.children if isinstance(cell, Element) and cell.tag in ("td", "th")]


def _span(cell: Element, name: str) -> int:
    text = str(cell.attrs.get(name) or "1").strip()
    return max(1, min(int(text), _MAX_COLUMNS)) if text.isdecimal() and len(text) < 6 else 1


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_BLOCKS = _words(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption "
    "figure footer form frameset h1 h2 h3 h4 h5 h6 header hgroup hr html iframe legend li main menu nav noframes "
    "ol optgroup p search section select summary table tbody td template tfoot th thead tr ul"
)
_BOXES = frozenset({"audio", "button", "canvas", "img", "input", "label", "meter", "object", "option", "video"})
"""Boxes within a line: what is inside them is a word by itself. In drawings, these are:"""
_LABELS = frozenset({"desc", "text", "title"})
_UNSHOWN = frozenset({"datalist", "head", "link", "meta", "metadata", "param", "script", "source", "style", "track"})
_UNSHOWN_INPUTS = frozenset({"checkbox", "file", "hidden", "image", "password", "radio"})
_LEVEL_OF_DEFINITIONS = 7  # what a manual defines is below all headings of the page
_LONGEST_NAME = 100
_BREAK = "\v"  # stands for a line break until the white space around it is known
_BETWEEN_IDEOGRAPHS = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])[ \t]*\n[ \t]*(?=[\u3000-\u9fff\uff00-\uffef])")
_TITLE_PARTS = re.compile(r"\s+[|–—·•:»›>/-]+\s+")
_MAX_PARTS = 8
_NO_SCRIPTS = re.compile(r"java ?script", flags=re.IGNORECASE)
_MAX_FRAMES = 3  # pages inside pages

_Waiting = list["Node | Callable[[], None]"]


def html_page(markup: str) -> tuple[str, list[Section]]:
    """Title and sections of a page; the title is "" if it has none.

    A heading that repeats the page's title, or a part of it ("Timers" of "Timers | Node.js"), is not repeated among the
    headings of a section. What a manual defines (a function with its signature) is a section under its name.
    """
    document = _parse(markup)
    title = _page_title(document)
    sections = _Reader().sections(document) or _Reader(with_frame=True).sections(document)
    known = _parts_of_title(title)
    return title, [
        Section(section.text, tuple(name for name in section.headings if _comparable(name) not in known))
        for section in sections
    ]


def _parse(markup: str) -> Any:
    """The tree of a page; what XHTML may have and HTML may not (``<a/>``, CDATA) is written differently before."""
    start = markup[:2048].lstrip("\ufeff \t\r\n").lower()
    unclosed = markup.find("<!--", markup.rfind("-->") + 1)
    if unclosed >= 0:  # the rest of the page would be a comment
        markup = markup[:unclosed] + markup[unclosed:].replace("<!--", "")
    if "<![CDATA[" in markup:
        markup = re.sub(r"<!\[CDATA\[(.*?)\]\]>", lambda part: _escaped(part[1]), markup, flags=re.DOTALL)
    if start.startswith("<?xml") or "/xhtml" in start:
        void = "area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr"
        markup = re.sub(rf"<(?!(?:{void})[\s/])([a-zA-Z][\w:.-]*)((?:\s[^<>]*)?)/>", r"<\1\2></\1>", markup)
    return turbohtml.parse(markup, positions=False, allow_declarative_shadow_roots=False)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _page_title(document: Any) -> str:
    title = next((element for element in document.find_all("title") if not is_drawing(element)), None)
    return " ".join(title.text.split()) if title is not None else ""


def _parts_of_title(title: str) -> set[str]:
    """The title, and what of it stands between its dashes and bars."""
    marks = [0, *(at for mark in re.finditer(_TITLE_PARTS, title) for at in mark.span()), len(title)][: 2 * _MAX_PARTS]
    starts, ends = marks[::2], marks[1::2]
    return {_comparable(title[start:end]) for start in starts for end in (*ends, len(title)) if end > start}


def _comparable(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.casefold())) or name


@dataclass
class _PageSection:
    """What is below a heading: the headings with their levels, and blocks of text with what separates them.

    ``opens``: the last of the headings is this section's own, and no earlier section has it.
    ``num_signatures``: how many of the blocks are those of what a manual defines.
    """

    headings: Sequence[tuple[int, str]] = ()
    opens: bool = False
    blocks: list[str] = field(default_factory=list[str])
    num_signatures: int = 0


@dataclass
class _List:
    """A list that is being read: the number of its next item, or None without numbers, and how many it has had."""

    next_number: int | None
    num_items: int = 0


class _Reader:
    """Reads the elements of a page in order; not by recursion, because pages can be nested deeply."""

    def __init__(self, *, with_frame: bool = False, depth: int = 0) -> None:
        self._with_frame, self._depth = with_frame, depth
        self._page_sections = [_PageSection()]
        self._line: list[str] = []  # texts of the block that is being read
        self._verbatim = 0  # how many elements around it keep their lines
        self._in_heading = False
        self._lists: list[_List] = []
        self._marker = ""  # of the list's item that begins
        self._is_tight = False  # whether the next block follows in the next line

    def sections(self, parent: Any) -> list[Section]:
        """The sections of what an element contains. The text of a heading with nothing below it is the heading."""
        waiting: _Waiting = [*reversed(parent.children)]
        while waiting:
            item = waiting.pop()
            if isinstance(item, (Text, CData)):
                self._line.append(item.data)
            elif isinstance(item, Element):
                self._enter(item, waiting)
            elif isinstance(item, DocumentFragment):  # of a template
                waiting += reversed(item.children)
            elif callable(item):
                item()
        self._break()
        sections: list[Section] = []
        for page_section, following in zip(
            self._page_sections, [*self._page_sections[1:], _PageSection()], strict=True
        ):
            names = tuple(name for _, name in page_section.headings)
            text = "".join(page_section.blocks).strip("\n")
            if not text and page_section.opens and len(following.headings) <= len(names):
                text = names[-1]
            if text:
                sections.append(Section(text, names))
        return sections

    def _enter(self, node: Element, waiting: _Waiting) -> None:
        tag = node.tag
        drawing = is_drawing(node)
        if tag in _UNSHOWN or (tag == "title" and not drawing) or is_hidden(node):
            return
        if not self._with_frame and is_frame(node):
            return
        if tag in _BLOCKS:
            self._break()
            waiting.append(self._break)
        elif tag in _BOXES or (drawing and tag in _LABELS):
            self._space()
            waiting.append(self._space)
        read = self._SPECIAL.get(tag)
        if read is None or read(self, node, waiting):
            waiting += reversed(node.children)

    def _space(self) -> None:
        self._line.append(" ")

    def _break(self) -> None:
        """End the block that is being read."""
        if self._verbatim and self._line:
            self._line.append("" if self._line[-1].endswith("\n") else "\n")
        elif self._in_heading:
            self._space()
        elif self._line:
            text = _one_line(self._line)
            self._line = []
            if text:
                self._add(text)

    def _add(self, text: str) -> None:
        """Add a block, behind the marker of its list's item."""
        indent = "  " * (len(self._lists) - 1) if self._marker else ""
        self._page_sections[-1].blocks.append(("\n" if self._is_tight else "\n\n") + indent + self._marker + text)
        self._marker, self._is_tight = "", False

    def _open_section(self, level: int, name: str) -> None:
        above = [heading for heading in self._page_sections[-1].headings if heading[0] < level]
        self._page_sections.append(_PageSection([*above, (level, name)], opens=True))
        self._marker, self._is_tight = "", False

    def _flat(self, node: Element) -> str:
        """What is in an element, in one line."""
        reader = _Reader(with_frame=self._with_frame, depth=self._depth)
        return " ".join(" ".join(section.text for section in reader.sections(node)).split())

    # Elements that are more than what they contain. Each returns whether this is still to be read.

    def _heading(self, node: Element, waiting: _Waiting) -> bool:
        if self._in_heading or self._verbatim:
            return True

        def end() -> None:
            name = _one_line(self._line).rstrip(" ¶§")
            self._line, self._in_heading = [], False
            if name:
                self._open_section(int(node.tag[1]), name)

        self._in_heading = True
        waiting.append(end)
        return True

    def _code(self, _node: Element, waiting: _Waiting) -> bool:
        """Text whose lines stay as they are."""
        self._break()

        def end() -> None:
            self._verbatim -= 1
            if self._verbatim or self._in_heading:
                return
            text = "".join(self._line).replace(_BREAK, "\n").strip("\n").rstrip()
            self._line = []
            if text and self._marker:
                self._add("")
                self._is_tight = True
            if text:
                self._page_sections[-1].blocks.append(("\n" if self._is_tight else "\n\n") + text)
                self._is_tight = False

        self._verbatim += 1
        waiting.append(end)
        return True

    def _list(self, node: Element, waiting: _Waiting) -> bool:
        def end() -> None:
            self._break()
            self._lists.pop()
            self._marker, self._is_tight = "", False

        self._lists.append(_List(_integer_attribute(node, "start", 1) if node.tag == "ol" else None))
        waiting.append(end)
        return True

    def _item(self, node: Element, _waiting: _Waiting) -> bool:
        if node.select_one("h1, h2, h3, h4, h5, h6, table, section"):  # a list only by name
            return True
        around = self._lists[-1] if self._lists else _List(None)
        self._marker = "- "
        if around.next_number is not None:
            item_number = _integer_attribute(node, "value", around.next_number)
            self._marker, around.next_number = f"{item_number}. ", item_number + 1
        self._is_tight = around.num_items > 0 or len(self._lists) > 1
        around.num_items += 1
        return True

    def _definitions(self, node: Element, waiting: _Waiting) -> bool:
        """A list of definitions; those of a manual are sections."""
        first = next((child for child in node.children if isinstance(child, Element)), None)
        if first is None or self._in_heading or not first.select_one(".sig-name, .descname"):
            return True
        headings = self._page_sections[-1].headings
        level = max(_LEVEL_OF_DEFINITIONS, headings[-1][0] + 1 if headings else 0)

        def end() -> None:
            self._break()
            self._page_sections.append(_PageSection(headings))

        def define(term: Element) -> None:
            signature = self._flat(term)
            page_section = self._page_sections[-1]
            is_another = (
                page_section.opens
                and page_section.headings[-1][0] == level
                and page_section.num_signatures == len(page_section.blocks)
            )
            if signature and not is_another:
                self._open_section(level, _name_of(term, signature))
            if signature:
                self._is_tight = True
                self._add(signature)
                self._page_sections[-1].num_signatures += 1

        waiting.append(end)
        for child in reversed(node.children):
            if isinstance(child, Element) and child.tag == "dt":
                waiting.append(partial(define, child))
            else:
                waiting.append(child)
        return False

    def _definition(self, _node: Element, _waiting: _Waiting) -> bool:
        self._is_tight = True
        return True

    def _table(self, node: Element, _waiting: _Waiting) -> bool:
        if self._in_heading or self._verbatim or not is_grid(node):
            return True
        for caption in node.find_all("caption"):
            self._line.append(self._flat(caption))
            self._break()
        if text := table_lines(grid_rows(node, self._flat)):
            self._add(text)
        return False

    def _ruby(self, node: Element, _waiting: _Waiting) -> bool:
        """Words, and behind them how they are pronounced, which must not stand between their characters."""
        words, readings = list[str](), list[str]()
        for part in node.descendants:
            if isinstance(part, Text):
                is_reading = part.closest("rt") is not None
                (readings if is_reading else words).append("" if part.closest("rp") else part.data)
        self._line.append("".join(words) + (f"({''.join(readings)})" if readings else ""))
        return False

    def _line_break(self, _node: Element, _waiting: _Waiting) -> bool:
        self._line.append(" " if self._in_heading else _BREAK)
        return False

    def _exponent(self, node: Element, _waiting: _Waiting) -> bool:
        """What is raised, and would else be read as a part of the number before it."""
        before = self._line[-1] if self._line else ""
        if re.search(r"[\d)]$", before) and re.fullmatch(r"[-+−–]?(\d+|[a-z])", node.text) and not node.find("a"):
            self._line.append("^")
        return True

    def _formula(self, node: Element, _waiting: _Waiting) -> bool:
        self._line.append(_formula_text(node) or attribute(node, "alttext"))
        return False

    def _picture(self, node: Element, _waiting: _Waiting) -> bool:
        self._line.append(attribute(node, "alt"))
        return True

    def _input(self, node: Element, _waiting: _Waiting) -> bool:
        kind = attribute(node, "type").lower()
        self._line.append(attribute(node, "alt" if kind == "image" else "" if kind in _UNSHOWN_INPUTS else "value"))
        return True

    def _inner_page(self, node: Element, _waiting: _Waiting) -> bool:
        """The page that is written in an attribute of a frame, or as the text that older browsers show for it."""
        page = attribute(node, "srcdoc") if node.tag == "iframe" else node.text
        if page and self._depth < _MAX_FRAMES:
            for section in _Reader(with_frame=self._with_frame, depth=self._depth + 1).sections(_parse(page)):
                for text in dict.fromkeys([*section.headings[-1:], section.text]):
                    self._add(text)
        return False

    def _template(self, node: Element, _waiting: _Waiting) -> bool:
        return bool(attribute(node, "shadowrootmode"))

    def _without_scripts(self, node: Element, _waiting: _Waiting) -> bool:
        return not _NO_SCRIPTS.search(node.text)

    _SPECIAL: ClassVar[dict[str, Callable[[_Reader, Element, _Waiting], bool]]] = {
        **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), _heading),
        **dict.fromkeys(("pre", "textarea", "listing", "plaintext", "xmp"), _code),
        **dict.fromkeys(("ol", "ul", "menu", "dir"), _list),
        **dict.fromkeys(("img", "area"), _picture),
        "br": _line_break,
        "dd": _definition,
        "dl": _definitions,
        "iframe": _inner_page,
        "noembed": _inner_page,
        "noframes": _inner_page,
        "input": _input,
        "li": _item,
        "math": _formula,
        "noscript": _without_scripts,
        "ruby": _ruby,
        "sup": _exponent,
        "table": _table,
        "template": _template,
    }


def _one_line(texts: Sequence[str]) -> str:
    """A block's texts in one line, but for the breaks in it."""
    line = re.sub(_BETWEEN_IDEOGRAPHS, "", "".join(texts))
    line = re.sub(r"[ \t\r\n\f\xa0]+", " ", line)
    return re.sub(rf" ?{_BREAK} ?", "\n", line).strip(" \n")


def _integer_attribute(node: Element, name: str, default: int) -> int:
    text = attribute(node, name).strip()
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else default


def _name_of(term: Element, signature: str) -> str:
    """The name of what a manual defines, with brackets if it has arguments."""
    elements = term.select(".sig-prename, .sig-name, .descclassname, .descname")
    name = "".join(part.text for part in elements if not part.parent or not part.parent.closest(".sig-name, .descname"))
    name = " ".join((name or signature.partition("(")[0]).split())
    return name[:_LONGEST_NAME] + ("()" if "(" in signature and name in signature else "")


def _formula_text(node: Element) -> str:
    """A formula in one line: fractions, powers and roots with their signs."""
    texts: list[str] = []
    between = {"mfrac": "/", "msup": "^", "msub": "_", "mroot": "√", "munderover": "_", "msubsup": "_", "munder": "_"}
    waiting: list[Any] = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, (Text, CData)):
            texts.append(" ".join(item.data.split()))
        elif isinstance(item, Element) and item.tag not in ("annotation", "annotation-xml"):
            children: list[Any] = [
                child for child in item.children if not isinstance(child, Text) or child.data.strip()
            ]
            sign = between.get(item.tag, "")
            if sign and len(children) > 1:
                children = [part for child in children for part in (sign, child)][1:]
                if item.tag in ("msubsup", "munderover") and len(children) == 5:
                    children[3] = "^"
            if item.tag == "msqrt":
                children = ["√(", *children, ")"]
            parent = item.parent
            if item.tag == "mrow" and len(children) > 1 and isinstance(parent, Element) and parent.tag in between:
                children = ["(", *children, ")"]
            if item.tag in ("mtr", "mtd"):
                children.append(" ")
            waiting += reversed(children)
    return "".join(texts)
