"""The help of every verb shows what its source says, square brackets too."""

from __future__ import annotations

import inspect

import pytest
import typer.main

from d2llm.cli.main import app
from e2e.command_line import succeed


def commands_below(command, path=()):
    """Every command with its words: the program (), verbs, groups such as ("index",), and their own verbs."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands_below(below, (*path, name))


COMMANDS = dict(commands_below(typer.main.get_command(app)))


def help_of(path):
    place = ["PLACE"] if len(path) > 1 and path[0] in ("index", "keys") else []  # a folder or file comes first
    return succeed(*path[:1], *place, *path[1:], "--help").stdout


def texts_of(command):
    """What the source says of a command, its arguments and its options."""
    yield inspect.getdoc(command.callback) or "" if not hasattr(command, "commands") else command.help
    yield command.epilog or ""
    for parameter in command.params:
        yield parameter.help or ""
        yield parameter.metavar or ""
        yield from getattr(parameter, "opts", ()) if parameter.param_type_name == "option" else ()
        if isinstance(shown := getattr(parameter, "show_default", None), str):
            yield shown


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "d2llm")
def test_every_word_is_shown(path):
    shown = help_of(path)
    missing = [
        word for text in texts_of(COMMANDS[path]) for word in text.replace("\\[", "[").split() if word not in shown
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("gate", "[gate] in the recipe says how many queries"),
        ("stack", "model of [teacher] in a recipe"),
        ("mine", "[NAME=]FOLDER"),
    ],
)
def test_words_in_square_brackets_are_not_markup(verb, words):
    assert words in help_of((verb,))


def test_groups_of_options_are_options_of_their_verbs():
    names = {parameter.name for parameter in COMMANDS[("index", "upsert")].params}
    assert {"corpus", "student", "vectors", "field", "chunk_tokens", "engine", "json_path"} <= names
    assert not {"new", "splitting", "writing"} & names
    assert "field" not in {parameter.name for parameter in COMMANDS[("encode",)].params}
