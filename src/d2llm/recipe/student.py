"""The section ``[student]``: backbone and interaction; ``recipe.pooling`` has the pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from d2llm.core.registry import Registry
from d2llm.core.types import TASKS, Task
from d2llm.recipe.kinds import SectionOfKind
from d2llm.recipe.pooling import AutoPooling, Pooling
from d2llm.recipe.sections import EndpointConfig, LoraConfig, Section


class RemoteBackboneConfig(EndpointConfig):
    """The endpoint of a remote backbone, which gives vectors of texts (docs/remote-backbone.md)."""

    dimensions: int = Field(ge=1)
    """Width of the vectors; an answer of another width is an error."""
    shorten: bool = False
    """Send ``dimensions`` with every request, so that a model that was trained for it shortens its vectors."""
    batch_texts: int = Field(default=32, ge=1)
    """Texts in one request."""
    query_body: dict[str, Any] = Field(default={})
    """More fields for requests with queries, such as ``{ input_type = "query" }``."""
    passage_body: dict[str, Any] = Field(default={})
    """The same for requests with passages."""


_REACHING = frozenset(
    {"url", "api_key_env", "batch_texts", "concurrency", "requests_per_minute", "timeout_seconds", "patience_minutes"}
)
"""Settings of a remote backbone that say how its endpoint is reached; vectors do not depend on them."""


_MODEL_CARD_DEFAULTS: dict[str, dict[str, Any]] = {
    "e5": {
        "query_prefix": "query: ",
        "passage_prefix": "passage: ",
        "max_query_tokens": 512,
        "max_passage_tokens": 512,
    }
}


class Tuning(SectionOfKind):
    """Which weights of the backbone are trained."""

    kinds: ClassVar[Registry[Tuning]] = Registry(
        "tuning", dict.fromkeys(("lora", "full", "frozen"), "d2llm.recipe.student"), group=""
    )  # no entry points: ``Backbone`` does what these say
    default_kind = "lora"


class Lora(Tuning, LoraConfig, kind="lora"):
    """Low-rank adapters on every linear layer."""

    paper = (
        "Hu et al., ICLR 2022, arXiv 2106.09685 (LoRA); Jung et al. 2022, arXiv 2110.14943 (two adapters: Semi-Siamese)"
    )
    costs = (
        'with ``adapters = "two"``, memory for the linear layers a second time once the student is loaded, and '
        "twice the adapter on disk"
    )
    measured = (
        "two adapters: -.008 (.7761 against .7838; qnli .860 to .848, banking77 .707 to .704; [one "
        "seed](log/2026-11.md#2026-11-25-two-adapters-fewer-layers-and-fewer-dimensions))"
    )

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    adapters: Literal["one", "two"] = "one"
    """``two``: queries and passages are read with adapters of their own, by one backbone (Semi-Siamese)."""


class Full(Tuning, kind="full"):
    """All weights."""


class Frozen(Tuning, kind="frozen"):
    """None: the backbone stays as it is."""

    measured = (
        "the interaction on frozen vectors: banking77 .801 to .898, squad-sent +.004 ([one run "
        "each](log/2026-11.md#2026-11-20-the-interaction-on-vectors-that-are-read-once))"
    )


class BackboneConfig(Section):
    """The pretrained language model that encodes each text on its own.

    The model ``e5`` was trained with prefixes and reads 512 tokens, so these are the defaults for it.
    """

    model: str = "minilm"
    """Local folder, Hub name, GGUF file, or ``minilm`` / ``smollm2`` / ``e5`` (multilingual-e5-small); with the section
    ``remote``, the model's name at the endpoint."""
    tuning: Tuning = Lora()
    """With ``remote``, always ``frozen``."""
    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Use only this many of the model's first layers, or the layers of these numbers, counted from 0
    (``models.layer_choice`` chooses them): cheaper, and often no worse for search. None: all."""
    bidirectional: bool = False
    """Every token of a decoder attends to all tokens of its text, as in an encoder, and ``auto`` pools by the mean
    (LLM2Vec). A decoder has to learn that: ``training.pretraining.kind = "masked_next_token"``."""
    max_query_tokens: int = Field(default=128, ge=4)
    max_passage_tokens: int = Field(default=250, ge=4)
    query_prefix: str = ""
    passage_prefix: str = ""
    remote: RemoteBackboneConfig | None = None
    """The vectors come from an embedding API."""

    @model_validator(mode="after")
    def _check_remote(self) -> BackboneConfig:
        if self.remote is None:
            return self
        if self.tuning.kind != "frozen":
            raise ValueError(
                f'tuning is "{self.tuning.kind}", but the weights of a remote backbone are elsewhere and cannot be '
                'trained: set tuning = "frozen", or delete the section remote'
            )
        local = ("layers", "bidirectional")
        chosen = [name for name in local if getattr(self, name) != type(self).model_fields[name].default]
        if chosen:
            raise ValueError(
                f"{' and '.join(chosen)} cannot be set for a remote backbone, which gives one finished vector for each "
                "text: delete it, or the section remote"
            )
        return self

    @property
    def has_two_adapters(self) -> bool:
        """Whether queries and passages are read with adapters of their own."""
        return isinstance(self.tuning, Lora) and self.tuning.adapters == "two"

    @model_validator(mode="after")
    def _check_layers(self) -> BackboneConfig:
        if isinstance(self.layers, tuple) and (not self.layers or sorted({*self.layers}) != [*self.layers]):
            raise ValueError(f"layers is {[*self.layers]}, but must name each layer to keep once, in ascending order")
        return self

    @model_validator(mode="before")
    @classmethod
    def _apply_model_card(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        settings = cast("dict[str, Any]", values)
        if settings.get("remote") is not None:
            return {"tuning": "frozen"} | settings
        model = settings.get("model")
        return _MODEL_CARD_DEFAULTS.get(model, {}) | settings if isinstance(model, str) else settings


class InteractionConfig(Section):
    """Interaction emulation module (IEM), or a cosine instead of it."""

    head: Literal["anchored", "paper", "cosine"] = "anchored"
    """``cosine``: a learned scale times the cosine of the vectors, without an IEM, as in a plain bi-encoder."""
    features: Literal["rich", "concat", "product", "difference"] = "rich"
    """Inputs of the IEM besides the vectors a and b: none (``concat``), a * b, |a - b|, or both (``rich``)."""
    tasks: tuple[Task, ...] = TASKS
    """The tasks whose score has an interaction (anchored head); in the others the score is the inner product alone."""
    branches: Literal["per_task", "shared"] = "per_task"
    """One branch of the IEM per task, or one shared by both."""
    layers: Literal[3, 5] = 5
    """Linear layers from vectors to logit. 5: two that both branches share, two of the branch, the logit; the features
    are the branch's last layer. 3, as in the authors' code: one shared, one of the branch, the logit; the features
    follow the branch's ReLU."""
    hidden_dim: int = Field(default=512, ge=1)
    feature_dim: int = Field(default=512, ge=1)
    """Width of the features; with three layers it is ``hidden_dim``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    max_bound: float = Field(default=8.0, gt=0)
    """Upper limit of B, the largest amount by which the interaction can change the logit (anchored head)."""
    gates: bool = False
    """Bound the change by B r_q(a) r_p(b) with learned gates in (0, 1), one for the query and one for the passage
    (anchored head). The upper bound is still an inner product, in one more dimension, and fewer passages must be
    rescored for a certified ranking."""

    @field_validator("tasks")
    @classmethod
    def _in_order(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        return tuple(task for task in TASKS if task in tasks)

    @model_validator(mode="after")
    def _check_tasks(self) -> InteractionConfig:
        if self.head == "paper" and self.tasks != TASKS:
            raise ValueError(
                "the head 'paper' scores by its interaction alone, in every task: delete tasks, or set head to "
                "'anchored'"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> InteractionConfig:
        if self.layers == 3 and self.feature_dim != self.hidden_dim:
            raise ValueError(
                f"feature_dim is {self.feature_dim} and hidden_dim {self.hidden_dim}: with three layers both are the "
                "same, so set feature_dim to hidden_dim"
            )
        return self


class StudentConfig(Section):
    """Backbone + PMA + IEM. The defaults are ours; the paper uses ``paper``, ``concat`` and no warm start."""

    backbone: BackboneConfig = BackboneConfig()
    pooling: Pooling = Field(default_factory=lambda: Pooling())
    interaction: InteractionConfig = InteractionConfig()

    @model_validator(mode="before")
    @classmethod
    def _pool_remote_vectors(cls, values: Any) -> Any:
        """By default, the vectors of a remote backbone are used as they are."""
        if not isinstance(values, dict):
            return values
        sections = cast("dict[str, Any]", values)
        backbone = sections.get("backbone")
        remote = backbone.get("remote") if isinstance(backbone, dict) else getattr(backbone, "remote", None)
        return sections if remote is None else {"pooling": AutoPooling()} | sections

    @model_validator(mode="after")
    def _check_remote(self) -> StudentConfig:
        reading = next((stage.kind for stage in self.pooling.stages if stage.reads_tokens), None)
        if self.backbone.remote is not None and reading is not None:
            raise ValueError(
                f"pooling is {reading}, which pools tokens, but a remote backbone gives one vector for each text: set "
                'pooling = "auto"'
            )
        return self


def shaping_student_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a student, as plain JSON, on which its vectors and scores depend.

    Those of a remote backbone's address, key and pace are left out.
    """
    backbone = {name: value for name, value in config["backbone"].items() if name != "remote"}
    if (remote := config["backbone"].get("remote")) is not None:
        backbone["remote"] = {name: value for name, value in remote.items() if name not in _REACHING}
    return {**config, "backbone": backbone}


def untuned_config(config: StudentConfig) -> StudentConfig:
    """A baseline: a student's backbone before training, with the pooling it was pretrained with."""
    return StudentConfig(
        backbone=config.backbone.model_copy(update={"tuning": Frozen(), "bidirectional": False}),
        pooling=config.pooling.own,
        interaction=InteractionConfig(head="cosine"),
    )
