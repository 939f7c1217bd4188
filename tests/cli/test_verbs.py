"""A verb is a function with ``@verb`` in a module of the folder of verbs; nothing else names it."""

from __future__ import annotations

import pytest
import typer.main

from d2llm.cli import verbs
from d2llm.cli.main import app
from edited_source import Edits, run_edited

VERB: Edits = {
    "d2llm.data.count_words": '''"""Counts words, in this process or by the workers of a cluster."""

from d2llm.runners.placement import find_runner


def count_here(shard, advance):
    """The number of words of each line of a shard."""
    advance(len(shard))
    return [len(line.split()) for line in shard]


def load():
    """What a worker does; it needs no model."""
    return count_here


def count_words(path, runner="local"):
    """The number of words of each line of a file."""
    lines = path.read_text().splitlines()
    with find_runner(runner).workers(load) as workers:
        shards = (lines[start : start + 2] for start in range(0, len(lines), 2))
        return [number for part in workers.map(shards, lambda _: None) for number in part]
''',
    "d2llm.cli.count_words": '''"""The verb ``count-words``."""

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.options import JsonOption, RunnerOptions
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Measure", shows_answers=True)
def count_words(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE")],
    place: RunnerOptions,
    json_path: JsonOption = None,
) -> None:
    """Count the words of a file."""
    from d2llm.data.count_words import count_words
    from d2llm.models.remote.kept_answers import kept_answers

    counts = count_words(path, place.find())
    session_of(context).say(f"words: {counts}, {kept_answers() is not None}")
    session_of(context).write_report(context, json_path, counts)
''',
}
RUN = """
import sys
from pathlib import Path
from typer.testing import CliRunner
from d2llm.cli.main import app
from d2llm.data.count_words import count_words

if __name__ == "__main__":
    print(count_words(Path(sys.argv[1])))
    for words in sys.argv[2:]:
        result = CliRunner(env={"COLUMNS": "100"}).invoke(app, words.split("|"))
        print(f"exit {result.exit_code}: {' '.join(result.output.split())}")
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three\nfour\nfive six\n\nseven")
    return path


def test_two_files_are_enough_for_a_verb(text):
    """One with what it does, which Python calls, and one with its command; the program finds it."""
    assert len(VERB) == 2
    counts, help_text, found, mistaken = run_edited(
        VERB, RUN, text, "--help", f"count-words|{text}", f"{text}|count-words"
    ).splitlines()
    assert counts == "[3, 1, 2, 0, 1]"
    measure = help_text[help_text.index("Measure") : help_text.index("Tools")]
    assert "Count the words of a file." in measure
    assert measure.index("probe") < measure.index("count-words")  # after those that ship
    assert found == "exit 0: words: [3, 1, 2, 0, 1], True"
    assert mistaken.startswith("exit 2: ")
    assert "the verb comes first; write: d2llm count-words" in mistaken


def test_they_are_enough_for_its_work_on_a_cluster(text):
    pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
    *_, found = run_edited(VERB, RUN, text, f"count-words|{text}|--runner|ray|--workers|2").splitlines()
    assert found.startswith("exit 0: ")
    assert "words: [3, 1, 2, 0, 1], True" in found


def test_the_program_has_every_verb():
    assert {each.name for each in verbs.all_verbs()} == {*typer.main.get_command(app).commands}
