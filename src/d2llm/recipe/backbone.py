"""The section ``[student.backbone]``: the pretrained model that encodes each text on its own, and how it is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from d2llm.core.registry import Registry, modules_in
from d2llm.recipe.sections import LoraConfig, Quantization, SectionOfKind

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from d2llm.models.backbone import Backbone
    from d2llm.recipe.pooling import Pooling


class Tuning(SectionOfKind):
    """Which weights of the backbone are trained."""

    kinds: ClassVar[Registry[Tuning]] = Registry(
        "tuning", dict.fromkeys(("lora", "full", "frozen"), "d2llm.recipe.backbone"), group=""
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
        "backbone", {"transformers": "d2llm.recipe.backbone"} | modules_in("methods/backbones"), "d2llm.backbones"
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
