"""Lines of prose of a readable length, for the scripts that write tables and what is said about them into pages."""

from __future__ import annotations

import re
import textwrap

WIDTH = 120


def wrapped(text: str) -> str:
    """The text with no line above ``WIDTH`` characters but those of tables, headings and commands."""
    return "\n".join(map(_wrapped_line, text.splitlines()))


def _wrapped_line(line: str) -> str:
    if line.startswith(("|", "`", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    # A sign at the beginning of a line would make it an item of a list.
    line = re.sub(r"(?<=\S) ([-+]) ", "\0\\1 ", line)
    filled = textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")
