"""Sections of which there are several kinds, such as ``{ kind = "simcse", dropout = 0.1 }``.

Each kind is a class with settings of its own, found by its name in a ``Registry``. So a setting of one kind
cannot be given with another, and other packages can add kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import core_schema

from d2llm.core.errors import RecipeError
from d2llm.core.inputs import shown
from d2llm.core.names import suggestion
from d2llm.core.problems import describe_errors, described
from d2llm.core.registry import Registered, Registry
from d2llm.recipe.sections import Section

if TYPE_CHECKING:
    from pydantic_core import CoreSchema
    from typing_extensions import Self

_described: set[type[SectionOfKind]] = set()
"""Bases whose JSON Schema is being written."""


class SectionOfKind(Registered, Section):
    """The base of all kinds of one section. It is a field's type; its values are instances of its subclasses.

    In a recipe such a section is a table with the key ``kind`` (``default_kind`` if it is missing), or only the name of
    the kind. In Python it may also be an instance.

    Example::

        class Tuning(SectionOfKind):
            kinds = Registry("tuning", {}, "d2llm.tunings")

        class Lora(Tuning, kind="lora"):
            rank: int = 8

        class Frozen(Tuning, kind="frozen"):
            pass

        class ModelConfig(Section):
            tuning: Tuning = Lora()

        ModelConfig.model_validate({"tuning": {"kind": "lora", "rank": 16}}).tuning.rank  # 16
        ModelConfig.model_validate({"tuning": "frozen"})
        Tuning(kind="lora", rank=16)  # Lora(rank=16)
    """

    kinds: ClassVar[Registry[Any]]
    """All kinds of this section; a class variable of the base."""
    default_kind: ClassVar[str] = ""

    def __new__(cls, **values: Any) -> Self:
        """On the base, an instance of the kind that ``kind`` names (``default_kind``), or a ``RecipeError``."""
        if not cls._is_base():
            return super().__new__(cls)
        try:
            found: Any = cls.kinds.find(cls.kind_of(values))
        except ValueError as error:
            raise RecipeError(str(error)) from error
        return found.__new__(found)

    @classmethod
    def _is_base(cls) -> bool:
        return not cls.kind and hasattr(cls, "kinds")

    @classmethod
    def kind_of(cls, values: Mapping[str, Any]) -> str:
        """The kind that a section with these settings is of."""
        return values.get("kind", cls.default_kind)

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = cast("Mapping[str, Any]", values)
        return {name: value for name, value in given.items() if not (name == "kind" and value == cls.kind)}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls._is_base():
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.plain_serializer_function_ser_schema(_write, info_arg=True)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if not cls._is_base():
            return handler(schema)
        if cls in _described:  # a kind that has a section of the same base in it
            return {"type": ["object", "string"]}
        _described.add(cls)
        try:
            tables = [cls._describe_table(kind, handler) for kind in cls.kinds.kinds]
        finally:
            _described.discard(cls)
        return {"anyOf": [{"enum": cls.kinds.kinds}, *tables]}

    @classmethod
    def _describe_table(cls, kind: str, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described: dict[str, Any] = {**handler(cls.kinds.find(kind).__pydantic_core_schema__)}
        described["properties"] = {"kind": {"const": kind}} | described["properties"]
        needed = ["kind"] if kind != cls.default_kind else []
        needed += described.get("required", [])
        return described | ({"required": needed} if needed else {})

    @classmethod
    def describe_unknown(cls, name: str) -> str:
        """What follows "unknown key 'x'": the kinds that have it, or a key of a similar name."""
        others = [kind for kind in cls.kinds.kinds if name in _fields_of(cls, kind)]
        if others:
            listed = " or ".join(filter(None, (", ".join(others[:-1]), others[-1])))
            return f" of kind {cls.kind}; it is a setting of kind {listed}"
        return f"; {suggestion(name, ['kind', *sorted(cls.model_fields)], 'known keys here')}"

    @classmethod
    def split_kind(cls, text: str) -> tuple[str, str]:
        """The two parts of ``KIND:MODEL``; the default kind and the whole text if there is no kind, or it is a path.

        Raises:
            RecipeError: there is no such kind.
        """
        kind, _, model = text.partition(":")
        if model and kind in cls.kinds.kinds:
            return kind, model
        if model and kind.isidentifier() and len(kind) > 1 and not Path(text).exists():  # no drive of Windows
            raise RecipeError(f"no {cls.kinds.what} '{kind}'; {suggestion(kind, cls.kinds.kinds, 'there are')}")
        return cls.default_kind, text

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Any) -> dict[str, Any]:
        values = handler(self)
        return self._written_kind(values) | values

    def _written_kind(self, values: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The key that names the kind, beside the other settings as they are written."""
        return {"kind": self.kind}

    @classmethod
    def of(cls, value: Any) -> Self:
        """A section of the kind that a value names: a table with ``kind``, the name of a kind, or an instance.

        Raises:
            PydanticCustomError: there is no such kind, or its settings are wrong.
        """
        if isinstance(value, cls):
            return value
        table = {"kind": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping):
            raise described(lambda key: f"{key} is {shown(value)}, but must be a kind, or a table: write [{key}]")
        settings = dict(cast("Mapping[str, Any]", table))
        kind: Any = cls.kind_of(settings)
        settings.pop("kind", None)
        if not kind or not isinstance(kind, str):
            kinds = ", ".join(cls.kinds.kinds)
            raise described(lambda key: f"{key}.kind is missing; set it to one of: {kinds}")
        try:
            found = cls.kinds.find(kind)
        except ValueError as error:
            message = str(error)
            raise described(lambda key: f"{key}: {message}") from error
        try:
            return found.model_validate(settings)
        except ValidationError as error:
            problems = error
            raise described(lambda key: describe_errors(problems, found, *filter(None, (key,)))) from error


def _write(section: SectionOfKind, info: SerializationInfo) -> dict[str, Any]:
    return section.model_dump(
        mode=info.mode,
        exclude_unset=info.exclude_unset,
        exclude_defaults=info.exclude_defaults,
        exclude_none=info.exclude_none,
    )


def _fields_of(cls: type[SectionOfKind], kind: str) -> Mapping[str, Any]:
    try:
        return cls.kinds.find(kind).model_fields
    except ValueError:  # another package's, which cannot be imported
        return {}
