# ruff: noqa: E501 - markup is read best in one line
"""Workbooks, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from file_cases.case import Case, zipped

_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_FORMATS = (
    "General", "yyyy-mm-dd", "hh:mm:ss", "[h]:mm:ss", "0.00%", '#,##0.00\\ "€"', "d/m/yy h:mm", "[$£-809]#,##0.00", "000", '0.0" kg"',
)  # fmt: skip
GENERAL, DATE, TIME, DURATION, PERCENT, EURO, DATETIME, POUND, CODE, KILOS = range(len(_FORMATS))


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _styles() -> str:
    formats = "".join(f'<numFmt numFmtId="{164 + n}" formatCode="{_quoted(code)}"/>' for n, code in enumerate(_FORMATS))
    cells = "".join(
        f'<xf numFmtId="{164 + n if n else 0}" fontId="0" fillId="0" borderId="0" xfId="0"/>'
        for n in range(len(_FORMATS))
    )
    one = '<fonts count="1"><font/></fonts><fills count="1"><fill><patternFill/></fill></fills><borders count="1"><border/></borders>'
    base = '<cellStyleXfs count="1"><xf numFmtId="0" fontId="0" fillId="0" borderId="0"/></cellStyleXfs>'
    return f'<styleSheet xmlns="{_MAIN}"><numFmts>{formats}</numFmts>{one}{base}<cellXfs>{cells}</cellXfs></styleSheet>'


def _name(column: int) -> str:
    letters = ""
    while column >= 0:
        letters = chr(65 + column % 26) + letters
        column = column // 26 - 1
    return letters


Value = None | str | float | tuple[float, int]


def _cell(address: str, value: Value) -> str:
    """A cell: text, elements of one, a number, or a number and the number of its format."""
    if value is None:
        return ""
    if isinstance(value, str) and value.startswith("<c "):
        return value.replace("<c ", f'<c r="{address}" ', 1)
    if isinstance(value, str):
        return f'<c r="{address}" t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>'
    number, style = value if isinstance(value, tuple) else (value, GENERAL)
    return f'<c r="{address}" s="{style}"><v>{number}</v></c>'


def sheet(rows: Sequence[Sequence[Value]], more: str = "") -> str:
    """A sheet of rows; an empty row is left out, as Excel does."""
    lines = (
        f'<row r="{n}">{"".join(_cell(f"{_name(c)}{n}", value) for c, value in enumerate(row))}</row>'
        for n, row in enumerate(rows, start=1)
        if row
    )
    return f'<worksheet xmlns="{_MAIN}" xmlns:r="{_OFFICE}/relationships"><sheetData>{"".join(lines)}</sheetData>{more}</worksheet>'


def xlsx(
    sheets: Mapping[str, str],
    *,
    properties: str = "",
    state: Mapping[str, str] | None = None,
    strings: str = "",
    links: str = "",
    more: Mapping[str, str | bytes] | None = None,
    title: str = "",
    main_type: str = f"{_TYPE}.sheet.main+xml",
) -> bytes:
    """A workbook; ``links`` are those of the first sheet, ``state`` has the states of sheets that are hidden."""
    hidden = {name: f' state="{value}"' for name, value in (state or {}).items()}
    entries = "".join(
        f'<sheet name="{_quoted(name)}" sheetId="{n}"{hidden.get(name, "")} r:id="s{n}"/>'
        for n, name in enumerate(sheets, start=1)
    )
    kind = f"{_OFFICE}/relationships"
    relations = "".join(
        f'<Relationship Id="s{n}" Type="{kind}/worksheet" Target="worksheets/sheet{n}.xml"/>'
        for n in range(1, len(sheets) + 1)
    )
    overrides = "".join(
        f'<Override PartName="/xl/worksheets/sheet{n}.xml" ContentType="{_TYPE}.worksheet+xml"/>'
        for n in range(1, len(sheets) + 1)
    )
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType='
        '"application/xml"/><Default Extension="bin" ContentType="application/octet-stream"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{main_type}"/><Override PartName="/xl/styles.xml" ContentType="{_TYPE}.styles+xml"/><Override PartName='
        f'"/xl/sharedStrings.xml" ContentType="{_TYPE}.sharedStrings+xml"/><Override PartName="/docProps/core.xml" ContentType='
        f'"application/vnd.openxmlformats-package.core-properties+xml"/>{overrides}</Types>',
        "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="a" Type="{kind}/officeDocument" '
        f'Target="xl/workbook.xml"/><Relationship Id="b" Type="{_PACKAGE}/relationships/metadata/core-properties" '
        'Target="docProps/core.xml"/></Relationships>',
        "docProps/core.xml": f'<cp:coreProperties xmlns:cp="{_PACKAGE}/metadata/core-properties" '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></cp:coreProperties>',
        "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{kind}">{properties}<sheets>{entries}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">{relations}<Relationship Id="st" '
        f'Type="{kind}/styles" Target="styles.xml"/><Relationship Id="ss" Type="{kind}/sharedStrings" Target="sharedStrings.xml"/>'
        "</Relationships>",
        "xl/styles.xml": _styles(),
        "xl/sharedStrings.xml": f'<sst xmlns="{_MAIN}">{strings}</sst>',
    }
    parts |= {f"xl/worksheets/sheet{n}.xml": content for n, content in enumerate(sheets.values(), start=1)}
    if links:
        parts["xl/worksheets/_rels/sheet1.xml.rels"] = (
            f'<Relationships xmlns="{_PACKAGE}/relationships">{links}</Relationships>'
        )
    return zipped({**parts, **(more or {})})


def _link(name: str, kind: str, target: str) -> str:
    return f'<Relationship Id="{name}" Type="{kind}" Target="{target}"/>'


def xlsx_cases() -> list[Case]:
    """Workbooks."""
    kind = f"{_OFFICE}/relationships"
    comments = (
        f'<comments xmlns="{_MAIN}"><authors><author>Ada</author></authors><commentList><comment ref="B2" authorId="0"><text><r><t>'
        "Counted &amp; </t></r><r><t>checked</t></r></text></comment></commentList></comments>"
    )
    threaded = (
        '<ThreadedComments xmlns="http://schemas.microsoft.com/office/spreadsheetml/2018/threadedcomments"><threadedComment ref="A1" '
        'id="{1}"><text>Is this final?</text></threadedComment><threadedComment ref="A1" id="{2}" parentId="{1}"><text>Yes it is</text>'
        "</threadedComment></ThreadedComments>"
    )
    legacy = (
        f'<comments xmlns="{_MAIN}"><authors><author>tc={{1}}</author></authors><commentList><comment ref="A1" authorId="0"><text><t>'
        "[Threaded comment]\n\nYour version of Excel allows you to read this threaded comment; however, any edits to it will get removed "
        "if the file is opened in a newer version of Excel.\n\nComment:\n    Is this final?\nReply:\n    Yes it is</t></text></comment>"
        "</commentList></comments>"
    )
    office = "http://schemas.microsoft.com/office/2017/10/relationships/threadedComment"
    wide = sheet([[f"col{n}" for n in range(300)], [n + 0.5 for n in range(300)]])
    drawing = (
        '<xdr:wsDr xmlns:xdr="http://schemas.openxmlformats.org/drawingml/2006/spreadsheetDrawing" '
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"><xdr:sp><xdr:txBody><a:p><a:r><a:t>On a shape</a:t></a:r></a:p>'
        "</xdr:txBody></xdr:sp></xdr:wsDr>"
    )
    two = [["Fruit", "Price"], ["Pear", 2], ["Plum", 3], [], ["City", "People"], ["Bonn", 330000]]
    return [
        Case(
            "signs.xlsx",
            xlsx({"Sheet1": sheet([["pressure &lt; 5 &amp; R&amp;D", "a|b *x* \\| 1."]])}),
            ("pressure < 5 & R&D", "*x*"),
        ),
        Case(
            "dates.xlsx",
            xlsx({"S": sheet([["When"], [(45292, DATE)], [(45292.75, DATETIME)], [(45292.0000115741, DATETIME)]])}),
            ("2024-01-01", "2024-01-01 18:00"),
        ),
        Case(
            "times.xlsx",
            xlsx({"S": sheet([["At"], [(0.5208333333333334, TIME)], [(0.999988425925926, TIME)], [(0, TIME)]])}),
            ("12:30", "23:59:59", "00:00"),
            ("1899", "1900"),
        ),
        Case(
            "durations.xlsx",
            xlsx({"S": sheet([["Took"], [(1.0625, DURATION)], [(0.75, DURATION)], [(11.6, DURATION)]])}),
            ("25:30:00", "18:00:00", "278:24:00"),
            ("1899", "1900"),
        ),
        Case(
            "numbers.xlsx",
            xlsx(
                {
                    "S": sheet(
                        [
                            ["n"],
                            [(0.125, PERCENT)],
                            [(19.9, EURO)],
                            [(1234.5, POUND)],
                            [(7, CODE)],
                            [(2.5, KILOS)],
                            [1.1],
                            [0.1 + 0.2],
                            [1e21],
                            [12345678901],
                            [3.0],
                        ]
                    )
                }
            ),
            ("12.50%", "19.90 €", "£1234.50", "007", "2.5 kg", "1.1", "0.3", "12345678901"),
            ("0.30000000000000004", "0.125"),
        ),
        Case(
            "formulas.xlsx",
            xlsx(
                {
                    "S": sheet(
                        [
                            ["Sum", "Text", "Err"],
                            [
                                "<c ><f>1+2</f><v>3</v></c>",
                                '<c t="str"><f>"a"&amp;"b"</f><v>ab &amp; c</v></c>',
                                '<c t="e"><f>1/0</f><v>#DIV/0!</v></c>',
                            ],
                        ]
                    )
                }
            ),
            ("3", "ab & c", "#DIV/0!"),
            ("1+2",),
        ),
        Case(
            "uncached.xlsx",
            xlsx({"S": sheet([["Sum"], ["<c ><f>SUM(A1:A9)</f></c>"]])}),
            ("Sum",),
            notices=("1 formula",),
        ),
        Case(
            "booleans.xlsx",
            xlsx({"S": sheet([["ok"], ['<c t="b"><v>1</v></c>'], ['<c t="b"><v>0</v></c>']])}),
            ("TRUE", "FALSE"),
        ),
        Case(
            "merged.xlsx",
            xlsx(
                {
                    "S": sheet(
                        [["Whole year"], ["North", "South"], [1, 2]],
                        '<mergeCells><mergeCell ref="A1:B1"/></mergeCells>',
                    )
                }
            ),
            ("Whole year", "North", "South"),
        ),
        Case(
            "hidden.xlsx",
            xlsx(
                {"Seen": sheet([["a"]]), "Backstage & co": sheet([["kept safe"]]), "Deep": sheet([["very deep"]])},
                state={"Backstage & co": "hidden", "Deep": "veryHidden"},
            ),
            ("kept safe", "very deep", "Backstage & co"),
        ),
        Case("several.xlsx", xlsx({"S": sheet(two)}), ("Fruit", "Plum", "City", "Bonn", "330000")),
        Case(
            "comments.xlsx",
            xlsx(
                {"S": sheet([["Fruit", "Count"], ["Pear", 2]])},
                links=_link("c", f"{kind}/comments", "../comments1.xml"),
                more={"xl/comments1.xml": comments},
            ),
            ("Counted & checked",),
        ),
        Case(
            "threads.xlsx",
            xlsx(
                {"S": sheet([["Fruit", "Count"]])},
                links=_link("c", f"{kind}/comments", "../comments1.xml")
                + _link("t", office, "../threadedComments/threadedComment1.xml"),
                more={"xl/comments1.xml": legacy, "xl/threadedComments/threadedComment1.xml": threaded},
            ),
            ("Is this final?", "Yes it is"),
            ("Your version of Excel",),
        ),
        Case(
            "rich.xlsx",
            xlsx(
                {"S": sheet([['<c t="s"><v>0</v></c>', '<c t="s"><v>1</v></c>']])},
                strings='<si><r><t xml:space="preserve">Bold </t></r><r><rPr><b/></rPr><t>and not</t></r><rPh sb="0" eb="1"><t>yomi</t></rPh>'
                '</si><si><t xml:space="preserve">  two\nlines_x000D_ </t></si>',
            ),
            ("Bold and not", "two lines"),
            ("yomi", "_x000D_"),
        ),
        Case(
            "macintosh.xlsx",
            xlsx({"S": sheet([["When"], [(43830, DATE)]])}, properties='<workbookPr date1904="1"/>'),
            ("2024-01-01",),
        ),
        Case(
            "inline.xlsx",
            xlsx(
                {
                    "S": sheet(
                        [
                            [
                                '<c t="inlineStr"><is><r><t>in</t></r><r><t>line</t></r></is></c>',
                                '<c t="d" s="1"><v>2024-05-06T00:00:00</v></c>',
                            ]
                        ]
                    )
                }
            ),
            ("inline", "2024-05-06"),
        ),
        Case("wide.xlsx", xlsx({"S": wide}), ("col299", "299.5")),
        Case(
            "scripts.xlsx",
            xlsx({"Übersicht": sheet([["مرحبا", "日本語", "हिन्दी"]])}),
            ("مرحبا", "日本語", "हिन्दी", "Übersicht"),
        ),
        Case(
            "drawing.xlsx",
            xlsx(
                {"S": sheet([["a"]])},
                links=_link("d", f"{kind}/drawing", "../drawings/drawing1.xml"),
                more={"xl/drawings/drawing1.xml": drawing},
            ),
            ("On a shape",),
        ),
        Case(
            "macros.xlsx",
            xlsx(
                {"S": sheet([["With macros."]])},
                main_type="application/vnd.ms-excel.sheet.macroEnabled.main+xml",
                more={"xl/vbaProject.bin": b"\0"},
            ),
            ("With macros.",),
        ),
        Case(
            "strict.xlsx",
            _strict(xlsx({"S": sheet([["Strictly said."], [(45292, DATE)]])})),
            ("Strictly said.", "2024-01-01"),
        ),
        Case(
            "titled.xlsx",
            xlsx({"S": sheet([["Price list 2024"], [], ["Fruit", "Price"], ["Pear", 2]])}, title="Prices &amp; more"),
            ("Price list 2024", "Pear"),
        ),
    ]


def _strict(data: bytes) -> bytes:
    import io
    from zipfile import ZipFile

    with ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    old = {_MAIN: "http://purl.oclc.org/ooxml/spreadsheetml/main", _OFFICE: "http://purl.oclc.org/ooxml/officeDocument"}
    for name, content in parts.items():
        for before, after in old.items():
            content = content.replace(before, after)
        parts[name] = content
    return zipped(parts)
