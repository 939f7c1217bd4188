# ruff: noqa: E501 - markup is read best in one line
"""OpenDocument texts, written by hand."""

from __future__ import annotations

from collections.abc import Mapping

from file_cases.case import Case, zipped

_NAMES = ["office", "text", "table", "style", "draw", "dc", "meta", "fo", "manifest", "chart", "presentation"]
_SPACES = " ".join(
    [
        *(
            f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
            for name in _NAMES
            if name not in ("dc", "fo")
        ),
        'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xlink="http://www.w3.org/1999/xlink"',
        'xmlns:fo="urn:oasis:names:tc:opendocument:xmlns:xsl-fo-compatible:1.0"',
        'xmlns:svg="urn:oasis:names:tc:opendocument:xmlns:svg-compatible:1.0"',
        'xmlns:math="http://www.w3.org/1998/Math/MathML"',
        'xmlns:loext="urn:org:documentfoundation:names:experimental:office:xmlns:loext:1.0"',
    ]
)
_MIME = "application/vnd.oasis.opendocument.text"


def odt(body: str, *, title: str = "", styles: str = "", more: Mapping[str, str | bytes] | None = None) -> bytes:
    """A text; ``styles`` are those of the content, ``more`` are further parts."""
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    content = (
        f'{head}<office:document-content {_SPACES} office:version="1.3"><office:automatic-styles>{styles}'
        f"</office:automatic-styles><office:body><office:text>{body}</office:text></office:body></office:document-content>"
    )
    meta = f"{head}<office:document-meta {_SPACES}><office:meta><dc:title>{title}</dc:title></office:meta></office:document-meta>"
    manifest = (
        f'{head}<manifest:manifest {_SPACES}><manifest:file-entry manifest:full-path="/" manifest:media-type="{_MIME}"/>'
        '<manifest:file-entry manifest:full-path="content.xml" manifest:media-type="text/xml"/></manifest:manifest>'
    )
    parts = {"mimetype": _MIME, "content.xml": content, "meta.xml": meta, "META-INF/manifest.xml": manifest}
    master = f"{head}<office:document-styles {_SPACES}><office:master-styles/></office:document-styles>"
    return zipped({**parts, "styles.xml": master, **(more or {})}, stored="mimetype")


def p(text: str) -> str:
    """A paragraph."""
    return f"<text:p>{text}</text:p>"


def _cell(*paragraphs: str, span: str = "") -> str:
    return f"<table:table-cell{span}>{''.join(map(p, paragraphs))}</table:table-cell>"


def _rows(*rows: str) -> str:
    return "<table:table>" + "".join(f"<table:table-row>{row}</table:table-row>" for row in rows) + "</table:table>"


def _master(text: str) -> str:
    return (
        f'<office:document-styles {_SPACES}><office:master-styles><style:master-page style:name="a"><style:header>{p(text)}'
        "</style:header><style:footer><text:p>Page <text:page-number>7</text:page-number></text:p></style:footer>"
        "</style:master-page></office:master-styles></office:document-styles>"
    )


def odt_cases() -> list[Case]:
    """OpenDocument texts."""
    tracked = (
        '<text:tracked-changes><text:changed-region text:id="c1"><text:deletion><office:change-info><dc:creator>A'
        "</dc:creator></office:change-info><text:p>never said</text:p></text:deletion></text:changed-region>"
        '<text:changed-region text:id="c2"><text:insertion><office:change-info><dc:creator>Secret Author</dc:creator>'
        "</office:change-info></text:insertion></text:changed-region></text:tracked-changes>"
    )
    note = (
        '<text:note text:id="n{0}" text:note-class="{1}"><text:note-citation>{0}</text:note-citation><text:note-body>{2}'
        "</text:note-body></text:note>"
    )
    annotation = (
        '<office:annotation office:name="a1"><dc:creator>Ada</dc:creator><dc:date>2024-01-02T03:04:05</dc:date>'
        "<text:p>Is that so?</text:p></office:annotation>"
    )
    heading = '<text:h text:outline-level="{}">{}</text:h>'
    item = "<text:list-item>{}</text:list-item>"
    formula = '<draw:frame><draw:object xlink:href="./Object 1"/><draw:image xlink:href="./ObjectReplacements/Object 1"/></draw:frame>'
    math = (
        '<math:math xmlns:math="http://www.w3.org/1998/Math/MathML"><math:semantics><math:mrow><math:mi>E</math:mi>'
        "<math:mo>=</math:mo><math:mi>mc</math:mi></math:mrow><math:annotation>E = mc</math:annotation></math:semantics>"
        "</math:math>"
    )
    repeated = '<table:table-cell table:number-columns-repeated="3"/>'
    return [
        Case(
            "signs.odt",
            odt(
                p("pressure &lt; 5 bar &amp; R&amp;D &#8364; it&apos;s &quot;so&quot;")
                + p("*a* [b](c) x_y_z 1. \\| `t`")
            ),
            ('pressure < 5 bar & R&D € it\'s "so"', "*a* [b](c) x_y_z 1. \\| `t`"),
        ),
        Case(
            "breaks.odt",
            odt(
                p(
                    'Name<text:tab/>Street<text:line-break/>two<text:s text:c="4"/>three<text:s/>four &#9;five co\u00adop<text:soft-page-break/>en'
                )
            ),
            ("Name Street two three four five coopen",),
        ),
        Case("space.odt", odt(p("one\n      line\n  only")), ("one line only",)),
        Case(
            "notes.odt",
            odt(
                p(
                    "Bees sleep"
                    + note.format(1, "footnote", p("As Klein &amp; Sons wrote.") + p("Twice."))
                    + " and dream."
                )
                + p("Ants" + note.format("i", "endnote", p("Seen in May.")) + " do not.")
            ),
            ("As Klein & Sons wrote. Twice.", "Seen in May.", "Bees sleep", "and dream.", "do not."),
            ("Bees sleep1", "Antsi"),
        ),
        Case(
            "annotations.odt",
            odt(p(f"Ice {annotation}melts<office:annotation-end office:name='a1'/>.")),
            ("Ice melts.", "Is that so?"),
            ("2024-01-02",),
        ),
        Case(
            "changes.odt",
            odt(
                tracked
                + p(
                    'We <text:change text:change-id="c1"/><text:change-start text:change-id="c2"/>often meant'
                    '<text:change-end text:change-id="c2"/> it.'
                )
            ),
            ("We often meant it.",),
            ("never said", "Secret Author"),
        ),
        Case(
            "headings.odt",
            odt(
                heading.format(1, "Start &amp; go")
                + p("One.")
                + heading.format(3, "Deep")
                + p("Two.")
                + heading.format(1, "End")
                + p("Three."),
                title="Of &lt;things&gt;",
            ),
            ("Start & go", "One.", "Deep", "Two.", "End", "Three."),
        ),
        Case(
            "tables.odt",
            odt(
                _rows(_cell("Kind") + _cell("Care"), _cell("Oak", "Elm") + _cell("Water it", "Prune &amp; tie"))
                + p("After.")
            ),
            ("Kind", "Oak Elm", "Water it Prune & tie", "After."),
        ),
        Case(
            "styled_cell.odt",
            odt(_rows(_cell("a <text:span text:style-name='T1'>bold</text:span> word and more"))),
            ("a bold word and more",),
        ),
        Case(
            "merged.odt",
            odt(
                _rows(
                    _cell("Wide", span=' table:number-columns-spanned="2"') + "<table:covered-table-cell/>",
                    _cell("Tall", span=' table:number-rows-spanned="2"') + _cell("one"),
                    "<table:covered-table-cell/>" + _cell("two") + repeated,
                )
            ),
            ("Wide", "Tall", "one", "two"),
        ),
        Case(
            "repeated.odt",
            odt(
                "<table:table><table:table-header-rows><table:table-row>"
                + _cell("Day")
                + _cell("Rain")
                + "</table:table-row></table:table-header-rows><table:table-row>"
                + _cell("Monday")
                + '<table:table-cell table:number-columns-repeated="2"><text:p>dry</text:p></table:table-cell></table:table-row>'
                + '<table:table-row table:number-rows-repeated="1000000">'
                + _cell("")
                + "</table:table-row></table:table>"
            ),
            ("Day", "Rain", "Monday", "dry"),
        ),
        Case(
            "nested.odt",
            odt(
                _rows(
                    f"<table:table-cell>{p('Outer')}{_rows(_cell('Inner') + _cell('Deep'))}{p('Below')}</table:table-cell>"
                )
            ),
            ("Outer", "Inner", "Deep", "Below"),
        ),
        Case(
            "frames.odt",
            odt(
                p(
                    "Before <draw:frame><draw:text-box>"
                    + p("In a box.")
                    + p("Second.")
                    + "</draw:text-box></draw:frame>after."
                )
                + "<draw:frame><draw:text-box>"
                + p("Loose box.")
                + "</draw:text-box></draw:frame>"
                + p("<draw:custom-shape>" + p("On a shape.") + "</draw:custom-shape>")
                + p(
                    "<draw:frame><draw:image xlink:href='a.png'/><svg:title>Red fox</svg:title><svg:desc>A fox in snow</svg:desc></draw:frame>"
                )
            ),
            ("Before", "after.", "In a box. Second.", "Loose box.", "On a shape."),
            ("box.Second", "Before In a box"),
        ),
        Case(
            "lists.odt",
            odt(
                "<text:list>"
                + item.format(p("Mix."))
                + item.format(p("Bake.") + "<text:list>" + item.format(p("gently")) + "</text:list>")
                + "<text:list-header>"
                + p("Head")
                + "</text:list-header></text:list>"
            ),
            ("Mix.", "Bake.", "gently", "Head"),
            ("Mix.Bake", "Bake.gently"),
        ),
        Case(
            "sections.odt",
            odt(
                "<text:section>"
                + p("In a section.")
                + "</text:section><text:table-of-content><text:index-body>"
                + p("Contents<text:tab/>3")
                + "</text:index-body></text:table-of-content>"
                + p(
                    "<text:a xlink:href='http://a.b'>the <text:span>manual</text:span></text:a> by <text:author-name>Ray"
                    "</text:author-name> <text:bookmark-ref>page 4</text:bookmark-ref>"
                    "<text:hidden-text text:string-value='x'>aside</text:hidden-text>"
                )
            ),
            ("In a section.", "Contents 3", "the manual by Ray page 4"),
        ),
        Case(
            "ruby.odt",
            odt(
                p(
                    "<text:ruby><text:ruby-base>東京</text:ruby-base><text:ruby-text>とう</text:ruby-text></text:ruby>です"
                )
                + p("مرحبا بالعالم")
                + p("हिन्दी में")
            ),
            ("東京", "です", "مرحبا بالعالم", "हिन्दी में"),
        ),
        Case("headers.odt", odt(p("Body."), more={"styles.xml": _master("Contract 77-B")}), ("Body.", "Contract 77-B")),
        Case("formula.odt", odt(p("Mass: " + formula), more={"Object 1/content.xml": math}), ("Mass:", "E = mc")),
        Case(
            "fields.odt",
            odt(
                "<text:variable-decls><text:variable-decl text:name='decl'/></text:variable-decls>"
                + p(
                    "Dear <text:placeholder text:placeholder-type='text'>&lt;Name&gt;</text:placeholder>, on "
                    "<text:date>3 May</text:date> <text:reference-mark-start text:name='r'/>see"
                    "<text:reference-mark-end text:name='r'/> <text:sequence>5</text:sequence>"
                )
            ),
            ("Dear <Name>, on 3 May see 5",),
        ),
        Case(
            "numbered.odt",
            odt(
                "<text:numbered-paragraph>"
                + p("A numbered paragraph.")
                + "</text:numbered-paragraph>"
                + "<text:p><text:meta>inside meta</text:meta><text:meta-field> and a field</text:meta-field></text:p>"
                + p("<loext:content-control loext:alias='x'>Ms Ray</loext:content-control> agrees")
            ),
            ("A numbered paragraph.", "inside meta and a field", "Ms Ray agrees"),
        ),
    ]
