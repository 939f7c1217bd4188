# ruff: noqa: E501 - markup is read best in one line
"""Word documents, written by hand."""

from __future__ import annotations

from collections.abc import Mapping

from file_cases.case import Case, zipped

OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_SPACES = (
    f'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" xmlns:r="{OFFICE}/relationships" '
    f'xmlns:m="{OFFICE}/math" xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006" '
    'xmlns:wp="http://schemas.openxmlformats.org/drawingml/2006/wordprocessingDrawing" '
    'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
    'xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape" '
    'xmlns:w14="http://schemas.microsoft.com/office/word/2010/wordml" '
    'xmlns:v="urn:schemas-microsoft-com:vml" xmlns:o="urn:schemas-microsoft-com:office:office"'
)
_MAIN = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
_KINDS = {"comments", "footnotes", "endnotes", "styles", "numbering", "header", "footer"}
_STYLES = """
<w:style w:type="paragraph" w:styleId="Titel"><w:name w:val="Title"/></w:style>
<w:style w:type="paragraph" w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>
<w:style w:type="paragraph" w:styleId="berschrift2"><w:name w:val="heading 2"/><w:basedOn w:val="berschrift1"/></w:style>
<w:style w:type="paragraph" w:styleId="Kapitel"><w:name w:val="Kapitel"/><w:basedOn w:val="berschrift2"/></w:style>
<w:style w:type="paragraph" w:styleId="Rang"><w:name w:val="Rang"/><w:pPr><w:outlineLvl w:val="2"/></w:pPr></w:style>
"""


def part(kind: str, content: str) -> str:
    """A part of a Word document with the root element ``w:<kind>``."""
    return f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?><w:{kind} {_SPACES}>{content}</w:{kind}>'


def p(content: str, properties: str = "") -> str:
    """A paragraph; plain text becomes a run."""
    runs = content if content.startswith("<") else r(content)
    return f"<w:p>{f'<w:pPr>{properties}</w:pPr>' if properties else ''}{runs}</w:p>"


def r(text: str, properties: str = "") -> str:
    """A run of text, or of the elements of one."""
    content = text if text.startswith("<w:") else f'<w:t xml:space="preserve">{text}</w:t>'
    return f"<w:r>{f'<w:rPr>{properties}</w:rPr>' if properties else ''}{content}</w:r>"


def table(*rows: tuple[str, ...]) -> str:
    """A table of cells, each text or elements."""
    cells = ["".join(f"<w:tc>{c if c.startswith('<') else p(c)}</w:tc>" for c in row) for row in rows]
    return "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"


def docx(
    body: str,
    parts: Mapping[str, str | bytes] | None = None,
    *,
    title: str = "",
    main: str = "word/document.xml",
    main_type: str = _MAIN,
    links: str = "",
) -> bytes:
    """A document; ``parts`` of known names (``comments.xml``, ``header1.xml``, ...) are linked with it."""
    others = dict(parts or {})
    others.setdefault("styles.xml", part("styles", _STYLES))
    relations, overrides = [links], []
    for name in others:
        kind = name.split("/")[-1].split(".")[0].rstrip("0123456789")
        if kind in _KINDS and "/" not in name:
            relations.append(f'<Relationship Id="{name}" Type="{OFFICE}/relationships/{kind}" Target="{name}"/>')
            ending = _MAIN.replace("document.main", kind)
            overrides.append(f'<Override PartName="/word/{name}" ContentType="{ending}"/>')
    core = (
        f'<cp:coreProperties xmlns:cp="{_PACKAGE}/metadata/core-properties" '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></cp:coreProperties>'
    )
    types = (
        f'<Types xmlns="{_PACKAGE}/content-types"><Default Extension="xml" ContentType="application/xml"/>'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="bin" ContentType="application/vnd.ms-office.vbaProject"/>'
        '<Default Extension="xlsx" ContentType="application/octet-stream"/>'
        f'<Override PartName="/{main}" ContentType="{main_type}"/>{"".join(overrides)}'
        '<Override PartName="/docProps/core.xml" '
        'ContentType="application/vnd.openxmlformats-package.core-properties+xml"/></Types>'
    )
    roots = (
        f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="a" Type="{OFFICE}/relationships/officeDocument" Target="{main}"/><Relationship Id="b" '
        f'Type="{_PACKAGE}/relationships/metadata/core-properties" Target="docProps/core.xml"/></Relationships>'
    )
    inner = f'<Relationships xmlns="{_PACKAGE}/relationships">{"".join(relations)}</Relationships>'
    name = main.removeprefix("word/")
    document = part("document", f"<w:body>{body}</w:body>")
    return zipped(
        {"[Content_Types].xml": types, "_rels/.rels": roots, "docProps/core.xml": core}
        | {main: document, f"word/_rels/{name}.rels": inner}
        | {f"word/{name}": content for name, content in others.items()}
    )


def _field(code: str, result: str) -> str:
    kinds = ("begin", "separate", "end")
    begin, separate, end = (r(f'<w:fldChar w:fldCharType="{kind}"/>') for kind in kinds)
    return f"{begin}{r(f'<w:instrText>{code}</w:instrText>')}{separate}{r(result)}{end}"


def _notes(kind: str, text: str) -> str:
    separator = f'<w:{kind} w:type="separator" w:id="-1"><w:p><w:r><w:separator/></w:r></w:p></w:{kind}>'
    return part(f"{kind}s", f'{separator}<w:{kind} w:id="2">{p(text)}</w:{kind}>')


_BOX = p("Words in a box.") + p("Its second line.")
_SHAPE = (
    '<mc:AlternateContent><mc:Choice Requires="wps"><w:drawing><wp:inline><wp:docPr id="1" name="Box 1" '
    'descr="A red arrow"/><a:graphic><a:graphicData><wps:wsp><wps:txbx><w:txbxContent>'
    f"{_BOX}</w:txbxContent></wps:txbx></wps:wsp></a:graphicData></a:graphic></wp:inline></w:drawing></mc:Choice>"
    f"<mc:Fallback><w:pict><v:shape><v:textbox><w:txbxContent>{_BOX}</w:txbxContent></v:textbox></v:shape></w:pict>"
    "</mc:Fallback></mc:AlternateContent>"
)
_EQUATION = (
    "<m:oMathPara><m:oMath><m:r><m:t>E=m</m:t></m:r><m:sSup><m:e><m:r><m:t>c</m:t></m:r></m:e><m:sup><m:r><m:t>2</m:t>"
    "</m:r></m:sup></m:sSup><m:r><m:t>+</m:t></m:r><m:f><m:num><m:r><m:t>a</m:t></m:r></m:num><m:den><m:r><m:t>b</m:t>"
    "</m:r></m:den></m:f></m:oMath></m:oMathPara>"
)
_DIAGRAM = (
    '<dgm:dataModel xmlns:dgm="urn:d" xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"><dgm:ptLst><dgm:pt>'
    "<dgm:t><a:p><a:r><a:t>Plan &amp; build</a:t></a:r></a:p></dgm:t></dgm:pt></dgm:ptLst></dgm:dataModel>"
)
_CHART = (
    '<c:chartSpace xmlns:c="http://schemas.openxmlformats.org/drawingml/2006/chart" '
    'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"><c:chart><c:title><c:tx><c:rich><a:p><a:r>'
    "<a:t>Rain in mm</a:t></a:r></a:p></c:rich></c:tx></c:title><c:plotArea><c:barChart><c:ser><c:tx><c:strRef>"
    '<c:strCache><c:pt idx="0"><c:v>Year 2020</c:v></c:pt></c:strCache></c:strRef></c:tx><c:cat><c:strRef><c:strCache>'
    '<c:pt idx="0"><c:v>January</c:v></c:pt></c:strCache></c:strRef></c:cat></c:ser></c:barChart></c:plotArea>'
    "</c:chart></c:chartSpace>"
)
_STRICT = {
    "http://schemas.openxmlformats.org/wordprocessingml/2006/main": "http://purl.oclc.org/ooxml/wordprocessingml/main",
    OFFICE: "http://purl.oclc.org/ooxml/officeDocument",
}


def _strict(data: bytes) -> bytes:
    """A document as Word writes it as "Strict Open XML"."""
    import io
    from zipfile import ZipFile

    with ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    for name, content in parts.items():
        for old, new in _STRICT.items():
            content = content.replace(old, new)
        parts[name] = content
    return zipped(parts)


def docx_cases() -> list[Case]:
    """Word documents."""
    ins, moved = '<w:ins w:id="1" w:author="A">', '<w:moveTo w:id="2" w:author="A">'
    deleted = f'<w:del w:id="3" w:author="A">{r("<w:delText>never said</w:delText>")}</w:del>'
    gone = f'<w:moveFrom w:id="4" w:author="A">{r("old place")}</w:moveFrom>'
    gone_row = f'<w:tr><w:trPr><w:del w:id="5" w:author="A"/></w:trPr><w:tc>{p("struck row")}</w:tc></w:tr>'
    sdt = "<w:sdt><w:sdtPr><w:alias w:val='Label'/></w:sdtPr><w:sdtContent>{}</w:sdtContent></w:sdt>"
    numbered = '<w:numPr><w:ilvl w:val="{}"/><w:numId w:val="1"/></w:numPr>'
    numbering = (
        '<w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0"><w:start w:val="1"/><w:numFmt w:val="decimal"/></w:lvl>'
        '<w:lvl w:ilvl="1"><w:numFmt w:val="bullet"/></w:lvl></w:abstractNum>'
        '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
    )
    span = '<w:tcPr><w:gridSpan w:val="2"/></w:tcPr>'
    start, rest = '<w:tcPr><w:vMerge w:val="restart"/></w:tcPr>', "<w:tcPr><w:vMerge/></w:tcPr>"
    chart_link = f'<Relationship Id="c" Type="{OFFICE}/relationships/chart" Target="charts/chart1.xml"/>'
    html_link = f'<Relationship Id="h" Type="{OFFICE}/relationships/aFChunk" Target="part.html"/>'
    file_link = f'<Relationship Id="f" Type="{OFFICE}/relationships/package" Target="embeddings/budget.xlsx"/>'
    cell = f"<w:tc>{p('cell control')}</w:tc>"
    style = '<w:pStyle w:val="{}"/>'
    return [
        Case(
            "signs.docx",
            docx(
                p("pressure &lt; 5 bar &amp; temperature &gt; 3 &#8364; &#x26; R&amp;D")
                + p("it&apos;s &quot;so&quot; *here* _there_ [x](y) 1. \\| `tick` # no heading")
            ),
            (
                "pressure < 5 bar & temperature > 3 € & R&D",
                'it\'s "so" *here* _there_ [x](y) 1. \\| `tick` # no heading',
            ),
        ),
        Case(
            "breaks.docx",
            docx(
                p(
                    r("<w:t>Name</w:t><w:tab/><w:t>Street</w:t>")
                    + r("<w:br/>")
                    + r("<w:t>two</w:t><w:cr/><w:t>three</w:t><w:br w:type='page'/><w:t>well</w:t>")
                    + r("<w:noBreakHyphen/><w:t>known co</w:t><w:softHyphen/><w:t>operation</w:t>")
                    + r("<w:ptab w:alignment='right'/><w:t>end</w:t>")
                )
            ),
            ("Name Street two three well-known cooperation end",),
        ),
        Case(
            "notes.docx",
            docx(
                p(r("Bees sleep") + r('<w:footnoteReference w:id="2"/>') + r(" and dream"))
                + p(r("Ants do not") + r('<w:endnoteReference w:id="2"/>') + r(".")),
                {
                    "footnotes.xml": _notes("footnote", "As Klein &amp; Sons wrote."),
                    "endnotes.xml": _notes("endnote", "Seen in May."),
                },
            ),
            ("As Klein & Sons wrote.", "Seen in May.", "Bees sleep", "Ants do not"),
        ),
        Case(
            "comments.docx",
            docx(
                p('<w:commentRangeStart w:id="0"/>' + r("Ice melts.") + r('<w:commentReference w:id="0"/>')),
                {"comments.xml": part("comments", f'<w:comment w:id="0" w:author="Ada">{p("At 0 °C?")}</w:comment>')},
            ),
            ("Ice melts.", "At 0 °C?"),
        ),
        Case(
            "headers.docx",
            docx(
                p("Body.")
                + '<w:sectPr><w:headerReference w:type="default" r:id="header1.xml"/><w:footerReference w:type="default" '
                'r:id="footer1.xml"/></w:sectPr>',
                {
                    "header1.xml": part("hdr", p("Contract 77-B")),
                    "footer1.xml": part("ftr", p(r("Confidential ") + _field(" PAGE ", "41"))),
                },
            ),
            ("Body.", "Contract 77-B", "Confidential"),
        ),
        Case(
            "boxes.docx",
            docx(p(r("Before.") + f"<w:r>{_SHAPE}</w:r>" + r(" After."))),
            ("Before.", "Words in a box. Its second line.", "After."),
            ("line. Words in a box", "Words in a box.Its"),
        ),
        Case(
            "nested.docx",
            docx(table(("Outer", table(("Inner &amp; deep", "More"), ("Low", "Last")) + p("Below")))),
            ("Outer", "Inner & deep", "More", "Low", "Last", "Below"),
        ),
        Case(
            "cells.docx",
            docx(table(("Kind", "Care"), (p("Oak") + p("Elm"), p("Water it") + p("") + p("Prune &amp; tie")))),
            ("Oak Elm", "Water it Prune & tie"),
        ),
        Case(
            "merged.docx",
            docx(
                f"<w:tbl><w:tr><w:tc>{span}{p('Wide head')}</w:tc></w:tr><w:tr><w:tc>{start}{p('Tall')}</w:tc><w:tc>"
                f"{p('one')}</w:tc></w:tr><w:tr><w:tc>{rest}{p('')}</w:tc><w:tc>{p('two')}</w:tc></w:tr></w:tbl>"
            ),
            ("Wide head", "Tall", "one", "two"),
        ),
        Case(
            "changes.docx",
            docx(
                p(f"{r('We ')}{deleted}{ins}{r('often meant')}</w:ins>{gone}{moved}{r(' new place')}</w:moveTo>")
                + p(r("Half a sen"), '<w:rPr><w:del w:id="6" w:author="A"/></w:rPr>')
                + p("tence joined.")
                + f"<w:tbl><w:tr><w:tc>{p('kept row')}</w:tc></w:tr>{gone_row}</w:tbl>"
            ),
            ("We often meant", "new place", "kept row", "Half a sentence joined."),
            ("never said", "old place", "struck row"),
        ),
        Case(
            "fields.docx",
            docx(
                p(
                    r("See ")
                    + _field(" REF _Ref1 \\h ", "Table 4")
                    + r(" of ")
                    + '<w:fldSimple w:instr=" DATE ">'
                    + r("May 3")
                    + "</w:fldSimple>"
                )
                + p(
                    '<w:hyperlink w:anchor="x">'
                    + r("the manual")
                    + "</w:hyperlink>"
                    + r(" and ")
                    + _field(' HYPERLINK "http://a.b/c" ', "the shop")
                )
            ),
            ("See Table 4 of May 3", "the manual and the shop"),
            ("REF _Ref1", "HYPERLINK"),
        ),
        Case(
            "lists.docx",
            docx(
                p("Mix.", numbered.format(0))
                + p("Bake.", numbered.format(0))
                + p("gently", numbered.format(1))
                + p("Eat.", numbered.format(0)),
                {"numbering.xml": part("numbering", numbering)},
            ),
            ("1. Mix.", "2. Bake.", "gently", "3. Eat."),
        ),
        Case("hidden.docx", docx(p(r("Seen. ") + r("Hidden aside.", "<w:vanish/>"))), ("Seen.", "Hidden aside.")),
        Case(
            "equation.docx",
            docx(p(r("Mass: ") + _EQUATION.replace("<m:oMathPara>", "").replace("</m:oMathPara>", "")) + p(_EQUATION)),
            ("Mass:", "E=m", "c", "a/b"),
        ),
        Case(
            "tags.docx",
            docx(
                p(
                    '<w:smartTag w:element="City">'
                    + r("Bonn")
                    + "</w:smartTag>"
                    + r(" am ")
                    + '<w:customXml w:element="x">'
                    + r("Rhein")
                    + "</w:customXml>"
                    + '<w:dir w:val="rtl">'
                    + r("bidi")
                    + "</w:dir>"
                )
                + '<w:customXml w:element="y">'
                + p("A wrapped paragraph.")
                + "</w:customXml>"
            ),
            ("Bonn am Rhein", "bidi", "A wrapped paragraph."),
        ),
        Case(
            "controls.docx",
            docx(
                sdt.format(p("Block control."))
                + p(r("Dear ") + sdt.format(r("Ms Ray")) + r(","))
                + "<w:tbl>"
                + sdt.format(f"<w:tr><w:tc>{p('row control')}</w:tc></w:tr>")
                + f"<w:tr>{sdt.format(cell)}<w:tc>{p('plain')}</w:tc></w:tr></w:tbl>"
                + p(
                    "<w:sdt><w:sdtPr><w14:checkbox><w14:checked w14:val='1'/></w14:checkbox></w:sdtPr><w:sdtContent>"
                    + r("☒")
                    + "</w:sdtContent></w:sdt>"
                    + r(" agreed")
                )
            ),
            ("Block control.", "Dear Ms Ray,", "row control", "cell control", "plain", "☒ agreed"),
        ),
        Case(
            "choices.docx",
            docx(
                p(
                    '<w:r><mc:AlternateContent><mc:Choice Requires="w14"><w:t>once only</w:t></mc:Choice><mc:Fallback>'
                    "<w:t>once only</w:t></mc:Fallback></mc:AlternateContent></w:r>"
                )
            ),
            ("once only",),
            ("once onlyonce", "once only once"),
        ),
        Case(
            "scripts.docx",
            docx(
                p(r("مرحبا بالعالم", "<w:rtl/>"))
                + p("שלום עולם")
                + p("日本語の文章です。")
                + p("हिन्दी में")
                + p(
                    r(
                        "<w:ruby><w:rt><w:r><w:t>とう</w:t></w:r></w:rt><w:rubyBase><w:r><w:t>東京</w:t></w:r></w:rubyBase>"
                        "</w:ruby>"
                    )
                )
            ),
            ("مرحبا بالعالم", "שלום עולם", "日本語の文章です。", "हिन्दी में", "東京"),
        ),
        Case(
            "headings.docx",
            docx(
                p("Das Buch", style.format("Titel"))
                + p("Anfang", style.format("berschrift1"))
                + p("Eins.")
                + p("Mitte", style.format("Kapitel"))
                + p("Zwei.")
                + p("Rang", style.format("Rang"))
                + p("Drei.")
                + p("Ende", '<w:outlineLvl w:val="0"/>')
                + p("Vier."),
                title="Das &amp; Buch",
            ),
            ("Anfang", "Mitte", "Rang", "Ende", "Eins.", "Zwei.", "Drei.", "Vier."),
        ),
        Case(
            "symbols.docx",
            docx(
                p(
                    r(
                        '<w:sym w:font="Wingdings" w:char="F0FC"/><w:t> done, 20</w:t><w:sym w:font="Symbol" w:char="F0B0"/>'
                    )
                    + r("C")
                )
            ),
            ("✓ done, 20°C",),
        ),
        Case(
            "macros.docx",
            docx(
                p("With macros."),
                {"vbaProject.bin": b"\0\1"},
                main_type="application/vnd.ms-word.document.macroEnabled.main+xml",
            ),
            ("With macros.",),
        ),
        Case(
            "strict.docx", _strict(docx(p("Strictly &lt; said.") + table(("a", "b")))), ("Strictly < said.", "a", "b")
        ),
        Case("elsewhere.docx", docx(p("In document2."), main="word/document2.xml"), ("In document2.",)),
        Case(
            "drawings.docx",
            docx(p("Text."), {"diagrams/data1.xml": _DIAGRAM, "charts/chart1.xml": _CHART}, links=chart_link),
            ("Text.", "Plan & build", "Rain in mm", "Year 2020", "January"),
        ),
        Case(
            "pieces.docx",
            docx(
                p("Text.") + '<w:altChunk r:id="h"/>',
                {"part.html": "<p>Pasted &amp; kept</p>", "embeddings/budget.xlsx": b"PK"},
                links=html_link + file_link,
            ),
            ("Text.",),
            notices=("part.html", "budget.xlsx"),
        ),
    ]
