"""The help of every verb shows all the help text in its source, including square brackets."""

from __future__ import annotations

import inspect

import pytest
import typer.main

from d2llm.cli.main import app
from e2e.command_line import succeed


def commands_below(command, path=()):
    """Yields (path, command) for the program (), its verbs, groups such as ("index",), and their verbs."""
    yield path, command
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from commands_below(subcommand, (*path, name))


COMMANDS = dict(commands_below(typer.main.get_command(app)))


def help_of(path):
    positional = ["PLACE"] if len(path) > 1 and path[0] in ("index", "keys") else []  # a folder or file comes first
    return succeed(*path[:1], *positional, *path[1:], "--help").stdout


def texts_of(command):
    """Every help text that the source has for a command, its arguments and its options."""
    yield inspect.getdoc(command.callback) or "" if not hasattr(command, "commands") else command.help
    yield command.epilog or ""
    for parameter in command.params:
        yield parameter.help or ""
        yield parameter.metavar or ""
        yield from getattr(parameter, "opts", ()) if parameter.param_type_name == "option" else ()
        if isinstance(default := getattr(parameter, "show_default", None), str):
            yield default


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "d2llm")
def test_help_shows_every_word_of_its_source(path):
    output = help_of(path)
    missing = [
        word for text in texts_of(COMMANDS[path]) for word in text.replace("\\[", "[").split() if word not in output
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


def test_option_groups_become_options_of_their_verbs():
    names = {parameter.name for parameter in COMMANDS[("index", "upsert")].params}
    assert {"corpus", "student", "vectors", "field", "chunk_tokens", "engine", "json_path"} <= names
    assert not {"new", "splitting", "writing"} & names
    assert "field" not in {parameter.name for parameter in COMMANDS[("encode",)].params}
