"""Documents as Markdown, and their parts as HTML."""

from d2llm.core.document import Document, Figures, Items, Note, Section, Values
from d2llm.core.table import Table


def test_markdown_has_what_is_not_only_for_pages() -> None:
    table = Table("name")
    table.add_row("<b>")
    document = Document(
        "1. title",
        [
            Section("Plots", [Figures([("<svg/>", "a caption")])]),
            Section("", [table, Items(["- one", "two"], "Lists:")]),
            Section("Nothing", []),
            Section("Below", [Note("a *note*"), Values({"a": "`"})], level=3),
        ],
        introduction="about it",
    )
    assert document.to_markdown() == (
        "# &#49;. title\n\nabout it\n\n| name |\n| --- |\n| \\<b\\> |\n\nLists:\n\n- &#45; one\n- two\n\n"
        '### Below\n\na \\*note\\*\n\n```json\n{\n  "a": "`"\n}\n```\n'
    )


def test_texts_are_escaped_in_html() -> None:
    assert "<b>" not in Note("<b>").__html__() + Items(["<b>"], "<b>").__html__()
    assert Figures([("<svg/>", "<b>")]).__html__().count("<svg/>") == 1
    assert "&lt;b&gt;" in Figures([("<svg/>", "<b>")], is_wide=True).__html__()
    tree = Values({"<a>": {"x": None, "y": ["<b>", 2]}, "z": [{"w": 1}, {}]}).__html__()
    assert "<dt><bdi>&lt;a&gt;</bdi></dt>" in tree
    assert "<bdi>&lt;b&gt;, 2</bdi>" in tree
    assert "<dd>–</dd>" in tree
    assert Items([]).__html__() == ""
