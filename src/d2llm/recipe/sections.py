"""What the sections of a recipe share: the base class, adapters, endpoints."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from d2llm.core.errors import RecipeError
from d2llm.core.names import describe_problem
from d2llm.core.short_repr import short_repr

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

KIND_PROBLEM = "kind"
"""The type of pydantic errors about such a section. Their context has ``describe``, a function from the section's path
to a message."""


class Numbers(BaseModel):
    """Settings of which those that are numbers refuse true and false, which pydantic would read as 1 and 0."""

    def __init__(self, **values: Any) -> None:
        """Check every value, and their combination.

        Raises:
            RecipeError: there is no such setting, a value is wrong, or settings contradict each other.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(explain_problem(problem, type(self)) for problem in error.errors())
            raise RecipeError(f"{type(self).__name__}: {problems}") from None

    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess] - TOML is read without it

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            annotation = cls.model_fields[info.field_name].annotation
            if set(get_args(annotation) or (annotation,)) <= {int, float, NoneType}:
                raise ValueError("should be a number")
        return value


class Section(Numbers):
    """A section: an unknown key is an error, and so is infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )
    __repr__ = __str__ = short_repr


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


def describe_kind(problem: Any, key: str) -> str | None:
    """What is wrong with a section of kinds at a path; None if the problem is another."""
    return problem["ctx"]["describe"](key) if problem["type"] == KIND_PROBLEM else None


def section_at(section: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The class of the section in another one at a location."""
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        # get_origin: on Python 3.10 a parametrised type such as tuple[DataConfig, ...] passes isinstance(_, type)
        section = next(c for c in candidates if isinstance(c, type) and not get_origin(c) and issubclass(c, BaseModel))
    return section


def explain_problem(problem: ErrorDetails, root: type[BaseModel]) -> str:
    """What pydantic found wrong with the settings of ``root``, in words."""
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    match problem["type"]:
        case "loss":
            return problem["msg"]
        case "kind":
            return str(describe_kind(problem, key))
        case "model_type":
            return f"{key} should be a table: write [{key}]"
        case "tuple_type":
            return f"{key} should be a list of tables: write [[{key}]]"
        case _:
            return describe_problem(problem, key, lambda: sorted(section_at(root, location[:-1]).model_fields))
