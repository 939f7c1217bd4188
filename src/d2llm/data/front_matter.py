"""The front matter of Markdown: fields in YAML (between ``---``), TOML (between ``+++``) or JSON before the text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time, timezone
from typing import Any, cast

from d2llm.core.types import MetadataValue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_YAML = re.compile(r"---[ \t]*\n(?=[^\s])(.*?\n)??(?:---|\.\.\.)[ \t]*(?:\n|\Z)", flags=re.DOTALL)
_TOML = re.compile(r"\+\+\+[ \t]*\n(.*?\n)??\+\+\+[ \t]*(?:\n|\Z)", flags=re.DOTALL)
_UNQUOTED = re.compile(r"^([\w-]+:[ \t]+)([^\s'\"\[{|>&*!#].*:.*?)[ \t]*$", flags=re.MULTILINE)
_LONGEST = 1 << 16  # characters
_MAX_FIELDS = 100
_MAX_VALUES = 1_000  # aliases of YAML can stand for any number of values
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """The title of a text ("" if it has none), its other fields as metadata, and where the text begins."""

    title: str = ""
    fields: Mapping[str, MetadataValue] = field(default_factory=dict[str, MetadataValue])
    end: int = 0


class _NotFieldsError(ValueError):
    """What looks like front matter is none, or more than metadata can be."""


def read_front_matter(text: str) -> FrontMatter:
    """Read the front matter of a text whose lines end in line feeds.

    A list becomes a text with commas ("tags: [a, b]" is "a, b"), and what is nested gets a name with underscores
    ("author: {name: Ann}" is ``author_name``). Characters that names of metadata cannot have become underscores, too.
    What is malformed, or has more than 100 fields, is no front matter but part of the text.
    """
    try:
        if match := _YAML.match(text):
            title, fields = _yaml_fields(match[1] or "")
            end = match.end()
        elif match := _TOML.match(text):
            title, fields = "", tomllib.loads(match[1] or "")
            end = match.end()
        elif text.startswith("{"):
            fields, end = json.JSONDecoder().raw_decode(text)
            title = ""
            if not isinstance(fields, dict) or text[end : end + 1] != "\n" or not text[end:].strip():
                return FrontMatter()
        else:
            return FrontMatter()
        return _front_matter(title, fields, end)
    except (ValueError, RecursionError):  # errors of TOML and JSON are ValueErrors
        return FrontMatter()


def _front_matter(title: str, fields: dict[str, Any], end: int) -> FrontMatter:
    leaves: dict[str, _Leaf] = {}
    budget = [_MAX_VALUES]
    for name, value in fields.items():
        if name.lower() == "title" and not isinstance(value, dict | list):
            title = title or _text(value)
        else:
            _collect(name, value, leaves, budget, depth=0)
    if len(leaves) > _MAX_FIELDS:
        raise _NotFieldsError
    return FrontMatter(" ".join(title.split()), {name: leaf.value for name, leaf in leaves.items()}, end)


@dataclass(slots=True)
class _Leaf:
    """The values of a field; those of a list are one text."""

    values: list[Any] = field(default_factory=list[Any])
    is_list: bool = False

    @property
    def value(self) -> MetadataValue:
        return ", ".join(map(_text, self.values)) if self.is_list or len(self.values) > 1 else _scalar(self.values[0])


def _collect(
    name: str, value: Any, leaves: dict[str, _Leaf], budget: list[int], *, depth: int, listed: bool = False
) -> None:
    budget[0] -= 1
    if budget[0] < 0 or depth > _DEEPEST:
        raise _NotFieldsError
    if isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            _collect(f"{name}_{_text(key)}", item, leaves, budget, depth=depth + 1, listed=listed)
    elif isinstance(value, list | tuple | set):
        for item in cast("list[Any]", value):
            _collect(name, item, leaves, budget, depth=depth + 1, listed=True)
    elif value is not None:
        leaf = leaves.setdefault(re.sub(r"\W+", "_", name.strip()), _Leaf())
        leaf.values.append(value)
        leaf.is_list = leaf.is_list or listed


def _scalar(value: Any) -> MetadataValue:
    if isinstance(value, datetime):
        return value if value.utcoffset() is not None else value.replace(tzinfo=timezone.utc)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=timezone.utc)
    is_kept = isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63)
    return value if is_kept else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value).strip("\n")


def _yaml_fields(text: str) -> tuple[str, dict[str, Any]]:
    """The title as it is written, and all fields; ``ValueError`` if the text is no mapping of names to values."""
    import yaml

    if len(text) > _LONGEST:
        raise _NotFieldsError
    try:
        node, fields = _yaml_node(text)
    except yaml.YAMLError:  # often because of a colon in a title
        quoted = re.sub(_UNQUOTED, lambda line: line[1] + json.dumps(line[2], ensure_ascii=False), text)
        try:
            node, fields = _yaml_node(quoted)
        except yaml.YAMLError as error:
            raise _NotFieldsError from error
    if node is None:
        return "", {}
    if not isinstance(fields, dict) or not all(_is_name(name) for name in cast("dict[Any, Any]", fields)):
        raise _NotFieldsError
    title = next(
        (value.value for key, value in node.value if key.value == "title" and isinstance(value.value, str)), ""
    )
    return title, cast("dict[str, Any]", fields)


def _yaml_node(text: str) -> tuple[Any, Any]:
    """The node of a text in YAML, and its value; None and None if it has only comments."""
    loader = _yaml_loader()(text)
    try:
        node: Any = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _is_name(name: object) -> bool:
    """Whether a text before a colon is the name of a field, and not a sentence between two rules."""
    return isinstance(name, str) and re.fullmatch(r"[^\s](.{0,38}[^\s])?", name) is not None and name.count(" ") < 3


def _yaml_loader() -> Any:
    """YAML's safe loader with the types of version 1.2: "no" is a text, and so is "12:30"."""
    import yaml

    class Loader(yaml.SafeLoader):  # not the one in C, whose stack deep nesting overflows
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - not those of version 1.1

    def timestamp(loader: Any, node: Any) -> object:
        try:
            return loader.construct_yaml_timestamp(node)
        except (ValueError, OverflowError):  # 2024-13-45
            return loader.construct_scalar(node)

    types = {
        "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
        "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
        "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        "float": (r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        "timestamp": (r"\d{4}-\d\d-\d\d([Tt ]+\d\d?:\d\d:\d\d(\.\d*)?[ \t]*(Z|[-+]\d\d?(:\d\d)?)?)?", "0123456789"),
        "merge": ("<<", "<"),
    }
    for name, (pattern, first) in types.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:timestamp", timestamp)
    return Loader
