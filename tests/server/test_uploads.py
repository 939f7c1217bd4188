"""Documents from uploaded files."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.core.types import Passage
from d2llm.server.settings import ServeSettings
from d2llm.server.uploads import documents_of


def upload(name: str, text: str) -> Passage:
    body = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{text}\r\n--b--\r\n'
    (document,) = documents_of(body.encode(), "multipart/form-data; boundary=b", ServeSettings())
    return document


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n# One  \ntext\n# Two", "a.md"),  # no heading is above all of the text
        ("```\n# code\n```\n<!-- # comment -->\n# One\ntext", "One"),
        ("# A #", "A"),
        ("#\ttwo words ##  \r\ntext", "two words"),
        ("# C#", "C#"),
        ("#\nnext line", "a.md"),
        ("## Deep", "Deep"),
        ("#none", "a.md"),
    ],
)
def test_the_first_heading_of_markdown_is_the_title(text: str, title: str):
    assert upload("a.md", text).title == title
    assert upload("a.txt", text).title == "a.txt"


@pytest.mark.parametrize("text", ["# " + "\n" * 50_000 + "x", "# x" + " " * 50_000 + "y", "#" + " " * 50_000 + "\nx"])
def test_long_white_space_after_a_heading_takes_little_time(text: str):
    begin = time.process_time()
    upload("a.md", text)
    assert time.process_time() - begin < 2
