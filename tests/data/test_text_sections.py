"""Markdown that was made of office files, by its headings."""

from __future__ import annotations

import time

import pytest

from d2llm.core.types import Section
from d2llm.data.text_sections import markdown_sections


def test_markdown():
    text = "intro\n# One\na\n```\n# no heading\n```\n### Deep `code`\nb\n## Two\n\nc\n"
    assert [section for section in markdown_sections(text) if section.text] == [
        Section("intro"),
        Section("a\n```\n# no heading\n```", ("One",)),
        Section("b", ("One", "Deep code")),
        Section("c", ("One", "Two")),
    ]


def test_a_line_of_inline_code_opens_no_fence():
    text = "# Install\n```pip install it```\n## Use\nrun it\n~~~ `shell`\n# no heading\n~~~\n## More\nend"
    assert [section for section in markdown_sections(text) if section.text] == [
        Section("```pip install it```", ("Install",)),
        Section("run it\n~~~ `shell`\n# no heading\n~~~", ("Install", "Use")),
        Section("end", ("Install", "More")),
    ]


def test_underlined_headings_of_markdown():
    text = "One\n===\na\n\nTwo\n---\nb\n\n---\nc\n\n| t |\n---\n- item\n---\n\nlong\nparagraph\n---\n"
    assert [section for section in markdown_sections(text) if section.text] == [
        Section("a", ("One",)),
        Section("b\n\n---\nc\n\n| t |\n---\n- item\n---\n\nlong\nparagraph\n---", ("One", "Two")),
    ]


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("# The `max_size` of *a* __file__ ##", "The max_size of a file"),
        ("# my_function_name", "my_function_name"),
        ("# [The **guide**](guide.md)", "The guide"),
        ("# 1\\. Start", "1. Start"),
    ],
)
def test_headings_are_plain_text(heading, name):
    assert list(markdown_sections(f"{heading}\ntext"))[-1].headings == (name,)


def test_a_heading_with_nothing_below_it_is_text():
    markdown = "# Deck\n## Thanks\n## More\n### Links\n# End\n"
    expected = [("Thanks", ("Deck", "Thanks")), ("Links", ("Deck", "More", "Links")), ("End", ("End",))]
    assert [(section.text, section.headings) for section in markdown_sections(markdown) if section.text] == expected


@pytest.mark.parametrize("text", ["", "\n\n", "=", "#", "===\n\n===", "def", "```"])
def test_no_text_is_lost_or_invented(text):
    assert "".join(section.text for section in markdown_sections(text)).split() in ([], text.split())


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("#", ""),
        ("##  ", ""),
        ("# ##", ""),
        ("## a ##  ", "a"),
        ("# a#", "a#"),
        ("# a # b", "a # b"),
        ("# a # ##", "a #"),
        ("#\ta  b\t#", "a  b"),
    ],
)
def test_white_space_and_closing_marks_around_headings(heading, name):
    assert list(markdown_sections(f"{heading}\ntext"))[-1] == Section("text", (name,) if name else ())


@pytest.mark.parametrize("line", ["# a" + " " * 2_000 + "b", "# " + "# " * 1_000 + "b", "# a" + "_" * 20_000 + "b"])
def test_a_long_line_takes_little_time(line):
    begin = time.process_time()
    assert list(markdown_sections(f"{line}\ntext"))[-1].headings
    assert time.process_time() - begin < 1
