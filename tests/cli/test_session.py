"""What a session prints: warnings once, results without trailing blanks; and how it ends before it has begun."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from types import ModuleType

import pytest
from rich.padding import Padding

from d2llm.__main__ import main
from d2llm.cli.main import _end_quickly
from d2llm.cli.session import Session, start_logging


@pytest.mark.parametrize(("repeats", "times"), [(False, 1), (True, 2)])
def test_the_same_warning_is_shown_once_except_by_verbs_that_never_end(capsys, repeats, times):
    stop = start_logging(Session(), repeats=repeats)
    for text in ("two", "one", "two"):
        logging.getLogger("d2llm.data").warning("set: %s", text)
    stop()
    assert capsys.readouterr().err.count("warning: set: two") == times


def test_lines_of_results_that_go_to_a_file_have_no_trailing_blanks(capsys):
    Session().show(Padding("long enough for some lines " * 8, (0, 0, 0, 3)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert all(line == "   " + line.strip() for line in lines)


_RANKING = """
from d2llm.cli.session import Session
from d2llm.core.types import Passage, Query, RankedPassage, Ranking
from d2llm.reports.search_tables import ranking_list

results = (RankedPassage(1, Passage("tea", "The kettle: boiling water", title="Tea"), 2.5),)
session = Session()
session.show(ranking_list(Ranking(Query("q", "boil a kettle"), results, 1)))
session.complain("error", "it is cold")
"""
_STYLE = re.compile(r"\x1b\[([\d;]*)m")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("variables", "is_terminal", "has_styles", "has_colours"),
    [
        ({}, True, True, True),
        ({"NO_COLOR": "1"}, True, True, False),  # no-color.org: bold and underlined are no colours
        ({"TERM": "dumb"}, True, False, False),
        ({}, False, False, False),
        ({"FORCE_COLOR": "1"}, False, True, True),
    ],
)
def test_styles_and_colours_are_for_terminals(variables, is_terminal, has_styles, has_colours):
    """Words of the query are underlined, titles are bold, and errors are red; the text is the same without."""
    shown = _output_of(_RANKING, {"TERM": "xterm", **variables}, is_terminal=is_terminal)
    plain = " ".join(_STYLE.sub("", shown).split())
    assert plain == "boil a kettle 1 2.500 tea Tea The kettle: boiling water error: it is cold"
    codes = {code for codes in _STYLE.findall(shown) for code in codes.split(";")}
    assert ({"1", "4"} <= codes) is has_styles
    assert any(30 <= int(code or 0) <= 37 for code in codes) is has_colours
    assert ("\x1b[4mkettle\x1b[0m: \x1b[4mboiling\x1b[0m water" in shown) is has_styles
    assert ("\x1b[31merror: it is cold" in shown) is has_colours
    assert bool(codes) is has_styles


def _output_of(code: str, variables: dict[str, str], *, is_terminal: bool) -> str:
    """What a program writes to a terminal, or to a file."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    command, environment = [sys.executable, "-c", code], kept | variables
    if not is_terminal:
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout
    ours, theirs = os.openpty()
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs):
        os.close(theirs)
        received = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(ours, 65_536):
                received += part
    os.close(ours)
    return received.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("loaded", [True, False])
def test_the_last_collection_is_skipped_unless_triton_would_report_leaks(monkeypatch, loaded):
    frozen: list[bool] = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    _end_quickly()
    assert bool(frozen) is not loaded


def test_another_ctrl_c_while_the_program_ends_is_no_traceback():
    code = """
import os, signal, sys, threading, time
import d2llm.cli.main
from d2llm.__main__ import main

def verb():
    threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT), time.sleep(60))).start()
    sys.exit(130)

d2llm.cli.main.main = verb
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_while_the_program_is_imported_is_no_traceback(monkeypatch):
    class Importing(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "d2llm.cli.main", Importing("d2llm.cli.main"))
    with pytest.raises(SystemExit, match="130"):
        main()
