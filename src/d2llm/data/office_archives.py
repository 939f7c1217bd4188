"""The archives that office programs write: XML parts in a zip file, which relations link; and parts that they share."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote
from zipfile import BadZipFile, ZipFile, ZipInfo
from zlib import error as ZlibError

from d2llm.core.extras import require
from d2llm.data.contents import SkippedPart, UnreadableFileError, markdown_table

MAX_PART_BYTES = 512 << 20
"""A larger part of an archive is not unpacked."""
_OLD_FORMAT = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # of a compound file: an encrypted one, or a document of before 2007
_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")

_ZIP_ERRORS = (BadZipFile, ZlibError, NotImplementedError, OSError, EOFError, RuntimeError)
_NO_MEMORY = 2  # libxml2's XML_ERR_NO_MEMORY
_PICTURE_FILE = re.compile(r"\S+\.\w{2,4}|[a-z]+://.*", flags=re.IGNORECASE)
_EMBEDDED = {
    "package": "it is a file within the document",
    "oleObject": "it is an object within the document",
    "aFChunk": "it is another document within this one",
}
"""Kinds of relations to what is not read, and the reasons."""

Element = Any
"""An element of lxml, which has no types of its own."""
_Content = TypeVar("_Content")


@dataclass(frozen=True, slots=True)
class Relation:
    """A link of a part to another: what kind of part that is ("header"), and its name ("" if outside the file)."""

    kind: str
    target: str


class Archive:
    """The parts of a zip file; names are compared without regard to case and to how Unicode writes their accents.

    Raises:
        UnreadableFileError: it is no zip file, or is encrypted.
    """

    def __init__(self, path: Path) -> None:
        self.skipped: list[SkippedPart] = []
        self._etree: Any = require("lxml.etree", extra="documents", purpose=f"reading {path.suffix} files")
        try:
            self._zip = ZipFile(path)
        except (BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UnreadableFileError(_why_no_zip(path, error)) from error
        self.names = self._zip.namelist()
        self._names: dict[str, str] = {}
        for info in reversed(self._zip.infolist()):
            for name in (_guessed_name(info), info.filename):
                self._names[_comparable(name)] = info.filename

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def find(self, name: str) -> str | None:
        """The name of a part as the archive spells it; None if there is no such part."""
        return self._names.get(_comparable(name.lstrip("/")))

    def read(self, name: str) -> bytes:
        """The content of a part.

        Raises:
            UnreadableFileError: the part is missing, damaged, encrypted or too large.
        """
        known = self.find(name)
        if known is None:
            raise UnreadableFileError("it is missing")
        info = self._zip.getinfo(known)
        if info.file_size > MAX_PART_BYTES:
            raise UnreadableFileError(f"it unpacks to {info.file_size:,} bytes, more than {MAX_PART_BYTES:,}")
        if info.flag_bits & 1:
            raise UnreadableFileError("it is encrypted")
        try:
            return self._zip.read(info)
        except _ZIP_ERRORS as error:
            raise UnreadableFileError(f"it is damaged ({' '.join(str(error).split())[:200]})") from error

    def xml(self, name: str) -> Element:
        """The root element of a part; entities are not expanded, and nothing outside the file is read.

        Raises:
            UnreadableFileError: as ``read``, or it is no XML.
        """
        return self.parse(self.read(name))

    def parse(self, content: bytes) -> Element:
        """The root element of XML.

        Raises:
            UnreadableFileError: it is no XML.
        """
        parser = self._etree.XMLParser(
            resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True, remove_pis=True
        )
        try:
            root = self._etree.fromstring(content, parser)
        except (self._etree.XMLSyntaxError, ValueError) as error:
            if getattr(error, "code", None) == _NO_MEMORY:
                raise MemoryError from error
            raise UnreadableFileError(f"it cannot be parsed ({' '.join(str(error).split())[:200]})") from error
        if root is None:
            raise UnreadableFileError("it cannot be parsed (it is empty)")
        return root

    def elements(self, name: str, *tags: str) -> Iterator[Element]:
        """The elements of a part with these names, one at a time: what is before them is forgotten.

        Raises:
            UnreadableFileError: as ``xml``.
        """
        known = self.find(name) or name
        try:
            with self._zip.open(known) as part:
                events = self._etree.iterparse(
                    part,
                    tag=[f"{{*}}{tag}" for tag in tags],
                    resolve_entities=False,
                    no_network=True,
                    remove_comments=True,
                )
                for _, element in events:
                    yield element
                    element.clear(keep_tail=False)
                    while element.getprevious() is not None:
                        del element.getparent()[0]
        except (self._etree.XMLSyntaxError, KeyError, *_ZIP_ERRORS) as error:
            if getattr(error, "code", None) == _NO_MEMORY:
                raise MemoryError from error
            raise UnreadableFileError(f"it cannot be parsed ({name}: {' '.join(str(error).split())[:200]})") from error

    def optional_xml(self, name: str) -> Element | None:
        """The root element of a part without which the rest can be read; None, and noted, if it cannot be parsed."""
        if self.find(name) is None:
            return None
        try:
            return self.xml(name)
        except UnreadableFileError as error:
            self.skip(name, str(error))
            return None

    def skip(self, name: str, reason: str) -> None:
        """Note a part that is left out."""
        part = SkippedPart(name, reason)
        if part not in self.skipped:
            self.skipped.append(part)

    def relations(self, name: str) -> dict[str, Relation]:
        """The relations of a part by id; ``""`` has those of the whole archive."""
        folder, _, file = name.rpartition("/")
        root = self.optional_xml(posixpath.join(folder, "_rels", f"{file}.rels"))
        relations: dict[str, Relation] = {}
        for element in root if root is not None else ():
            kind = element.get("Type", "").rpartition("/")[2]
            target = element.get("Target", "")
            inside = element.get("TargetMode") != "External"
            path = posixpath.normpath(posixpath.join("/", folder, target)).lstrip("/") if inside else ""
            if inside and self.find(path) is None and self.find(unquote(path)):
                path = unquote(path)
            relations[element.get("Id", "")] = Relation(kind, path)
        return relations

    def skip_embedded(self, relations: dict[str, Relation]) -> None:
        """Note the files and objects that a part contains."""
        for relation in relations.values():
            if relation.kind in _EMBEDDED and relation.target:
                self.skip(relation.target, _EMBEDDED[relation.kind])

    def main_part(self, default: str) -> str:
        """The name of the part with the document itself."""
        named = [relation.target for relation in self.relations("").values() if relation.kind == "officeDocument"]
        return next((name for name in named if self.find(name)), default)

    def title(self) -> str:
        """The title among the properties of an Office file."""
        named = [relation.target for relation in self.relations("").values() if relation.kind == "core-properties"]
        root = self.optional_xml((named or ["docProps/core.xml"])[0])
        return " ".join((root.findtext("{*}title") or "").split()) if root is not None else ""

    def matching(self, pattern: str) -> list[str]:
        """The names of parts that match a pattern, in the order of their numbers."""
        return sorted((n for n in self.names if re.fullmatch(pattern, n)), key=lambda name: (len(name), name))


def local_name(element: Element) -> str:
    """The name of an element without its namespace, of which Office's formats have two each; "" for a reference."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: Element, name: str, default: str = "") -> str:
    """The value of an attribute, whatever its namespace."""
    return next((str(value) for key, value in element.items() if key.rpartition("}")[2] == name), default)


def is_description(text: str) -> bool:
    """Whether this is what an author wrote about a picture, and not a file's name."""
    return bool(text) and not re.fullmatch(_PICTURE_FILE, text)


def drawing_text(root: Element) -> str:
    """The paragraphs of text in a drawing or diagram (``a:p``)."""
    return "\n\n".join(filter(None, map(drawing_paragraph, root.iter("{*}p"))))


def drawing_paragraph(paragraph: Element) -> str:
    """The text of a paragraph of a drawing: of runs, fields and equations, with tabs and line breaks."""
    return "".join(_drawing_runs(paragraph)).strip()


def _drawing_runs(element: Element) -> Iterator[str]:
    for child in element:
        name = local_name(child)
        if name == "t":
            yield re.sub(r"_x000[BD]_|[\v\r]", "\n", child.text or "")
        elif name == "br":
            yield "\n"
        elif name == "tab":
            yield "\t"
        elif name == "AlternateContent":
            yield from choice(child, lambda branch: "".join(_drawing_runs(branch)))
        elif name in ("oMath", "oMathPara"):
            yield equation(child)
        elif name == "fld" and child.get("type") == "slidenum":
            continue
        elif not name.endswith("Pr"):
            yield from _drawing_runs(child)


def choice(alternatives: Element, read: Callable[[Element], _Content]) -> Iterator[_Content]:
    """What the first alternative with any content says: programs draw one of them."""
    for alternative in alternatives:
        content = read(alternative)
        if content:
            yield content
            return


def equation(element: Element) -> str:
    """An equation in one line: a/b, x^2, √(x)."""
    operands = {
        name: "".join(map(equation, part)) for part in element if (name := local_name(part)) and not name.endswith("Pr")
    }
    match local_name(element):
        case "t":
            return str(element.text or "")
        case "f":
            return f"{_group(operands.get('num', ''))}/{_group(operands.get('den', ''))}"
        case "sSup":
            return f"{operands.get('e', '')}^{_group(operands.get('sup', ''))}"
        case "sSub":
            return f"{operands.get('e', '')}_{_group(operands.get('sub', ''))}"
        case "sSubSup":
            return f"{operands.get('e', '')}_{_group(operands.get('sub', ''))}^{_group(operands.get('sup', ''))}"
        case "rad":
            return f"{operands.get('deg', '')}√{_group(operands.get('e', ''))}"
        case "nary":
            limits = "".join(
                sign + _group(operands[name]) for sign, name in (("_", "sub"), ("^", "sup")) if operands.get(name)
            )
            return f"{_property(element, 'chr') or '∫'}{limits} {operands.get('e', '')}"
        case "d":
            inside = (_property(element, "sepChr") or "|").join(
                "".join(map(equation, e)) for e in element.iterfind("{*}e")
            )
            return f"{_property(element, 'begChr') or '('}{inside}{_property(element, 'endChr') or ')'}"
        case "m":
            return "; ".join(", ".join("".join(map(equation, e)) for e in row) for row in element.iterfind("{*}mr"))
        case _:
            return "".join(equation(child) for child in element if not local_name(child).endswith("Pr"))


def _group(text: str) -> str:
    return text if re.fullmatch(r"\w*", text) else f"({text})"


def _property(element: Element, name: str) -> str:
    for child in element:
        if local_name(child).endswith("Pr"):
            for setting in child:
                if local_name(setting) == name:
                    return attribute(setting, "val")
    return ""


def chart_text(root: Element) -> str:
    """The titles of a chart, and its values as a table."""
    titles = list(filter(None, map(drawing_paragraph, root.iter("{*}p"))))
    columns: list[tuple[str, dict[int, str]]] = []
    names: dict[int, str] = {}
    for series in root.iter("{*}ser"):
        name = " ".join(series.xpath("*[local-name()='tx']//*[local-name()='v']/text()"))
        names.update(_points(series, "cat", "xVal"))
        columns.append((name, _points(series, "val", "yVal")))
    rows = [["", *(name for name, _ in columns)]]
    numbers = sorted({*names, *(index for _, values in columns for index in values)})
    rows += ([names.get(index, ""), *(values.get(index, "") for _, values in columns)] for index in numbers)
    return "\n\n".join(filter(None, [*titles, markdown_table(rows) if columns else ""]))


def _points(series: Element, *kinds: str) -> dict[int, str]:
    return {
        int(point.get("idx", 0)): point.findtext("{*}v") or ""
        for child in series
        if local_name(child) in kinds
        for point in child.iter("{*}pt")
    }


def _comparable(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def _guessed_name(info: ZipInfo) -> str:
    """A name in UTF-8 that the archive does not say to be so, as some programs leave out."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _why_no_zip(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(1 << 20)
            size = path.stat().st_size
            file.seek(max(0, size - (1 << 16)))
            is_encrypted = _ENCRYPTED in start or _ENCRYPTED in file.read()
    except OSError as refused:
        return refused.strerror or str(refused)
    if start.startswith(_OLD_FORMAT):
        new = path.suffix.lower()
        return "it is encrypted" if is_encrypted else f"it is of a format before 2007; save it as {new} again"
    return f"it cannot be parsed ({' '.join(str(error).split())[:200]})"
