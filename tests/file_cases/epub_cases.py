# ruff: noqa: E501 - markup is read best in one line
"""Electronic books, written by hand."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from file_cases.case import Case, zipped

_XHTML = '<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><head><title>{}</title></head><body>{}</body></html>'
Chapters = Mapping[str, str | bytes]


def page(content: str, *, title: str = "", head: str = '<?xml version="1.0" encoding="UTF-8"?>') -> str:
    """A chapter."""
    return head + _XHTML.format(title, content)


def epub(
    chapters: Chapters,
    *,
    addresses: Mapping[str, str] | None = None,
    spine: Sequence[str] | None = None,
    attributes: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    manifest: str = "",
    title: str = "A book",
    version: str = "3.0",
    package: str = "OEBPS/content.opf",
    doctype: str = "",
    more: Mapping[str, str | bytes] | None = None,
) -> bytes:
    """A book; ``addresses`` are those in the manifest of chapters whose names differ from them."""
    folder = package.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    known = addresses or {}
    names = list(chapters)
    items = "".join(
        f'<item id="c{n}" href="{known.get(name, name)}" media-type="{(kinds or {}).get(name, "application/xhtml+xml")}"/>'
        for n, name in enumerate(names)
    )
    refs = "".join(
        f'<itemref idref="c{names.index(name)}"{(attributes or {}).get(name, "")}/>' for name in spine or names
    )
    opf = (
        f'<?xml version="1.0"?>{doctype}<package xmlns="http://www.idpf.org/2007/opf" version="{version}"><metadata '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata><manifest>{items}{manifest}</manifest>'
        f"<spine>{refs}</spine></package>"
    )
    container = (
        '<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        f'<rootfile full-path="{package}" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    parts: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": container,
        package: opf,
    }
    return zipped(
        {**parts, **{prefix + name: text for name, text in chapters.items()}, **(more or {})}, stored="mimetype"
    )


def epub_cases() -> list[Case]:
    """Books."""
    latin = page("<p>Größe und Maß</p>", head='<?xml version="1.0" encoding="ISO-8859-1"?>').encode("latin-1")
    wide = page("<p>Sixteen bits</p>", head='<?xml version="1.0" encoding="UTF-16"?>').encode("utf-16")
    bare = page("<p>Sixteen without mark</p>", head='<?xml version="1.0" encoding="UTF-16"?>').encode("utf-16-le")
    accented = "Kapitel é.xhtml"
    apart = unicodedata.normalize("NFD", accented)
    image = page('<div><img src="a.jpg" alt=""/></div>')
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><title>Map</title><text x="1"><tspan>North gate</tspan></text></svg>'
    nav = page('<nav epub:type="toc"><ol><li><a href="a.xhtml">Start</a></li></ol></nav>')
    nested = page(
        '<nav epub:type="toc"><ol><li><a href="p.xhtml">Part One</a><ol><li><a href="a.xhtml#x">Chapter 1</a></li></ol></li></ol></nav>'
    )
    bomb = '<!DOCTYPE html [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'
    outside = '<!DOCTYPE html [<!ENTITY file SYSTEM "file:///etc/passwd">]>'
    ncx = (
        '<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap><navPoint><navLabel><text>Beginnings</text></navLabel>'
        '<content src="a.xhtml"/></navPoint></navMap></ncx>'
    )
    encryption = (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><enc:EncryptedData xmlns:enc="http://www.w3.org/2001/04/xmlenc#">'
        '<enc:EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/><enc:CipherData><enc:CipherReference URI="OEBPS/{}"/>'
        "</enc:CipherData></enc:EncryptedData></encryption>"
    )
    return [
        Case(
            "plain.epub",
            epub({"a.xhtml": page("<h1>Owls</h1><p>R&amp;D &lt; 5</p>"), "b.xhtml": page("<p>Second.</p>")}),
            ("Owls", "R&D < 5", "Second."),
        ),
        Case(
            "encoded.epub",
            epub(
                {"my chapter 1%.xhtml": page("<p>Spaces.</p>"), "ünï.xhtml": page("<p>Letters.</p>")},
                addresses={"my chapter 1%.xhtml": "my%20chapter%201%25.xhtml", "ünï.xhtml": "%C3%BCn%C3%AF.xhtml"},
            ),
            ("Spaces.", "Letters."),
        ),
        Case(
            "letters.epub",
            epub({"глава.xhtml": page("<p>Cyrillic.</p>"), "章.xhtml": page("<p>Chinese.</p>")}),
            ("Cyrillic.", "Chinese."),
        ),
        Case("normal_forms.epub", epub({apart: page("<p>Composed.</p>")}, addresses={apart: accented}), ("Composed.",)),
        Case(
            "normal_forms_back.epub",
            epub({accented: page("<p>Apart.</p>")}, addresses={accented: apart.replace(" ", "%20")}),
            ("Apart.",),
        ),
        Case(
            "encodings.epub",
            epub({"a.xhtml": wide, "b.xhtml": latin, "c.xhtml": bare}),
            ("Sixteen bits", "Größe und Maß", "Sixteen without mark"),
        ),
        Case(
            "entities.epub",
            epub(
                {
                    "a.xhtml": page(
                        "<p>one&nbsp;two &mdash; caf&eacute; &#8364;</p>",
                        head='<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "http://www.w3.org/TR/xhtml11/DTD/xhtml11.dtd">',
                    )
                }
            ),
            ("one two — café €",),
        ),
        Case(
            "bomb.epub",
            epub({"a.xhtml": page("<p>Before &c; after</p>", head=bomb)}),
            ("Before", "after"),
            ("aaaaaaaaaaaaaaaaaaaa",),
        ),
        Case(
            "outside.epub",
            epub({"a.xhtml": page("<p>Before &file; after</p>", head=outside)}),
            ("Before", "after"),
            ("root:",),
        ),
        Case(
            "package_entities.epub",
            epub(
                {"a.xhtml": page("<p>Fine.</p>")},
                title="T &amp; t",
                doctype='<!DOCTYPE package [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
            ),
            ("Fine.",),
        ),
        Case(
            "navigation.epub",
            epub({"a.xhtml": page("<p>Text.</p>"), "nav.xhtml": nav}, spine=["nav.xhtml", "a.xhtml"]),
            ("Text.",),
        ),
        Case(
            "aside.epub",
            epub(
                {"a.xhtml": page("<p>Main.</p>"), "n.xhtml": page("<p>Note to page 3.</p>")},
                attributes={"n.xhtml": ' linear="no"'},
            ),
            ("Main.", "Note to page 3."),
        ),
        Case(
            "drawing.epub",
            epub({"a.xhtml": page("<p>Text.</p>"), "map.svg": svg}, kinds={"map.svg": "image/svg+xml"}),
            ("Text.", "North gate"),
        ),
        Case(
            "images.epub",
            epub({"a.xhtml": page("<p>Text.</p>"), "cover.xhtml": image}),
            ("Text.",),
            notices=("cover.xhtml: it has no text",),
        ),
        Case(
            "contents.epub",
            epub(
                {"p.xhtml": page("<p>Part text.</p>"), "a.xhtml": page("<p>Chapter text.</p>"), "nav.xhtml": nested},
                spine=["p.xhtml", "a.xhtml"],
                manifest='<item id="toc" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>',
            ),
            ("Part One Part text.", "Part One Chapter 1 Chapter text."),
        ),
        Case(
            "nowhere.epub",
            epub(
                {"a.xhtml": page("<p>Text.</p>"), "gone away.xhtml": b""},
                addresses={"gone away.xhtml": "gone%20missing.xhtml"},
            ),
            ("Text.",),
            notices=("gone%20missing.xhtml: it is missing",),
        ),
        Case(
            "old.epub",
            epub(
                {"a.html": page("<h2>Chapter</h2><p>Old.</p>")},
                version="2.0",
                package="content.opf",
                kinds={"a.html": "text/html"},
                more={"toc.ncx": ncx},
            ),
            ("Chapter", "Old."),
        ),
        Case(
            "footnotes.epub",
            epub(
                {
                    "a.xhtml": page(
                        '<p>Bees<a epub:type="noteref" href="#f">1</a> sleep.</p><aside epub:type="footnote" id="f"><p>As Klein wrote.</p></aside>'
                    )
                }
            ),
            ("Bees", "sleep.", "As Klein wrote."),
        ),
        Case(
            "selfclosing.epub",
            epub(
                {"a.xhtml": page('<p>Before<a id="x"/> and <script src="a"/>after<br/>it.</p><p>Second <i/>one.</p>')}
            ),
            ("Before and after it.", "Second one."),
        ),
        Case("cdata.epub", epub({"a.xhtml": page("<p><![CDATA[a < b & c]]></p>")}), ("a < b & c",)),
        Case(
            "fonts.epub",
            epub(
                {"a.xhtml": page("<p>Readable.</p>")}, more={"META-INF/encryption.xml": encryption.format("font.otf")}
            ),
            ("Readable.",),
        ),
        Case(
            "parents.epub",
            epub({"../text/a.xhtml": page("<p>Up and down.</p>")}, more={"text/a.xhtml": page("<p>Up and down.</p>")}),
            ("Up and down.",),
        ),
    ]
