"""A reader of files that dies or hangs where the file says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from d2llm.core.errors import MissingExtraError
from d2llm.core.types import Section
from d2llm.data.contents import FileContents, UnreadableFileError

_already_read: list[Path] = []


def read_unreliably(path: Path) -> FileContents:
    """Do what the file says; the contents are its text and, as the title, all that this process has read.

    If UNRELIABLE_READER_LOG is set, each file adds a line with the process and its name there.

    Raises:
        UnreadableFileError: the file says "refuse".
        MissingExtraError: the file says "miss".
    """
    text = path.read_text()
    if log := os.environ.get("UNRELIABLE_READER_LOG"):
        with Path(log).open("a") as lines:
            lines.write(f"{os.getpid()} {path.name}\n")
    if text == "die" or (text == "die unless first" and _already_read):
        os.write(2, b"the last words\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "start a program":
        program = subprocess.Popen(["sleep", "60"])
        path.with_suffix(".pid").write_text(str(program.pid))
        program.wait()
    if text in ("slow", "sleep"):
        time.sleep(0.5 if text == "slow" else 60)
    if text == "refuse":
        raise UnreadableFileError("it says so")
    if text == "miss":
        raise MissingExtraError("pip install 'd2llm[documents]'")
    if text == "print":
        os.write(1, b"no reply\n")
        sys.stdout.write("no reply")
    _already_read.append(path)
    return FileContents(" ".join(each.name for each in _already_read), (Section(text, ("Heading",), 3),))
