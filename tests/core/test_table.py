"""The table as terminal text, Markdown and HTML, each parsed back and compared."""

from __future__ import annotations

import io
from typing import Literal
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from d2llm.core.table import Cell, Column, Table

PRINTABLE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"]), max_size=20)


def example() -> Table:
    table = Table(
        "system", Column("nDCG", "+.3f"), Column("items", ","), "remark", title="A title", caption="A caption"
    )
    table.add_section("first group")
    table.add_row("[red]BM25[/red]", 0.25, 1200, "<b>|*odd*|</b>")
    table.add_section("second group")
    table.add_row(Cell("ours", note="of the paper"), Cell(0.5, "bold", mark="*"), None, "", highlighted=True)
    return table


def printed(table: Table, width: int = 200, color_system: Literal["standard"] | None = None, **options: bool) -> str:
    settings = {"force_terminal": True} | options
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=color_system, **settings)
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


class TestTerminal:
    def test_all_texts_are_printed_verbatim(self) -> None:
        lines = printed(example()).splitlines()
        assert (lines[0], lines[-1]) == ("A title", "A caption")
        cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]
        assert cells == [
            ["first group", "", "", ""],
            ["[red]BM25[/red]", "+0.250", "1,200", "<b>|*odd*|</b>"],
            ["second group", "", "", ""],
            ["ours", "+0.500*", "–", ""],
            ["of the paper", "", "", ""],
        ]

    def test_only_the_bold_cell_is_bold(self) -> None:
        text = printed(example(), color_system="standard")
        bold = [part.partition("\x1b")[0].strip() for part in text.split("\x1b[1m")[1:]]
        assert [part for part in bold if part] == ["A title", "system", "nDCG", "items", "remark", "+0.500*"]

    def test_numbers_are_right_aligned(self) -> None:
        row = next(line for line in printed(example()).splitlines() if "BM25" in line)
        assert "│  +0.250 │ 1,200 │ <b>" in row
        assert row.startswith("│ [red]BM25[/red] │")

    @pytest.mark.parametrize("width", [30, 60])
    def test_a_narrow_terminal_truncates_nothing(self, width: int) -> None:
        table = Table("name", "path")
        table.add_row("short", "abcdefghij" * 12)
        shown = printed(table, width)
        assert max(map(len, shown.splitlines())) <= width
        assert "".join(line.split("│")[2].strip() for line in shown.splitlines() if "│" in line) == "abcdefghij" * 12

    def test_without_headings_no_header_is_printed(self) -> None:
        table = Table("", "", framed=False)
        table.add_row("passages", "12")
        assert printed(table).split() == ["passages", "12"]

    def test_another_program_gets_a_tab_between_cells(self) -> None:
        assert printed(example(), force_terminal=False) == (
            "A title\nsystem\tnDCG\titems\tremark\nfirst group\n[red]BM25[/red]\t+0.250\t1,200\t<b>|*odd*|</b>\n"
            "second group\nours of the paper\t+0.500*\t–\t\nA caption\n"
        )


class TestMarkdown:
    def test_cells_are_parsed_back(self) -> None:
        html = MarkdownIt("commonmark").enable("table").render(example().to_markdown())
        root = ElementTree.fromstring(html)
        rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
        assert rows == [
            ["system", "nDCG", "items", "remark"],
            ["first group", "", "", ""],
            ["[red]BM25[/red]", "+0.250", "1,200", "<b>|*odd*|</b>"],
            ["second group", "", "", ""],
            ["ours of the paper", "+0.500 *", "–", ""],
        ]
        assert [cell.text for cell in root.iter("strong")] == ["first group", "second group", "+0.500"]
        assert [cell.get("style") for cell in root.iter("th")] == [None, *["text-align:right"] * 2, None]

    @given(st.lists(st.tuples(PRINTABLE, PRINTABLE), min_size=1, max_size=5))
    def test_any_text_is_escaped_correctly(self, rows: list[tuple[str, str]]) -> None:
        table = Table("a", "b")
        for row in rows:
            table.add_row(*row)
        tokens = MarkdownIt("commonmark").enable("table").parse(table.to_markdown())
        inlines = [token for token in tokens if token.type == "inline"][2:]
        assert ["".join(child.content for child in inline.children or ()) for inline in inlines] == [
            text for row in rows for text in row
        ]


class TestHtml:
    def test_cells_are_parsed_back(self) -> None:
        root = ElementTree.fromstring(example().to_html())
        assert root.get("aria-label") == "A title"
        rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
        assert rows == [
            ["system", "nDCG", "items", "remark"],
            ["first group"],
            ["[red]BM25[/red]", "+0.250", "1,200", "<b>|*odd*|</b>"],
            ["second group"],
            ["ours of the paper", "+0.500*", "–", ""],
        ]
        assert [row.get("class") for row in root.iter("tr")] == [None, "group", None, "group", "subject"]
        assert {head.get("scope") for head in root.iter("th")} == {"col", "rowgroup", "row"}
        assert [strong.text for strong in root.iter("strong")] == ["+0.500"]

    def test_a_template_does_not_escape_the_table(self) -> None:
        from jinja2 import Environment

        page = Environment(autoescape=True).from_string("{{ table }}").render(table=example())
        assert page == example().to_html()


def test_texts_returns_the_cells_of_all_rows() -> None:
    assert example().texts() == [
        ["[red]BM25[/red]", "+0.250", "1,200", "<b>|*odd*|</b>"],
        ["ours of the paper", "+0.500*", "–", ""],
    ]


def test_a_row_needs_a_value_for_each_column() -> None:
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        Table("a", "b").add_row("only one")
