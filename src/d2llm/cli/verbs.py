"""The verbs of the command line: each is declared by ``verb`` beside its function, in any module of this folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import typer

import d2llm.cli
from d2llm.cli.options import with_option_groups
from d2llm.cli.word_order import Verbs

HEADINGS = ("Distil", "Search", "Serve", "Measure", "Tools")
"""Headings of the help, in their order."""


@dataclass(frozen=True)
class Verb:
    """A verb, or a group of verbs under one name.

    Attributes:
        name: what a user writes.
        heading: where the help lists it.
        command: its function, or the group.
        shows_answers: whether it asks a model behind an API and only shows what it answers, or a sum of it.
    """

    name: str
    heading: str
    command: Callable[..., None] | typer.Typer
    shows_answers: bool = False


_verbs: dict[str, Verb] = {}
_Function = TypeVar("_Function", bound=Callable[..., None])


def verb(heading: str, *, shows_answers: bool = False) -> Callable[[_Function], _Function]:
    """Make a function a verb of ``d2llm``, called as the function is; its options may be in groups.

    Args:
        heading: one of ``HEADINGS``.
        shows_answers: whether it asks a model behind an API and only shows what it answers, or a sum of it.
    """

    def declare(function: _Function) -> _Function:
        command: Any = with_option_groups(function)
        name = function.__name__.replace("_", "-")
        _verbs[name] = Verb(name, heading, command, shows_answers)
        return command

    return declare


def verb_group(
    name: str, summary: str, *, heading: str, epilog: str | None = None, shows_answers: bool = False
) -> typer.Typer:
    """A group of verbs under one name; the arguments are as for ``verb``."""
    group = typer.Typer(name=name, cls=Verbs, help=summary, epilog=epilog, no_args_is_help=True, add_completion=False)
    _verbs[name] = Verb(name, heading, group, shows_answers)
    return group


def all_verbs() -> list[Verb]:
    """The verbs of all modules of this folder, by heading; under each in the order of the files and of their code."""
    for module in pkgutil.iter_modules(d2llm.cli.__path__):
        if module.name != "main":
            import_module(f"{d2llm.cli.__name__}.{module.name}")
    return sorted(_verbs.values(), key=lambda verb: HEADINGS.index(verb.heading))
