"""Runs the Python code of a documentation page as a reader would: all ``python`` blocks in order, in an empty folder.

An ``output`` block directly after a ``python`` block contains its expected output. A block that needs another package
should first import d2llm's own module for it: if it is missing, a ``MissingExtraError`` is raised and the page skipped.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


@dataclass(frozen=True)
class Block:
    """A code block; ``line`` is the number of its first line, ``output`` the expected output if the page gives one."""

    code: str
    line: int
    output: str | None


def python_blocks(page: Path) -> list[Block]:
    """The ``python`` blocks of a page, in order."""
    blocks: list[Block] = []
    previous = ""  # language of the directly preceding block, if any
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language = token.info.strip()
            assert token.map is not None
            if language == "python":
                blocks.append(Block(token.content, token.map[0] + 2, None))
            elif language == "output":
                assert previous == "python", f"{page}:{token.map[0] + 1}: an output has to follow a python block"
                last = blocks.pop()
                blocks.append(Block(last.code, last.line, token.content))
            previous = language
        else:
            previous = ""
    return blocks


SERVER = "http://127.0.0.1:8000"
"""The server address used in the pages."""


def asks_server(page: Path) -> bool:
    """Whether the Python code of a page needs a running server."""
    return any(SERVER in block.code for block in python_blocks(page))


def run_page(page: Path, folder: Path, server: str = "") -> None:
    """Run the blocks of a page in order in ``folder`` with shared names; tracebacks point into the page.

    ``server`` replaces the server address used in the page.

    Raises:
        AssertionError: a block's output differs from the page, or the page has no block.
    """
    blocks = python_blocks(page)
    assert blocks, f"{page}: there is no python block"
    names: dict[str, object] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            code = compile("\n" * (block.line - 1) + block.code.replace(SERVER, server or SERVER), str(page), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            if block.output is not None:
                actual = printed.getvalue()
                assert actual.strip() == block.output.strip(), f"{page}:{block.line} prints something else:\n{actual}"
    finally:
        os.chdir(before)
