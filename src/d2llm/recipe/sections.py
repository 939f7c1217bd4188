"""What the sections of a recipe share: the base class, adapters, endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import core_schema

from d2llm.core.errors import RecipeError
from d2llm.core.inputs import shown
from d2llm.core.names import suggestion
from d2llm.core.problems import describe_errors, described
from d2llm.core.registry import Registered, Registry
from d2llm.core.settings import plain_number
from d2llm.core.short_repr import short_repr

if TYPE_CHECKING:
    from pydantic_core import CoreSchema
    from typing_extensions import Self


class Section(BaseModel):
    """A section: an unknown key is an error, and so is a value of another type, or infinity.

    NumPy's numbers are numbers, and lists are tuples.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
    __repr__ = __str__ = short_repr

    def __init__(self, *unnamed: object, **values: Any) -> None:
        """Check every value, and their combination.

        Raises:
            RecipeError: there is no such setting, a value is wrong or has no name, or settings contradict each other.
        """
        if unnamed:
            name = next(iter(type(self).model_fields), "name")
            raise RecipeError(f"{type(self).__name__} takes settings by their names, as in {name}={unnamed[0]!r}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(f"{type(self).__name__}: {describe_errors(error, type(self))}") from None

    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess] - TOML is read without it

    def __setattr__(self, name: str, value: object) -> None:
        raise RecipeError(
            f"{type(self).__name__} does not change; make another by model_copy(update={{{name!r}: ...}})"
        )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return tuple(map(plain_number, cast("list[Any]", value))) if isinstance(value, list) else plain_number(value)


class Names(NamedTuple):
    """Marks a setting whose text names what a run needs."""

    what: Literal["student", "model", "path"]


StudentName = Annotated[str, Names("student")]
"""A trained student, a folder or a name."""
ModelName = Annotated[str, Names("model")]
"""A pretrained model, named as ``backbone.model``."""
InputPath = Annotated[str, Names("path")]
"""A file or folder that is read."""


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of a backbone (published defaults: rank 8, alpha 8, dropout 0.05)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint: its address and key, and how fast and how patiently requests are sent."""

    url: str = Field(pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$")
    """Base address, up to ``/v1``. It must not contain a key."""
    revision: str = ""
    """A name of your choice for the weights that the endpoint serves; together with the model's name it identifies
    what they produce. Change it when the weights change, because an endpoint does not report that."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    tokenizer: str | None = None
    """Folder or Hub name of the model's tokenizer, used to count tokens."""
    characters_per_token: float = Field(default=3.0, gt=0)
    """Without a tokenizer, a limit in tokens times this is the limit in characters."""
    concurrency: int = Field(default=16, ge=1)
    """Maximum number of concurrent requests."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Time limit of one request."""
    patience_minutes: float = Field(default=10.0, ge=0)
    """How long to retry a request while the endpoint is overloaded or unreachable."""


class CompletionConfig(EndpointConfig):
    """An endpoint whose model continues a prompt, and what its tokens cost."""

    api: Literal["completions", "chat"] = "completions"
    """``completions`` sends the prompt unchanged, ``chat`` as a user message in the model's chat template."""
    extra_body: dict[str, Any] = Field(default={})
    """More fields for every request, such as ``{"max_completion_tokens": 400}``."""
    leave_out: tuple[Literal["max_tokens", "temperature", "top_p", "seed"], ...] = ()
    """Fields that the endpoint refuses, and that are therefore not sent."""
    price_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    """In any currency."""
    price_per_million_written_tokens: float | None = Field(default=None, ge=0)

    def body(self, **settings: Any) -> dict[str, Any]:
        """The fields of a request besides model and prompt: ``settings`` without ``leave_out``, with ``extra_body``."""
        return {name: value for name, value in settings.items() if name not in self.leave_out} | self.extra_body

    def cost(self, num_prompt_tokens: int, num_written_tokens: int) -> float | None:
        """The price of so many tokens, in the currency of the prices; None unless both prices are set."""
        if self.price_per_million_prompt_tokens is None or self.price_per_million_written_tokens is None:
            return None
        prompt = num_prompt_tokens * self.price_per_million_prompt_tokens
        return (prompt + num_written_tokens * self.price_per_million_written_tokens) / 1e6


Quantization = Literal["none", "8bit", "4bit"]
"""How the weights of a model's linear layers are stored: as they are, or in fewer bits by bitsandbytes."""


class WarmUpConfig(Section):
    """How the learning rate rises at the start of a run; afterwards it falls linearly to 0."""

    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the steps during which the rate rises from 0 to its full value."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """A number of steps instead of the fraction."""

    def warmup_of(self, total_steps: int) -> int:
        """Number of warm-up steps in a run of ``total_steps``."""
        return round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps


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

    def _written_kind(self, values: Mapping[str, Any]) -> dict[str, Any]:
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
