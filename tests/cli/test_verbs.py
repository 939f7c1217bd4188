"""A verb is a function with ``@verb`` in a module of the folder of verbs; nothing else names it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main

from d2llm.cli import verbs
from d2llm.cli.main import app

COUNT = '''
"""The verb ``count-words``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@dataclass(frozen=True)
class Limits:
    """How much to read."""

    most: Annotated[int, typer.Option(help="Most words.")] = 100


@verb("Measure", shows_answers=True)
def count_words(context: typer.Context, path: Annotated[Path, typer.Argument(metavar="FILE")], limits: Limits) -> None:
    """Count the words of a file."""
    from d2llm.models.remote.kept_answers import kept_answers

    words = path.read_text().split()[: limits.most]
    session_of(context).say(f"{len(words)} words, {kept_answers() is not None}")
'''
RUN = (
    "import sys, d2llm.cli; d2llm.cli.__path__.append(sys.argv[1]); from d2llm.cli.main import main; main(sys.argv[2:])"
)


@pytest.fixture
def run(tmp_path):
    """Runs d2llm with a further file among its verbs."""
    folder = tmp_path / "cli"
    folder.mkdir()
    (folder / "count_words.py").write_text(COUNT)

    def run(*words):
        command = [sys.executable, "-c", RUN, str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_a_file_is_enough_for_a_verb(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    help_text = run("--help").stdout
    measure = help_text[help_text.index("Measure") : help_text.index("Tools")]
    assert "Count the words of a file." in measure
    assert measure.index("probe") < measure.index("count-words")  # after those that ship
    assert "3 words, True" in run("count-words", str(text)).stderr
    assert "2 words" in run("count-words", "--most", "2", str(text)).stderr
    wrong = run(str(text), "count-words")
    assert wrong.returncode == 2
    assert f"the verb comes first; write: d2llm count-words {text}" in " ".join(wrong.stderr.split())


def test_every_verb_that_is_ordered_exists():
    names = {each.name for each in verbs.all_verbs()}
    assert {*verbs._ORDER} <= names
    assert names == {*typer.main.get_command(app).commands}
