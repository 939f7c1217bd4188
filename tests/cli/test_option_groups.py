"""Option groups: the options that Typer sees, and the groups that the verb receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from d2llm.cli.options import with_option_groups

calls: list[tuple[str, Address, int]] = []


@dataclass(frozen=True)
class Address:
    street: Annotated[str, typer.Option("--street", help="A street.")]
    number: Annotated[int, typer.Option("--number", help="A number.")] = 1


@with_option_groups
def visit(
    name: Annotated[str, typer.Argument(help="A name.")],
    address: Address,
    times: Annotated[int, typer.Option("--times", help="How often.")] = 2,
) -> None:
    """Visit somebody."""
    calls.append((name, address, times))


def run(*arguments: str) -> int:
    calls.clear()
    app = typer.Typer()
    app.command()(visit)
    return CliRunner().invoke(app, arguments).exit_code


def test_the_verb_receives_its_groups() -> None:
    assert run("Ada", "--street", "Main", "--times", "3", "--number", "7") == 0
    assert calls == [("Ada", Address("Main", 7), 3)]


def test_defaults_of_fields_are_those_of_options() -> None:
    assert run("Ada", "--street", "Main") == 0
    assert calls == [("Ada", Address("Main", 1), 2)]


def test_a_field_without_default_is_required() -> None:
    assert run("Ada") == 2
    assert calls == []


def test_the_types_of_a_verb_are_read_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """``get_type_hints`` of Python 3.10 hides the annotations of parameters whose default is None."""

    def hints(kind: Any, **options: Any) -> dict[str, Any]:
        assert isinstance(kind, type)
        return get_type_hints(kind, **options)

    monkeypatch.setattr("d2llm.cli.options.get_type_hints", hints)

    @with_option_groups
    def leave(address: Address, why: Annotated[str | None, typer.Option("--reason")] = None) -> None:
        calls.append((str(why), address, 0))

    calls.clear()
    app = typer.Typer()
    app.command()(leave)
    assert CliRunner().invoke(app, ["--street", "Main", "--reason", "rain"]).exit_code == 0
    assert calls == [("rain", Address("Main", 1), 0)]
