"""The section ``[student]``: its pooling, its backbone and how that is tuned, and its interaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, cast

from pydantic import Field, field_validator, model_validator

from d2llm.core.registry import Registry, modules_in
from d2llm.core.types import TASKS, Task
from d2llm.recipe.sections import LoraConfig, Quantization, Section, SectionOfKind

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from d2llm.models.backbone import Backbone
    from d2llm.models.pooling import TextPooling


MAX_GENERATED_DIM = 64
"""Width of an interaction whose weights are generated: at 384 dimensions, 64 take 18 million weights, 16 take 3."""


class Pooling(SectionOfKind):
    """How the states of a text's tokens become its vector.

    A kind without weights has ``pool``. One with weights has ``module`` instead, which makes a ``TextPooling``.

    Example::

        class Largest(Pooling, kind="largest"):
            \"\"\"The largest value of each component.\"\"\"

            def pool(self, states, mask):
                return states.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)

        config = StudentConfig(pooling="largest")
    """

    kinds = Registry(
        "pooling",
        {"auto": "d2llm.recipe.student"}
        | dict.fromkeys(("mean", "first", "last"), "d2llm.ops.pooling")
        | modules_in("methods/poolings"),
        "d2llm.poolings",
    )
    default_kind = "pma"
    reads_tokens: ClassVar[bool] = True
    """Whether it reads states of tokens, which a remote backbone does not have."""
    reads_attention: ClassVar[bool] = False
    """Whether it weighs the states by the model's attention (``weigh``)."""
    reads_layers: ClassVar[bool] = False
    """Whether it reads the states after other layers too (``weigh``)."""
    takes_one_token: ClassVar[bool] = False
    """Whether the vector is the state of a single token, so that a part of a text cannot be pooled."""

    @property
    def inner(self) -> Pooling | None:
        """The pooling whose vectors this one changes, if there is one."""
        return None

    @property
    def stages(self) -> tuple[Pooling, ...]:
        """This pooling, the one whose vectors it changes, and so on."""
        return (self, *(() if self.inner is None else self.inner.stages))

    @property
    def is_trained(self) -> bool:
        """Whether it has weights to train, itself or in the pooling that it changes."""
        return type(self).pool is Pooling.pool

    @property
    def weightless(self) -> Pooling:
        """The pooling without weights in it, for what reads or trains the backbone alone; ``auto`` if there is none."""
        return AutoPooling() if self.is_trained else self

    @property
    def weighing(self) -> Pooling | None:
        """The stage that makes its states of the model's attention or of several layers, if there is one."""
        return next((stage for stage in self.stages if stage.reads_attention or stage.reads_layers), None)

    def without_gated(self) -> Pooling:
        """The same without what is added to other vectors with a gate (``TextPooling.gate``)."""
        return self

    def check_model(self, model_config: Any, name: str) -> None:
        """Check that a model fits, given its configuration in ``transformers`` and its name; else an ``InputError``."""

    def weigh(
        self,
        states: Tensor,
        mask: Tensor,
        output: Any,
    ) -> Tensor:
        """The states to pool, from the last states and what else the model gives.

        Args:
            states: [batch, tokens, dim].
            mask: [batch, tokens], true for real tokens.
            output: the model's: ``attentions`` of each layer [batch, heads, tokens, tokens] (``reads_attention``), and
                ``hidden_states`` [batch, tokens, dim] before the first layer and after each (``reads_layers``).
        """
        raise NotImplementedError

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Vectors [batch, dim] of any length, from states [batch, tokens, dim], padded on the right, and their mask."""
        raise NotImplementedError

    def module(self, backbone: Backbone) -> TextPooling | None:
        """What pools the states of a backbone; None if ``pool`` does.

        Raises:
            InputError: the backbone does not fit.
        """
        return None


class AutoPooling(Pooling, kind="auto"):
    """The model's own setting; without one, the mean for encoders and the last token for decoders."""

    measured = "not measured: it is `mean` or `last`"
    reads_tokens: ClassVar[bool] = False  # a remote backbone's own vectors are finished

    @property
    def is_trained(self) -> bool:
        """False."""
        return False


class ChangedPooling(Pooling):
    """The base of poolings that change the vectors of another."""

    pooling: Pooling = AutoPooling()
    """The pooling whose vectors are changed."""

    @property
    def inner(self) -> Pooling | None:
        """The pooling whose vectors are changed."""
        return self.pooling

    @property
    def weightless(self) -> Pooling:
        """That of ``pooling``."""
        return self.pooling.weightless

    def without_gated(self) -> Pooling:
        """The same over ``pooling`` without it."""
        return self.model_copy(update={"pooling": self.pooling.without_gated()})


class Tuning(SectionOfKind):
    """Which weights of the backbone are trained."""

    kinds: ClassVar[Registry[Tuning]] = Registry(
        "tuning", dict.fromkeys(("lora", "full", "frozen"), "d2llm.recipe.student"), group=""
    )  # no entry points: ``Backbone`` does what these say
    default_kind = "lora"


class Lora(Tuning, LoraConfig, kind="lora"):
    """Low-rank adapters on every linear layer."""

    paper = (
        "Hu et al., ICLR 2022, arXiv 2106.09685 (LoRA); Dettmers et al., NeurIPS 2023, arXiv 2305.14314 (QLoRA); "
        "Jung et al. 2022, arXiv 2110.14943 (two adapters: Semi-Siamese)"
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
    quantization: Quantization = "none"
    """Keep the backbone's weights in 8 or 4 bits, in training (QLoRA) and afterwards, with the adapter beside them: a
    fraction of the memory. Such a student cannot be merged, exported or read by a faster engine."""

    @model_validator(mode="after")
    def _check_quantization(self) -> Lora:
        if self.adapters == "two" and self.quantization != "none":
            raise ValueError('two adapters change copies of the weights, which needs quantization = "none"')
        return self


class Full(Tuning, kind="full"):
    """All weights."""

    measured = (
        "SmolLM2 as a teacher: squad-sent .749, banking77 .682; the untuned cosine .770, .622 "
        "([one run](ablations.md#feature-imitation-with-a-language-model-as-the-teacher))"
    )


class Frozen(Tuning, kind="frozen"):
    """None: the backbone stays as it is."""

    measured = (
        "the interaction on frozen vectors: banking77 .801 to .898, squad-sent +.004 ([one run "
        "each](log/2026-11.md#2026-11-20-the-interaction-on-vectors-that-are-read-once))"
    )


class Package(NamedTuple):
    """An installed package that has a model's weights, and the model's name on the Hub, where they are without it."""

    distribution: str
    module: str
    path: str
    """The model's file or folder in the module's folder."""
    hub_name: str


class BackboneConfig(SectionOfKind):
    """The model that encodes each text on its own.

    A recipe names a kind by ``kind``; or by a section of its own that is called like it, such as
    ``[student.backbone.remote]``; or as ``model``, if the kind is a model in a ``package``. By default, ``model`` is
    loaded by ``transformers``, unless its ``model_type`` in config.json, or its file's suffix, is a kind.

    Another kind subclasses ``CustomBackbone``, unless it is only another source of weights for ``transformers``.
    """

    kinds = Registry(
        "backbone", {"transformers": "d2llm.recipe.student"} | modules_in("methods/backbones"), "d2llm.backbones"
    )
    default_kind = "transformers"
    package: ClassVar[Package | None] = None
    """Where the model is that is named like this kind."""
    conversion: ClassVar[str] = ""
    """Part of the names of folders that ``convert`` wrote; another one whenever it writes something else."""
    reads_tokens: ClassVar[bool] = True
    """Whether there are states of tokens, and not only vectors of whole texts."""

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
    """Training cuts longer queries here. A search reads as much of a query as of a passage."""
    max_passage_tokens: int = Field(default=250, ge=4)
    """Longer passages are cut here, and counted."""
    query_prefix: str = ""
    passage_prefix: str = ""

    @classmethod
    def kind_of(cls, values: Mapping[str, Any]) -> str:
        """The kind that settings name, or that their model has."""
        kinds = cls.kinds.kinds
        named = [name for name, value in values.items() if name in kinds and value is not None]
        model = values.get("model", BackboneConfig.model_fields["model"].default)
        is_packaged = model in kinds and cls.kinds.find(model).package is not None
        return values.get("kind") or next(iter(named), model if is_packaged else cls.default_kind)

    @model_validator(mode="before")
    @classmethod
    def _without_other_kinds(cls, values: Any) -> Any:
        """Leave out the sections of other kinds that are None."""
        if not isinstance(values, Mapping):
            return values
        kinds = {*cls.kinds.kinds}
        return {name: value for name, value in values.items() if value is not None or name not in kinds}

    def _written_kind(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing if the other settings say it."""
        return {} if self.kind_of(values) == self.kind else super()._written_kind(values)

    @model_validator(mode="after")
    def _check_layers(self) -> BackboneConfig:
        if isinstance(self.layers, tuple) and (not self.layers or sorted({*self.layers}) != [*self.layers]):
            raise ValueError(f"layers is {[*self.layers]}, but must name each layer to keep once, in ascending order")
        return self

    @property
    def has_two_adapters(self) -> bool:
        """Whether queries and passages are read with adapters of their own."""
        return isinstance(self.tuning, Lora) and self.tuning.adapters == "two"

    @property
    def quantization(self) -> Quantization:
        """How its weights are kept."""
        return self.tuning.quantization if isinstance(self.tuning, Lora) else "none"

    @property
    def why_not_merged(self) -> str | None:
        """Why tuning cannot be merged into one set of weights; None if it can."""
        if self.has_two_adapters:
            return "it reads queries and passages with adapters of their own"
        if self.quantization != "none":
            return f"its weights are kept in {self.quantization.removesuffix('bit')} bits"
        return None

    @property
    def address(self) -> str | None:
        """Where texts are sent to be read; None if they stay on this machine."""
        return None

    @classmethod
    def shaping(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of this kind, as plain JSON, on which vectors depend; the name of the kind is left out."""
        kinds = {*cls.kinds.kinds}
        return {name: value for name, value in values.items() if name != "kind" and (name not in kinds or value)}

    def open(
        self,
        pooling: Pooling | None,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        student: Path | None,
    ) -> Backbone | None:
        """What reads texts, for a pooling of its states; None if ``transformers`` does.

        ``student`` is the folder of the student that it belongs to, if it was saved.
        """
        del pooling, device, compute_dtype, student
        return None

    @classmethod
    def load_model(cls, location: str, dtype: torch.dtype) -> PreTrainedModel:
        """The model in a folder or on the Hub, if this kind is the ``model_type`` in its config.json.

        Raises:
            ModelError: it cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def convert(cls, path: Path, folder: Path) -> None:
        """Write a model's file, whose suffix is this kind or which is in its ``package``, as a folder for transformers.

        Raises:
            MissingExtraError: a library that reads the file is not installed.
            ModelError: the file cannot be read.
        """
        raise NotImplementedError


class TransformersBackbone(BackboneConfig, kind="transformers"):
    """A model of the library transformers: any encoder, any decoder, or the encoder of a T5 model.

    Its weights are in a local folder, in a file that another kind converts, or on the Hub.
    """

    measured = "not measured: its models are rows of their own"


class CustomBackbone(BackboneConfig):
    """The base of kinds that ``transformers`` does not load: ``open`` gives a ``Backbone`` of their own.

    Example::

        class Hashed(CustomBackbone, kind="hashed"):
            \"\"\"A vector for each of a number of buckets of words.\"\"\"

            num_buckets: int = 1_000

            def open(self, pooling, *, device, compute_dtype, student):
                return HashedWords(self, pooling).to(device)  # a subclass of models.backbone.Backbone

        config = BackboneConfig(kind="hashed", num_buckets=50)
    """

    tuning: Tuning = Frozen()

    @model_validator(mode="after")
    def _check_transformers(self) -> CustomBackbone:
        if self.tuning.kind == "lora":
            raise ValueError(
                f'tuning is "lora", but a {self.kind} backbone is not read by transformers and has no adapters: set '
                'tuning = "frozen" or "full"'
            )
        chosen = [name for name in ("layers", "bidirectional") if getattr(self, name)]
        if chosen:
            raise ValueError(f"{' and '.join(chosen)} cannot be set for a {self.kind} backbone: delete it")
        return self


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
