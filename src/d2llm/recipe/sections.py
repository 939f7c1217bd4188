"""What the sections of a recipe share: the base class, adapters, endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from d2llm.core.errors import RecipeError
from d2llm.core.problems import describe_errors
from d2llm.core.settings import plain_number
from d2llm.core.short_repr import short_repr


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

    what: Literal["student", "path"]


StudentName = Annotated[str, Names("student")]
"""A trained student, a folder or a name."""
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
