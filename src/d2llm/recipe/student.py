"""The section ``[student]``, and its interaction; ``recipe.backbone`` and ``recipe.pooling`` have the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from d2llm.core.types import TASKS, Task
from d2llm.recipe.backbone import BackboneConfig, Frozen
from d2llm.recipe.pooling import AutoPooling, Pooling
from d2llm.recipe.sections import Section

MAX_GENERATED_DIM = 64
"""Width of an interaction whose weights are generated: at 384 dimensions, 64 take 18 million weights, 16 take 3."""


class InteractionConfig(Section):
    """Interaction emulation module (IEM), or a cosine instead of it."""

    head: Literal["dot", "paper", "cosine", "product", "divergence"] = "dot"
    """``cosine``: a learned scale times the cosine of the vectors, without an IEM, as in a plain bi-encoder;
    ``product``: the same with vectors as they are, for the pooling ``splade``; ``divergence``: minus that of two
    distributions, for the pooling ``multivariate``."""
    features: Literal["rich", "concat", "product", "difference", "generated"] = "rich"
    """Inputs of the IEM besides the vectors a and b: none (``concat``), a * b, |a - b|, or both (``rich``).
    ``generated``: the IEM reads b alone, and all its weights are linear functions of a (Hypencoder)."""
    tasks: tuple[Task, ...] = TASKS
    """The tasks whose score has an interaction (dot head); in the others the score is the inner product alone."""
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
    """Upper limit of B, the largest amount by which the interaction can change the logit (dot head)."""
    gates: bool = False
    """Bound the change by B r_q(a) r_p(b) with learned gates in (0, 1), one for the query and one for the passage
    (dot head). The upper bound is still an inner product, in one more dimension, and fewer passages must be
    rescored for a certified ranking."""

    @property
    def has_network(self) -> bool:
        """Whether a network reads pairs, so that they have features."""
        return self.head in ("dot", "paper")

    @field_validator("tasks")
    @classmethod
    def _in_order(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        return tuple(task for task in TASKS if task in tasks)

    @model_validator(mode="after")
    def _check_tasks(self) -> InteractionConfig:
        if self.head == "paper" and self.tasks != TASKS:
            raise ValueError(
                "the head 'paper' scores by its interaction alone, in every task: delete tasks, or set head to 'dot'"
            )
        return self

    @model_validator(mode="after")
    def _check_generated(self) -> InteractionConfig:
        if self.features == "generated" and max(self.hidden_dim, self.feature_dim) > MAX_GENERATED_DIM:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim} and feature_dim {self.feature_dim}: features 'generated' makes every "
                f"weight from the query's vector, so both are at most {MAX_GENERATED_DIM}; set them to 16, for example"
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

    backbone: BackboneConfig = Field(default_factory=lambda: BackboneConfig())
    pooling: Pooling = Field(default_factory=lambda: Pooling())
    interaction: InteractionConfig = InteractionConfig()

    @model_validator(mode="before")
    @classmethod
    def _pool_finished_vectors(cls, values: Any) -> Any:
        """By default, the vectors of a backbone without states of tokens are used as they are."""
        if not isinstance(values, dict):
            return values
        sections = cast("dict[str, Any]", values)
        backbone = sections.get("backbone")
        kinds = BackboneConfig.kinds
        kind = BackboneConfig.kind_of(backbone) if isinstance(backbone, dict) else getattr(backbone, "kind", backbone)
        is_finished = kind in kinds.kinds and not kinds.find(kind).reads_tokens
        return {"pooling": AutoPooling()} | sections if is_finished else sections

    @model_validator(mode="after")
    def _check_head(self) -> StudentConfig:
        for pooling, head in (("multivariate", "divergence"), ("splade", "product")):
            if (self.interaction.head == head) != (self.pooling.kind == pooling):
                raise ValueError(
                    f"pooling is {self.pooling.kind} and interaction.head is {self.interaction.head}: the pooling "
                    f"{pooling} and the head {head} need one another, so set both or neither"
                )
        return self

    @model_validator(mode="after")
    def _check_pooling(self) -> StudentConfig:
        reading = next((stage.kind for stage in self.pooling.stages if stage.reads_tokens), None)
        if not self.backbone.reads_tokens and reading is not None:
            raise ValueError(
                f"pooling is {reading}, which pools tokens, but a {self.backbone.kind} backbone gives one vector for "
                'each text: set pooling = "auto"'
            )
        return self


def shaping_student_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a student, as plain JSON, on which its vectors and scores depend (``BackboneConfig.shaping``)."""
    backbone = config["backbone"]
    return {**config, "backbone": BackboneConfig.kinds.find(BackboneConfig.kind_of(backbone)).shaping(backbone)}


def untuned_config(config: StudentConfig) -> StudentConfig:
    """A baseline: a student's backbone before training, with the pooling it was pretrained with."""
    return StudentConfig(
        backbone=config.backbone.model_copy(update={"tuning": Frozen(), "bidirectional": False}),
        pooling=config.pooling.weightless,
        interaction=InteractionConfig(head="cosine"),
    )
