"""Reads electronic books (EPUB 2 and 3): the parts of the spine, in its order, each as a page of XHTML."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from d2llm.core.types import Section
from d2llm.data.contents import FileContents, UnreadableFileError
from d2llm.data.file_contents import decoded_text
from d2llm.data.html_pages import html_page
from d2llm.data.office_archives import Archive, Element, attribute, local_name

_FONT_ENCRYPTION = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")  # changes fonts alone
_DRAWING = "image/svg+xml"
_MAX_FALLBACKS = 10


@dataclass(frozen=True, slots=True)
class _Item:
    """A file of the book: its address, its type, and the id of what to show if that type cannot be shown."""

    address: str
    kind: str
    fallback: str


def read_book(path: Path) -> FileContents:
    """Title and sections of a book.

    Raises:
        UnreadableFileError: it cannot be read, or is encrypted.
    """
    with Archive(path) as archive:
        return _Book(archive).read()


class _Book:
    """A book that is being read."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._package = self._find_package()
        self._root = archive.xml(self._package)
        self._folder = posixpath.dirname(self._package)
        self._items = {
            item.get("id", ""): _Item(
                item.get("href", ""), item.get("media-type", "").lower(), item.get("fallback", "")
            )
            for item in self._root.iter("{*}item")
        }
        self._encrypted = set(self._encrypted_names())
        self._labels = dict(reversed(list(self._navigation())))  # file -> labels that lead to it, outermost first

    def read(self) -> FileContents:
        title = next((" ".join("".join(element.itertext()).split()) for element in self._root.iter("{*}title")), "")
        sections: list[Section] = []
        num_encrypted = 0
        for reference in self._root.iter("{*}itemref"):
            item = self._items.get(reference.get("idref", ""))
            if item is None:
                self._archive.skip(reference.get("idref", ""), "it is missing in the list of the book's files")
                continue
            name = self._shown(item)
            if name in self._encrypted:
                num_encrypted += 1
                self._archive.skip(item.address, "it is encrypted")
                continue
            try:
                found = list(self._sections(name, item))
            except UnreadableFileError as error:
                self._archive.skip(item.address, str(error))
                continue
            if not found:
                self._archive.skip(item.address, "it has no text")
            sections += found
        if num_encrypted and not sections:
            raise UnreadableFileError("it is encrypted")
        if not sections and self._archive.skipped:
            first, *others = self._archive.skipped
            more = f", and {len(others):,} more" if others else ""
            raise UnreadableFileError(f"it has no text ({first.name}: {first.reason}{more})")
        return FileContents(title, tuple(sections), skipped=tuple(self._archive.skipped))

    def _find_package(self) -> str:
        container = self._archive.optional_xml("META-INF/container.xml")
        paths = (
            [rootfile.get("full-path", "") for rootfile in container.iter("{*}rootfile")]
            if container is not None
            else []
        )
        known = [name for path in paths if (name := self._archive.find(unquote(path)) or self._archive.find(path))]
        found = known or self._archive.matching(r".*\.opf")
        if not found:
            raise UnreadableFileError("it cannot be parsed (it is no book: it has no list of its files)")
        return found[0]

    def _encrypted_names(self) -> Iterator[str]:
        root = self._archive.optional_xml("META-INF/encryption.xml")
        for data in root.iter("{*}EncryptedData") if root is not None else ():
            method = data.find("{*}EncryptionMethod")
            reference = data.find("{*}CipherData/{*}CipherReference")
            if reference is None or (method is not None and method.get("Algorithm") in _FONT_ENCRYPTION):
                continue
            address = reference.get("URI", "")
            yield self._archive.find(unquote(address)) or self._archive.find(address) or address

    def _shown(self, item: _Item) -> str:
        """The name of the file for an item, or of the first of its fallbacks that is a page."""
        shown = item
        for _ in range(_MAX_FALLBACKS):
            if not shown.kind.startswith(("image/", "font/", "audio/", "video/")) or shown.kind == _DRAWING:
                break
            if shown.fallback not in self._items:
                break
            shown = self._items[shown.fallback]
        return self._name(shown.address) or self._name(item.address) or shown.address

    def _name(self, address: str) -> str | None:
        """The file at an address, which may be percent-encoded, or be written as the file's name."""
        path = address.partition("#")[0]
        candidates = (unquote(path), path, unquote(address), address)
        return next((name for candidate in candidates if (name := self._archive.find(self._absolute(candidate)))), None)

    def _absolute(self, address: str) -> str:
        return posixpath.normpath(posixpath.join("/", self._folder, address)).lstrip("/")

    def _sections(self, name: str, item: _Item) -> Iterator[Section]:
        data = self._archive.read(name)
        if item.kind.startswith(("image/", "audio/", "video/", "font/")) and name == self._name(item.address):
            if item.kind == _DRAWING:
                yield from _drawing_sections(self._archive.parse(data))
            return
        _, sections = html_page(decoded_text(data, with_declaration=True))
        labels = self._labels.get(name, ())
        has_headings = any(section.headings for section in sections)
        around = labels[:-1] if has_headings else labels
        for section in sections:
            if section.text.strip():
                new_headings = [heading for heading in section.headings if heading not in around]
                yield replace(section, headings=(*around, *new_headings))

    def _navigation(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The files that the table of contents names, with the labels that lead to each."""
        for item in self._root.iter("{*}item"):
            is_page = "nav" in item.get("properties", "").split()
            if not is_page and item.get("media-type") != "application/x-dtbncx+xml":
                continue
            name = self._name(item.get("href", ""))
            try:
                root = self._archive.xml(name or "")
            except UnreadableFileError:  # it is no text of the book
                continue
            folder = posixpath.dirname(name or "")
            entries = (
                (
                    ordered_list
                    for nav in root.iter("{*}nav")
                    if attribute(nav, "type") == "toc"
                    for ordered_list in nav.iterfind("{*}ol")
                )
                if is_page
                else root.iter("{*}navMap")
            )
            for entry in entries:
                yield from self._entries(entry, folder, ())

    def _entries(self, parent: Element, folder: str, labels: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for entry in parent.iterfind("{*}li" if local_name(parent) == "ol" else "{*}navPoint"):
            label = next((child for child in entry if local_name(child) in ("a", "span", "navLabel")), None)
            text = " ".join("".join(label.itertext()).split()) if label is not None else ""
            path = (*labels, text) if text else labels
            target = label if label is not None and label.get("href") else entry.find("{*}content")
            address = (target.get("href") or target.get("src", "")).partition("#")[0] if target is not None else ""
            full = posixpath.normpath(posixpath.join("/", folder, unquote(address))).lstrip("/")
            if address and (name := self._archive.find(full)):
                yield name, path
            inner = entry if local_name(entry) == "navPoint" else entry.find("{*}ol")
            if inner is not None:
                yield from self._entries(inner, folder, path)


def _drawing_sections(root: Element) -> Iterator[Section]:
    """The texts of an SVG drawing."""
    nodes = (node for node in root.iter() if local_name(node) in ("text", "title", "desc"))
    text = "\n".join(filter(None, (" ".join("".join(part.itertext()).split()) for part in nodes)))
    if text:
        yield Section(text)
