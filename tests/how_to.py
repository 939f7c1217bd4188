"""Runs the Python of a documentation page as a reader would: all ``python`` blocks, in order, in an empty folder.

A block with the info string ``output`` right after one is what it prints. A block that needs another package should
import d2llm's own module for it first, so that a missing one is a ``MissingExtraError``, and the page is skipped.
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
    """Code of a page; ``line`` is its first one's number, ``output`` what the page says that it prints, if anything."""

    code: str
    line: int
    output: str | None


def python_blocks(page: Path) -> list[Block]:
    """The ``python`` blocks of a page, in order."""
    blocks: list[Block] = []
    previous = ""  # the language of the block before, with nothing between
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
"""Where the pages expect a server."""


def asks_server(page: Path) -> bool:
    """Whether the Python of a page asks a running server."""
    return any(SERVER in block.code for block in python_blocks(page))


def run_page(page: Path, folder: Path, server: str = "") -> None:
    """Run the blocks of a page one after another in ``folder``, sharing their names; errors point into the page.

    ``server`` is the address of the one to ask, where the page asks one.

    Raises:
        AssertionError: a block prints something other than the page says, or the page has no block.
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
                found = printed.getvalue()
                assert found.strip() == block.output.strip(), f"{page}:{block.line} prints something else:\n{found}"
    finally:
        os.chdir(before)
