# ruff: noqa: E501 - markup is read best in one line
"""Presentations, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from file_cases.case import Case, zipped

_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.presentationml"
_SPACES = (
    'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" '
    'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
    f'xmlns:r="{_OFFICE}/relationships" xmlns:m="{_OFFICE}/math" '
    'xmlns:a14="http://schemas.microsoft.com/office/drawing/2010/main" '
    'xmlns:c="http://schemas.openxmlformats.org/drawingml/2006/chart" '
    'xmlns:dgm="http://schemas.openxmlformats.org/drawingml/2006/diagram" '
    'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
)


def p(content: str) -> str:
    """A paragraph; plain text becomes a run."""
    return f"<a:p>{content if content.startswith('<') else r(content)}</a:p>"


def r(text: str) -> str:
    """A run."""
    return f"<a:r><a:t>{text}</a:t></a:r>"


def shape(*paragraphs: str, kind: str = "") -> str:
    """A shape with text; ``kind`` is that of a placeholder."""
    placeholder = f'<p:ph type="{kind}"/>' if kind else ""
    return (
        f'<p:sp><p:nvSpPr><p:cNvPr id="2" name="Shape 2"/><p:cNvSpPr/><p:nvPr>{placeholder}</p:nvPr></p:nvSpPr><p:spPr/>'
        f"<p:txBody><a:bodyPr/>{''.join(map(p, paragraphs))}</p:txBody></p:sp>"
    )


def frame(kind: str, content: str) -> str:
    """A frame with a table, chart or diagram."""
    return (
        '<p:graphicFrame><p:nvGraphicFramePr><p:cNvPr id="4" name="Frame 3"/><p:cNvGraphicFramePr/><p:nvPr/>'
        '</p:nvGraphicFramePr><p:xfrm><a:off x="0" y="0"/><a:ext cx="9" cy="9"/></p:xfrm><a:graphic>'
        f'<a:graphicData uri="{kind}">{content}</a:graphicData></a:graphic></p:graphicFrame>'
    )


def table(*rows: Sequence[str]) -> str:
    """A frame with a table of cells, each one or more paragraphs."""
    cells = [
        "".join(f"<a:tc><a:txBody><a:bodyPr/>{c if c.startswith('<') else p(c)}</a:txBody></a:tc>" for c in row)
        for row in rows
    ]
    lines = "".join(f'<a:tr h="1">{row}</a:tr>' for row in cells)
    grid = '<a:gridCol w="1"/>' * len(rows[0])
    return frame(
        "http://schemas.openxmlformats.org/drawingml/2006/table", f"<a:tbl><a:tblGrid>{grid}</a:tblGrid>{lines}</a:tbl>"
    )


def _slide(content: str, root: str = "sld") -> str:
    tree = f'<p:spTree><p:nvGrpSpPr><p:cNvPr id="1" name=""/><p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/>{content}</p:spTree>'
    return f'<?xml version="1.0" encoding="UTF-8"?><p:{root} {_SPACES}><p:cSld>{tree}</p:cSld></p:{root}>'


def _links(links: Mapping[str, tuple[str, str]]) -> str:
    each = (
        f'<Relationship Id="{i}" Type="{_OFFICE}/relationships/{kind}" Target="{to}"/>'
        for i, (kind, to) in links.items()
    )
    return f'<Relationships xmlns="{_PACKAGE}/relationships">{"".join(each)}</Relationships>'


def pptx(
    slides: Sequence[str],
    *,
    order: Sequence[int] = (),
    notes: Mapping[int, str] | None = None,
    links: Mapping[str, tuple[str, str]] | None = None,
    more: Mapping[str, str | bytes] | None = None,
    title: str = "",
    hidden: Sequence[int] = (),
    main_type: str = f"{_TYPE}.presentation.main+xml",
) -> bytes:
    """A presentation; ``order`` has the numbers of the slides' parts, ``links`` are those of each slide."""
    numbers = order or range(1, len(slides) + 1)
    entries = "".join(f'<p:sldId id="{255 + n}" r:id="s{n}"/>' for n in numbers)
    parts: dict[str, str | bytes] = {
        "_rels/.rels": _links({"a": ("officeDocument", "ppt/presentation.xml")})[: -len("</Relationships>")]
        + f'<Relationship Id="b" Type="{_PACKAGE}/relationships/metadata/core-properties" Target="docProps/core.xml"/></Relationships>',
        "docProps/core.xml": f'<cp:coreProperties xmlns:cp="{_PACKAGE}/metadata/core-properties" '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></cp:coreProperties>',
        "ppt/presentation.xml": f"<p:presentation {_SPACES}><p:sldIdLst>{entries}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": _links({f"s{n}": ("slide", f"slides/slide{n}.xml") for n in numbers}),
    }
    overrides = [f'<Override PartName="/ppt/presentation.xml" ContentType="{main_type}"/>']
    for n, content in enumerate(slides, start=1):
        slide = _slide(content)
        parts[f"ppt/slides/slide{n}.xml"] = slide.replace("<p:sld ", '<p:sld show="0" ') if n in hidden else slide
        overrides.append(f'<Override PartName="/ppt/slides/slide{n}.xml" ContentType="{_TYPE}.slide+xml"/>')
        mine = dict(links or {})
        if notes and n in notes:
            mine["n"] = ("notesSlide", f"../notesSlides/notesSlide{n}.xml")
            number = shape('<a:fld id="{1}" type="slidenum"><a:t>7</a:t></a:fld>', kind="sldNum")
            parts[f"ppt/notesSlides/notesSlide{n}.xml"] = _slide(shape(notes[n], kind="body") + number, "notes")
            overrides.append(
                f'<Override PartName="/ppt/notesSlides/notesSlide{n}.xml" ContentType="{_TYPE}.notesSlide+xml"/>'
            )
        parts[f"ppt/slides/_rels/slide{n}.xml.rels"] = _links(mine)
    parts["[Content_Types].xml"] = (
        f'<Types xmlns="{_PACKAGE}/content-types"><Default Extension="xml" ContentType="application/xml"/><Default '
        'Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="bin" '
        f'ContentType="application/octet-stream"/>{"".join(overrides)}</Types>'
    )
    return zipped({**parts, **(more or {})})


def pptx_cases() -> list[Case]:
    """Presentations."""
    group = f"<p:grpSp><p:nvGrpSpPr/><p:grpSpPr/>{shape('Outer group')}<p:grpSp><p:nvGrpSpPr/><p:grpSpPr/>{shape('Inner &amp; group')}</p:grpSp></p:grpSp>"
    diagram = f"<dgm:dataModel {_SPACES}><dgm:ptLst><dgm:pt><dgm:t>{p('Plan &amp; build')}</dgm:t></dgm:pt></dgm:ptLst></dgm:dataModel>"
    chart = (
        f"<c:chartSpace {_SPACES}><c:chart><c:title><c:tx><c:rich>{p('Rain in mm')}</c:rich></c:tx></c:title><c:plotArea><c:barChart>"
        '<c:ser><c:tx><c:strRef><c:f>A1</c:f><c:strCache><c:pt idx="0"><c:v>Year 2020</c:v></c:pt></c:strCache></c:strRef></c:tx><c:cat><c:strRef>'
        '<c:strCache><c:pt idx="0"><c:v>January</c:v></c:pt></c:strCache></c:strRef></c:cat><c:val><c:numRef><c:numCache>'
        '<c:pt idx="0"><c:v>63.5</c:v></c:pt></c:numCache></c:numRef></c:val></c:ser></c:barChart></c:plotArea></c:chart></c:chartSpace>'
    )
    draw = "http://schemas.openxmlformats.org/drawingml/2006"
    smart = frame(f"{draw}/diagram", '<dgm:relIds r:dm="d" r:lo="x" r:qs="y" r:cs="z"/>')
    equation = (
        '<mc:AlternateContent><mc:Choice Requires="a14"><a14:m><m:oMath><m:r><m:t>E=m</m:t></m:r></m:oMath></a14:m></mc:Choice>'
        "<mc:Fallback>" + r("E=m") + "</mc:Fallback></mc:AlternateContent>"
    )
    comments = f'<p:cmLst {_SPACES}><p:cm authorId="0"><p:text>Why so blue &amp; dark?</p:text></p:cm></p:cmLst>'
    modern = (
        '<p188:cmLst xmlns:p188="http://schemas.microsoft.com/office/powerpoint/2018/8/main" '
        f'xmlns:a="{draw}/main"><p188:cm><p188:txBody><a:bodyPr/>{p("A modern remark")}</p188:txBody></p188:cm></p188:cmLst>'
    )
    picture = '<p:pic><p:nvPicPr><p:cNvPr id="9" name="Picture 8" descr="A red fox"/></p:nvPicPr></p:pic>'
    choice = (
        f'<mc:AlternateContent><mc:Choice Requires="a14">{shape("only once")}</mc:Choice><mc:Fallback>{shape("only once")}'
        "</mc:Fallback></mc:AlternateContent>"
    )
    return [
        Case(
            "signs.pptx",
            pptx([shape("pressure &lt; 5 bar &amp; R&amp;D &#8364;", "it&apos;s *so* [x](y) a_b_ \\| `t`")]),
            ("pressure < 5 bar & R&D €", "it's *so* [x](y) a_b_ \\| `t`"),
        ),
        Case(
            "breaks.pptx",
            pptx([shape(r("one") + "<a:br/>" + r("two\tthree") + r("_x000B_four"), "five")]),
            ("one two three four five",),
            ("onetwo", "fourfive", "_x000B_"),
        ),
        Case(
            "titles.pptx",
            pptx(
                [
                    shape("First slide", kind="title") + shape("Text one."),
                    shape("Text two.") + shape("Second slide", kind="ctrTitle"),
                ]
            ),
            ("First slide", "Text one.", "Second slide", "Text two."),
        ),
        Case("only_title.pptx", pptx([shape("Alone here", kind="title")]), ("Alone here",)),
        Case(
            "order.pptx", pptx([shape("came second"), shape("came first")], order=(2, 1)), ("came first", "came second")
        ),
        Case(
            "notes.pptx",
            pptx([shape("One."), shape("Two.")], notes={1: "Say &lt;this&gt;.", 2: "And that."}),
            ("Say <this>.", "And that."),
        ),
        Case(
            "table.pptx",
            pptx([table(("Kind", "Care"), (p("Oak") + p("Elm"), "Prune &amp; tie"))]),
            ("Kind", "Oak Elm", "Prune & tie"),
        ),
        Case("groups.pptx", pptx([group]), ("Outer group", "Inner & group")),
        Case(
            "diagram.pptx",
            pptx(
                [smart], links={"d": ("diagramData", "../diagrams/data1.xml")}, more={"ppt/diagrams/data1.xml": diagram}
            ),
            ("Plan & build",),
        ),
        Case(
            "chart.pptx",
            pptx(
                [frame(f"{draw}/chart", '<c:chart r:id="c"/>')],
                links={"c": ("chart", "../charts/chart1.xml")},
                more={"ppt/charts/chart1.xml": chart},
            ),
            ("Rain in mm", "Year 2020", "January", "63.5"),
        ),
        Case(
            "equation.pptx",
            pptx([shape("<a:r><a:t>Mass: </a:t></a:r>" + equation)]),
            ("Mass: E=m",),
            ("E=mE=m", "E=m E=m"),
        ),
        Case("choice.pptx", pptx([choice]), ("only once",), ("only once only",)),
        Case(
            "comments.pptx",
            pptx(
                [shape("Body.")],
                links={"k": ("comments", "../comments/comment1.xml")},
                more={"ppt/comments/comment1.xml": comments},
            ),
            ("Body.", "Why so blue & dark?"),
        ),
        Case(
            "modern.pptx",
            pptx(
                [shape("Body.")],
                links={"k": ("comments", "../comments/modernComment_1.xml")},
                more={"ppt/comments/modernComment_1.xml": modern},
            ),
            ("Body.", "A modern remark"),
        ),
        Case("hidden.pptx", pptx([shape("Seen."), shape("Backup slide.")], hidden=(2,)), ("Seen.", "Backup slide.")),
        Case(
            "fields.pptx",
            pptx(
                [
                    shape(r("Updated ") + '<a:fld id="{1}" type="datetime1"><a:t>3 May</a:t></a:fld>')
                    + shape('<a:fld id="{2}" type="slidenum"><a:t>7</a:t></a:fld>', kind="sldNum")
                ]
            ),
            ("Updated 3 May",),
        ),
        Case(
            "scripts.pptx",
            pptx([shape("مرحبا بالعالم", "日本語の文章です。", "हिन्दी में")]),
            ("مرحبا بالعالم", "日本語の文章です。", "हिन्दी में"),
        ),
        Case("picture.pptx", pptx([shape("Body.") + picture]), ("Body.",)),
        Case(
            "macros.pptx",
            pptx(
                [shape("With macros.")],
                main_type="application/vnd.ms-powerpoint.presentation.macroEnabled.main+xml",
                more={"ppt/vbaProject.bin": b"\0"},
            ),
            ("With macros.",),
        ),
        Case("title.pptx", pptx([shape("Body.")], title="Tides &amp; moons"), ("Body.",)),
        Case("strict.pptx", pptx([shape("Strictly said.")]), ("Strictly said.",)),
    ]
