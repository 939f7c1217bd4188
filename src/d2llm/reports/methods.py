"""The kinds of methods, as a terminal and docs/recipes.md list them: every fact is one that a class says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel

from d2llm.core.registry import Registered, Registry
from d2llm.core.settings import bound, shown_as
from d2llm.core.table import Cell, Column, Table
from d2llm.recipe import BackboneConfig, Pooling, Pretraining, TeacherConfig, Tuning, WriterConfig
from d2llm.recipe.data import Sampling
from d2llm.recipe.losses import LOSSES
from d2llm.recipe.variants import VARIANTS, Variant
from d2llm.retrieval.reranker import Reranker
from d2llm.store.vector_formats import VectorFormat

SECTIONS: Mapping[str, Registry[Any]] = {
    "student.backbone": BackboneConfig.kinds,
    "student.pooling": Pooling.kinds,
    "losses": LOSSES,
    "training.pretraining": Pretraining.kinds,
    "mining.sampling": Sampling.kinds,
    "student.backbone.tuning": Tuning.kinds,
    "teacher": TeacherConfig.kinds,
    "writer": WriterConfig.kinds,
    "reranker": Reranker.kinds,
    "vector_format": VectorFormat.kinds,
}
"""All kinds, by the setting that names one."""

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", Any: "object"}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a kind, in words."""

    type: str
    default: str
    help: str


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What a kind is, in words.

    Attributes:
        what: the first paragraph of its class.
        needs: what a user must bring, and what else it costs.
        paper: who published it.
        measured: what it brought, with Markdown links from docs.
        ablations: variants of ``d2llm ablate`` that train with it, or without it where it is the default.
        settings: its settings by name; those of a section within are named ``section.name``.
        module: where its class is.
    """

    what: str
    needs: str
    paper: str
    measured: str
    ablations: tuple[str, ...]
    settings: Mapping[str, Setting]
    module: str


def describe_methods() -> dict[str, dict[str, MethodFacts]]:
    """All kinds of all sections, also those of other packages: section -> kind -> facts."""
    return {
        section: {kind: _described(section, registry, kind) for kind in registry.kinds}
        for section, registry in SECTIONS.items()
    }


def methods_table(section: str, methods: Mapping[str, MethodFacts]) -> Table:
    """The kinds of a section, a row each."""
    name = Column(SECTIONS[section].what, align="left", max_width=32)
    table = Table(name, "what it is, and what it needs", "measured", title=section)
    for kind, facts in methods.items():
        needs = facts.needs and f"needs: {plain(facts.needs)}"
        table.add_row(Cell(kind, note=facts.paper), Cell(plain(facts.what), note=needs), plain(facts.measured))
    return table


def facts_table(section: str, kind: str, facts: MethodFacts) -> Table:
    """One kind in full, without its settings."""
    table = Table("", "", title=f"{section}: {kind}", framed=False)
    links = ", ".join(f"docs/{link}" for link in re.findall(r"\]\(([^)]*)\)", facts.measured))
    rows = {
        "what it is": facts.what,
        "needs": facts.needs,
        "published": facts.paper,
        "measured": facts.measured,
        "measured in": links,
        "ablations": ", ".join(facts.ablations),
        "module": facts.module,
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, plain(text))
    return table


def settings_table(facts: MethodFacts) -> Table:
    """The settings of a kind, a row each."""
    widths = {"type": 30, "default": 24}
    table = Table("setting", *(Column(name, align="left", max_width=widths[name]) for name in widths), "what it is")
    for name, setting in facts.settings.items():
        table.add_row(name, setting.type, setting.default, plain(setting.help))
    return table


def plain(text: str) -> str:
    """Markdown as plain text: without the addresses of links and the marks of code."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")


def _described(section: str, registry: Registry[Any], kind: str) -> MethodFacts:
    try:
        return _facts(section, registry.find(kind))
    except ValueError as error:  # another package's, which is no reason to hide all others
        return MethodFacts(str(error), "", "", "", (), {}, "")


def _facts(section: str, cls: type[Registered]) -> MethodFacts:
    needs = ", ".join(sorted(cls.needs)).replace("_", " ")
    fields = settings_of(cls) if issubclass(cls, BaseModel) else ()
    return MethodFacts(
        what=_one_line((cls.__doc__ or "").split("\n\n")[0]),
        needs=_one_line("; ".join(filter(None, (needs, cls.costs)))),
        paper=cls.paper,
        measured=_one_line(cls.measured),
        ablations=tuple(name for name, variant in VARIANTS.items() if _is_of(variant, section, cls.kind)),
        settings=dict(fields),
        module=cls.__module__,
    )


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _is_of(variant: Variant, section: str, kind: str) -> bool:
    """Whether a variant trains with this kind, or shows what the lack of it does."""
    losses = {**variant.settings.get("losses", {}), **(variant.imitation or {})}
    value: Any = {**variant.settings, "losses": losses}
    for part in section.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if callable(value):  # it changes a pooling
        default = Pooling()
        changed = cast("Pooling", value(default))
        return kind in {stage.kind for stage in changed.stages} - {stage.kind for stage in default.stages}
    if isinstance(value, tuple):  # stages, one after the other
        return kind in {stage["kind"] if isinstance(stage, Mapping) else stage for stage in cast("Any", value)}
    if not isinstance(value, Mapping):
        return value == kind
    named = cast("Mapping[str, Any]", value)
    leaves_out = kind in named and {*variant.settings} == {"losses"}
    return variant.group != "baseline" and bool(named.get("kind") == kind or named.get(kind) or leaves_out)


def settings_of(
    cls: type[BaseModel], prefix: str = "", given: BaseModel | None = None
) -> Iterator[tuple[str, Setting]]:
    """The settings of a class, and of the sections in it; ``given``: the section that is the default."""
    for name, field in cls.model_fields.items():
        limits = [f"{sign} {bound(field, key):.15g}" for key, sign in _BOUNDS.items() if bound(field, key) is not None]
        default: Any = field.get_default(call_default_factory=True) if given is None else getattr(given, name)
        inner = next((annotation for annotation in _flat(field.annotation) if _is_section(annotation)), None)
        if field.is_required() and given is None:
            words = "must be given"
        elif inner and default is not None:
            words = ""  # the lines of its settings follow
        else:
            words = shown_as(field).default or _default(default)
        kind = " ".join([_type(field.annotation), *limits])
        yield f"{prefix}{name}", Setting(kind, words, _one_line(field.description or ""))
        if inner is not None:
            yield from settings_of(inner, f"{prefix}{name}.", default if isinstance(default, BaseModel) else None)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(getattr(value, "kind", ""))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(annotation: Any) -> Iterator[Any]:
    yield annotation
    for alternative in get_args(annotation):
        yield from _flat(alternative)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, Registered)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(
            dict.fromkeys(_type(alternative) for alternative in arguments if alternative is not type(None))
        )
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Registered):
        return annotation.kinds.what
    return _TYPES.get(annotation, "table")
