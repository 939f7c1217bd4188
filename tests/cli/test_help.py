"""The help of every verb shows all the help text in its source, including square brackets."""

from __future__ import annotations

import inspect
from collections import defaultdict

import pytest
import typer.main
from typer.testing import CliRunner

from d2llm.cli import help as help_groups
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


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "d2llm")
def test_help_has_groups_of_options_and_words_for_their_values(path):
    command = COMMANDS[path]
    parameters = command.get_params(typer.Context(command, help_option_names=[]))
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    for option in options:
        assert option.metavar is not None, option.name
        assert bool(option.metavar) != option.is_flag, option.name
    headings = [option.rich_help_panel or "Options" for option in options]
    assert max((headings.count(heading) for heading in headings), default=0) <= 12
    assert len(set(headings)) > 1 or len(options) <= 7
    output = help_of(path)
    for word in ("<bool>", "<int", "<float", "<str", "<list", "<path", "<Path", "list[", "x>=", "<=x", "...}"):
        assert word not in output
    for heading in set(headings):
        assert f"─ {heading} ─" in output


def test_every_group_is_of_an_option_that_there_is():
    """No option of the tables of groups is mistyped, and none is in two groups of one verb."""
    verbs = defaultdict(set)  # several groups have a verb "add"
    for path, command in COMMANDS.items():
        verbs[path[-1] if path else ""].update(parameter.name for parameter in command.params)
    for verb, groups in help_groups._OWN.items():
        names = [name for group in groups.values() for name in group]
        assert len(names) == len(set(names)), verb
        assert set(names) <= verbs[verb], verb
    common = [name for names in help_groups._COMMON.values() for name in names]
    assert len(common) == len(set(common))
    assert set(common) <= set().union(*verbs.values())


def test_ranges_are_said_in_words_and_still_checked():
    assert "for example 0.5. From 0 to 1." in " ".join(help_of(("search",)).replace("│", " ").split())
    assert "At least 64." in " ".join(help_of(("encode",)).replace("│", " ").split())
    for options in (("--hybrid", "2"), ("--top-k", "0"), ("--mmr", "-0.1")):
        result = CliRunner().invoke(app, ["search", "x", "y", *options])
        assert result.exit_code == 2
        assert options[0] in result.stderr


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("gate", "[gate] in the recipe says how many queries"),
        ("ensemble", "model of [teacher] in a recipe"),
        ("mine", "[NAME=]FOLDER"),
    ],
)
def test_words_in_square_brackets_are_not_markup(verb, words):
    assert words in help_of((verb,))


def test_option_groups_become_options_of_their_verbs():
    names = {parameter.name for parameter in COMMANDS[("index", "upsert")].params}
    assert {"corpus", "student", "vector_format", "field", "chunk_tokens", "engine", "json_path"} <= names
    assert not {"spec", "splitting", "writing"} & names
    assert "field" not in {parameter.name for parameter in COMMANDS[("encode",)].params}
