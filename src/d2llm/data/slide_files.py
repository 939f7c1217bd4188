"""Reads presentations (PresentationML): each slide under its title and with its number, and its notes and comments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from d2llm.data.contents import FileContents, SectionWriter, markdown_table
from d2llm.data.office_archives import (
    Archive,
    Element,
    Relation,
    attribute,
    chart_text,
    choice,
    drawing_paragraph,
    drawing_text,
    is_description,
    local_name,
)

_TITLES = frozenset({"title", "ctrTitle"})
_NUMBERS = frozenset({"sldNum"})
_LATER = {"notesSlide": "Notes", "comments": "Comments"}
_UNLINKED = {
    "Notes": r"ppt/notesSlides/notesSlide\d+\.xml",
    "Comments": r"ppt/comments/\w+\.xml",
    "Diagrams": r"ppt/diagrams/data\d+\.xml",
    "Charts": r"ppt/charts/chart\d+\.xml",
}
"""Parts that a slide should link; those that none does come last."""


def read_slides(path: Path) -> FileContents:
    """Title and sections of a presentation; a section's page is the number of its slide.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    with Archive(path) as archive:
        return _Presentation(archive).read()


class _Presentation:
    """A presentation that is being read."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._writer = SectionWriter()
        self._read: set[str] = set()
        self._links: dict[str, Relation] = {}  # of the slide that is being read

    def read(self) -> FileContents:
        for slide_number, name in enumerate(self._slides(), start=1):
            root = self._archive.optional_xml(name)
            if root is not None:
                self._slide(slide_number, name, root)
        for heading, pattern in _UNLINKED.items():
            for name in self._archive.matching(pattern):
                if name not in self._read and (text := self._part_text(name)):
                    self._writer.part(heading)
                    self._writer.block(text)
        return FileContents(self._archive.title(), tuple(self._writer.finish()), skipped=tuple(self._archive.skipped))

    def _slides(self) -> list[str]:
        main = self._archive.main_part("ppt/presentation.xml")
        root = self._archive.xml(main)
        links = self._archive.relations(main)
        slides = root.find("{*}sldIdLst")
        names: list[str] = []
        for slide in slides if slides is not None else ():
            relation = next((links[value] for value in slide.values() if value in links), None)
            if relation is None or self._archive.find(relation.target) is None:
                self._archive.skip(relation.target if relation else f"slide {len(names) + 1}", "it is missing")
            else:
                names.append(relation.target)
        return names or self._archive.matching(r"ppt/slides/slide\d+\.xml")

    def _slide(self, slide_number: int, name: str, root: Element) -> None:
        self._links = self._archive.relations(name)
        title = " ".join(" ".join(self._titles(root)).split())
        self._writer.part(title, page=slide_number, is_leaf=True)
        for tree in root.iterfind("{*}cSld/{*}spTree"):
            for text in self._shapes(tree):
                self._writer.block(text)
        for kind, heading in _LATER.items():
            texts = [self._part_text(relation.target) for relation in self._links.values() if relation.kind == kind]
            if any(texts):
                self._writer.part(title, heading, page=slide_number)
                for text in texts:
                    self._writer.block(text)
        self._archive.skip_embedded(self._links)

    def _titles(self, root: Element) -> Iterator[str]:
        for shape in root.iter("{*}sp"):
            if _placeholder(shape) in _TITLES:
                yield _shape_text(shape)

    def _shapes(self, tree: Element) -> Iterator[str]:
        """The texts of shapes, tables, charts and diagrams, those of groups included."""
        for child in tree:
            name = local_name(child)
            if name in ("sp", "cxnSp", "pic"):
                if _placeholder(child) not in _TITLES | _NUMBERS:
                    yield _shape_text(child)
                if name == "pic":
                    yield _description(child)
            elif name == "graphicFrame":
                yield from self._frame(child)
            elif name == "AlternateContent":
                for texts in choice(child, lambda branch: [*filter(None, self._shapes(branch))]):
                    yield from texts
            elif not name.endswith("Pr"):
                yield from self._shapes(child)

    def _frame(self, frame: Element) -> Iterator[str]:
        for element in frame.iter():
            name = local_name(element)
            if name == "tbl":
                yield _table_text(element)
            elif name == "chart":
                yield self._linked_text(attribute(element, "id"))
            elif name == "relIds":
                yield self._linked_text(attribute(element, "dm"))

    def _linked_text(self, link: str) -> str:
        return self._part_text(self._links[link].target) if link in self._links else ""

    def _part_text(self, name: str) -> str:
        """The text of notes, comments, a diagram or a chart."""
        known = self._archive.find(name)
        if known is None:
            if name:
                self._archive.skip(name, "it is missing")
            return ""
        self._read.add(known)
        root = self._archive.optional_xml(known)
        if root is None:
            return ""
        kind = local_name(root)
        if kind == "chartSpace":
            return chart_text(root)
        if kind == "notes":
            shapes = (
                shape for shape in root.iter("{*}sp") if _placeholder(shape) not in _NUMBERS | {"hdr", "dt", "ftr"}
            )
            return "\n\n".join(filter(None, map(_shape_text, shapes)))
        plain = (text for node in root.iter("{*}text") if (text := (node.text or "").strip()))  # of older comments
        return "\n\n".join(filter(None, [*plain, drawing_text(root)]))


def _placeholder(shape: Element) -> str:
    """What a shape stands for ("title"); "" if for nothing."""
    placeholder = shape.find("*/{*}nvPr/{*}ph")
    return attribute(placeholder, "type") if placeholder is not None else ""


def _shape_text(shape: Element) -> str:
    paragraphs = shape.iterfind("{*}txBody/{*}p")
    return "\n".join(filter(None, map(drawing_paragraph, paragraphs)))


def _description(shape: Element) -> str:
    properties = next(shape.iter("{*}cNvPr"), None)
    text = " ".join(properties.get("descr", "").split()) if properties is not None else ""
    return text if is_description(text) else ""


def _table_text(table: Element) -> str:
    rows = [
        [" ".join(map(drawing_paragraph, cell.iter("{*}p"))) for cell in row.iterfind("{*}tc")]
        for row in table.iterfind("{*}tr")
    ]
    return markdown_table(rows)
