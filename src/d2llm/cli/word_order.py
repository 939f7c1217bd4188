"""What to write instead, for words of the command line in the wrong order.

``index`` and ``keys`` take a name before their verb, all other verbs come first. ``Verbs`` is the class of all groups
of verbs: where a word should be a verb and is none, it says how the same words are meant to be ordered.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from d2llm.core.errors import InputError
from d2llm.core.files import MANIFEST_NAME
from d2llm.core.names import NAMES_ELSEWHERE

_NAMES = {"index": "INDEX", "keys": "FILE"}
"""What the groups whose verb follows a name call it."""
_ELSEWHERE = {
    **dict.fromkeys(("versions", "snapshots", "history", "info", "status", "count", "describe"), "stats"),
    **dict.fromkeys(("insert", "import"), "add"),
    **dict.fromkeys(("update", "build", "create", "ingest"), "upsert"),
    **dict.fromkeys(("remove", "rm", "drop"), "delete"),
    **dict.fromkeys(("optimize", "vacuum", "prune"), "compact"),
    **dict.fromkeys(("check", "repair"), "verify"),
    "ls": "list",
    "show": "get",
    "backup": "snapshot",
    "rollback": "restore",
}
"""Words of other programs for verbs of ``index``."""
_READING = ("add", "upsert", "sync")
"""Verbs of ``index`` with a corpus."""
_HELP = ("help", "--help", "-h")


class Verbs(TyperGroup):
    """A group of verbs that says the right order of words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Also look for a verb where the name should be."""
        if self.name in _NAMES and not any(word in _HELP for word in args):
            advice = _advice_for_named(str(self.name), self.commands, args)
            if advice is not None:
                raise InputError(advice)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb; ``InputError`` if the words are there, but in another order."""
        if self.get_command(ctx, args[0]) is None and self.name not in _NAMES:
            groups: dict[str, Mapping[str, object]] = {
                name: group.commands
                for name, group in ctx.find_root().command.commands.items()
                if hasattr(group, "commands")
            }
            advice = (
                _advice_for_program(self.commands, groups, args)
                if ctx.parent is None
                else _advice_for_group(str(self.name), self.commands, args)
            )
            if advice is not None:
                raise InputError(advice)
        name, command, rest = super().resolve_command(ctx, args)
        _check_options(getattr(command, "params", ()), rest)
        return name, command, rest


def _check_options(known: Sequence[Any], words: Sequence[str]) -> None:
    """Raise an ``InputError`` for an option that has another name here than in other libraries."""
    options = {option for parameter in known for option in parameter.opts}
    for word in takewhile(lambda word: word != "--", words):
        option = word.partition("=")[0]
        meant = NAMES_ELSEWHERE.get(option.lstrip("-").replace("-", "_")) if option.startswith("-") else None
        names = [parameter.opts[0] for parameter in known if parameter.name == meant]
        if names and option not in options:
            raise InputError(f"there is no option {option}; did you mean {names[0]}?")


def check_index_first(index: Path, verb: str, others: Sequence[Path]) -> None:
    """Check that the index is the first of the names, where it can be told from the others.

    Raises:
        InputError: one of the others is an index, or does not exist, and the first is a file or folder that is none.
    """
    if not index.exists() or is_index(index) or (index.is_dir() and not any(index.iterdir())):
        return
    for other in others:
        if is_index(other) or not other.exists():
            rest = [str(index), *(str(word) for word in others if word != other)]
            line = _line("index", other, verb, *rest)
            raise InputError(f"{index}: is not an index; the index comes first; write: {line}")


def check_quiet(given: Sequence[str], words: Sequence[str]) -> None:
    """Check that ``-q`` is not among the words of a query, where it may be meant to begin another one.

    Args:
        given: the whole command line.
        words: those of it that are the query.

    Raises:
        InputError: it is.
    """
    given = [*takewhile(lambda word: word != "--", given)]
    for index, word in enumerate(given[:-1], start=1):
        rest = iter(given[index:])
        if word == "-q" and given[index] in words and not all(one in rest for one in words):
            raise InputError(
                "-q is --quiet, and stands among the words of the query; for several queries, write --query before "
                "each; for fewer remarks, put -q at the end"
            )


def is_index(path: Path) -> bool:
    """Whether a path is the folder of an index, a snapshot or a fit."""
    return (path / MANIFEST_NAME).is_file()


def _advice_for_named(group: str, verbs: Mapping[str, object], words: Sequence[str]) -> str | None:
    """Advice for the words after ``index`` or ``keys``."""
    given = [word for word in words if word == "-" or not word.startswith("-")]
    name = _NAMES[group]
    if not given or (len(given) > 1 and given[1] in verbs):
        return None
    at = words.index(given[0])
    rest = [*words[:at], *words[at + 1 :]]
    if given[0] in verbs:
        others, following = list(rest), name
        is_corpus = (
            given[0] in _READING and len(given) == 2 and Path(given[1]).exists() and not is_index(Path(given[1]))
        )
        if len(given) > 1 and not is_corpus:
            following = given[1]
            others.remove(following)
        return f"the {name.lower()} comes before the verb; write: {_line(group, following, given[0], *others)}"
    if group == "index" and len(given) > 1 and (verb := _ELSEWHERE.get(given[1])):
        return f"there is no verb {given[1]}; did you mean {verb}? write: {_line(group, given[0], verb, *given[2:])}"
    if group == "index" and "search" in given[:2]:
        others = [word for word in words if word != "search"]
        return f"search is a verb of its own; write: {_line('search', *others)}"
    return None


def _advice_for_group(group: str, verbs: Mapping[str, object], words: Sequence[str]) -> str | None:
    """Advice for the words after ``data`` or ``labels``, whose verbs come first."""
    for index, word in enumerate(words[1:], start=1):
        if word in verbs:
            return f"the verb comes first; write: {_line(group, word, *words[:index], *words[index + 1 :])}"
    return None


def _advice_for_program(
    verbs: Mapping[str, object], groups: Mapping[str, Mapping[str, object]], words: Sequence[str]
) -> str | None:
    """Advice for all words, of which the first is no verb."""
    first, rest = words[0], list(words[1:])
    if first == "help":
        return f"for help, write: {_line(*rest[:1], '--help')}"
    owners = [group for group, names in groups.items() if first in names]
    if owners:
        lines = [_line(owner, *_around(owner, first, rest)) for owner in owners]
        return f"{first} is a verb of {' and of '.join(owners)}; write: {', or: '.join(lines)}"
    if rest and rest[0] in verbs:
        return f"the verb comes first; write: {_line(rest[0], first, *rest[1:])}"
    if rest and (owner := next((group for group in _NAMES if rest[0] in groups.get(group, {})), None)):
        return f"{rest[0]} is a verb of {owner}; write: {_line(owner, first, *rest)}"
    return None


def _around(group: str, verb: str, rest: Sequence[str]) -> list[str]:
    """A group's verb with the words that follow it, and with the name before it, if the group has one."""
    if group not in _NAMES:
        return [verb, *rest]
    return [rest[0], verb, *rest[1:]] if rest else [_NAMES[group], verb]


def _line(*words: object) -> str:
    return "d2llm " + " ".join(shlex.quote(str(word)) for word in words)
