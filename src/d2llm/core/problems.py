"""What is wrong with the values of settings, in our words instead of pydantic's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from d2llm.core.inputs import shown
from d2llm.core.names import did_you_mean, suggestion

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_DESCRIBED = "described"
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "tuple": "a list",
    "list": "a list",
    "dict": "a dictionary",
    "model": "a dictionary",
    "literal": "{expected}",
}
_BOUNDS = {
    "greater_than_equal": "at least",
    "greater_than": "more than",
    "less_than_equal": "at most",
    "less_than": "less than",
}
_LENGTHS = {
    "too_short": "at least {min_length} value(s)",
    "too_long": "at most {max_length} value(s)",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
}


def described(describe: Callable[[str], str]) -> PydanticCustomError:
    """An error for pydantic whose message, for the path of a setting, ``describe_errors`` asks for."""
    return PydanticCustomError(_DESCRIBED, "{text}", {"text": describe("this section"), "describe": describe})


def requirement(problems: Iterable[ErrorDetails]) -> str | None:
    """What a value must be or have: "be a whole number or a list"; None if these problems are others.

    Args:
        problems: those of one value; of a union of types, one of each.
    """
    needed: list[str] = []
    for problem in problems:
        kind, ctx = problem["type"], problem.get("ctx", {})
        if kind in _LENGTHS:
            return f"have {_LENGTHS[kind].format(**ctx)}"
        if kind in _BOUNDS:
            needed.append(f"{_BOUNDS[kind]} {next(iter(ctx.values())):.15g}")
        elif kind == "string_pattern_mismatch":
            needed.append("of another form")
        elif (name := kind.partition("_")[0]) in _TYPES:
            needed.append(_TYPES[name].format(**ctx))
    return f"be {' or '.join(dict.fromkeys(needed))}" if needed else None


def shown_for(problem: ErrorDetails) -> str:
    """The value that is wrong, with its type if that may be what is wrong."""
    value, kind = cast(object, problem["input"]), problem["type"]
    if kind in _LENGTHS and not value:
        return "empty"
    return f"{value}" if kind in _BOUNDS else shown(value)


def describe_errors(error: ValidationError, section: type[BaseModel], *path: str) -> str:
    """What is wrong with a section of a TOML file or of a manifest, with the path of each setting.

    Args:
        error: what pydantic found.
        section: the class that was to be made.
        path: where the section is.
    """
    grouped: dict[tuple[str, ...], list[ErrorDetails]] = {}
    owners: dict[tuple[str, ...], type[BaseModel] | None] = {}
    for problem in error.errors(include_url=False):
        names, owner = _locate(section, problem)
        key = (*path, *names)
        grouped.setdefault(key, []).append(problem)
        owners[key] = owner
    # Of a union of types, what is wrong with an entry says more than that the whole is of another type.
    inner = [key for key in grouped if not any(key == other[: len(key)] != other for other in grouped)]
    return "; ".join(_describe(".".join(key), grouped[key], owners[key]) for key in inner)


def _locate(section: type[BaseModel], problem: ErrorDetails) -> tuple[list[str], type[BaseModel] | None]:
    """The path of a setting, without pydantic's names of types, and the class that has it (None: no class)."""
    names: list[str] = []
    owner: type[BaseModel] | None = None
    annotation: Any = section
    for part in problem["loc"]:
        if isinstance(part, int):
            names.append(str(part))
        elif get_origin(annotation) in (dict, Mapping):  # a key
            names.append(part)
            annotation = get_args(annotation)[1]
        elif (current := _section_in(annotation)) is not None:
            names.append(part)
            field = current.model_fields.get(part)
            owner, annotation = current, None if field is None else field.annotation
    return names, owner


def _section_in(annotation: Any) -> type[BaseModel] | None:
    # get_args: on Python 3.10 a parametrised type such as tuple[DataConfig, ...] passes isinstance(_, type)
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _describe(key: str, problems: list[ErrorDetails], owner: type[BaseModel] | None) -> str:
    problem, fields = problems[0], {} if owner is None else owner.model_fields
    kind, name, value = problem["type"], key.rpartition(".")[2], cast(object, problem["input"])
    if kind == _DESCRIBED:
        return problem.get("ctx", {})["describe"](key)
    if kind == "extra_forbidden":
        describe = getattr(owner, "describe_unknown", None)
        advice = describe(name) if describe else f"; {suggestion(name, sorted(fields), 'known keys here')}"
        return f"unknown key '{key}'{advice}"
    if kind == "missing":
        return f"{key} is missing; set it"
    needed = requirement(problems)
    if kind == "model_type" and key:
        needed = f"be a table: write [{key}]"
    elif kind == "tuple_type" and name in fields and _section_in(fields[name].annotation):
        needed = f"be a list of tables: write [[{key}]]"
    if needed is not None:
        known = re.findall(r"'([^']*)'", needed) if kind == "literal_error" and isinstance(value, str) else []
        return f"{key or 'it'} is {shown_for(problem)}, but must {needed}{did_you_mean(f'{value}', known)}"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(value, dict) or not key else f" (got {value!r})"
    return (f"{key}: " if key else "") + message + got
