"""What a session prints: warnings once, results without trailing blanks; and how it ends before it has begun."""

from __future__ import annotations

import logging
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
