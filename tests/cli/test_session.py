"""What a session prints: warnings once, singulars, results without trailing blanks."""

from __future__ import annotations

import logging

import pytest
from rich.padding import Padding

from d2llm.cli.session import Session, start_logging


@pytest.mark.parametrize(("repeats", "times"), [(False, 1), (True, 2)])
def test_the_same_warning_is_shown_once_except_by_verbs_that_never_end(capsys, repeats, times):
    stop = start_logging(Session(), repeats=repeats)
    for text in ("two", "one", "two"):
        logging.getLogger("d2llm.data").warning("set: %s", text)
    stop()
    assert capsys.readouterr().err.count("warning: set: two") == times


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("1 texts in 1 passages, 21 passages", "1 text in 1 passage, 21 passages"),
        ("1 queries have no text; 1 passages were truncated", "1 query has no text; 1 passage was truncated"),
        ("p-1 passages, 0.1 steps, step 1 is, 1 passagesets", "p-1 passages, 0.1 steps, step 1 is, 1 passagesets"),
        ("1 classes, 1 indexes; 1 of 1 texts, 1 lines", "1 class, 1 index; 1 of 1 texts, 1 line"),
    ],
)
def test_one_is_followed_by_a_singular(capsys, message, shown):
    Session().say(message)
    assert capsys.readouterr().err == f"{shown}\n"


def test_lines_of_results_that_go_to_a_file_have_no_trailing_blanks(capsys):
    Session().show(Padding("long enough for some lines " * 8, (0, 0, 0, 3)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert all(line == "   " + line.strip() for line in lines)
