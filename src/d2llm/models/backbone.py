"""What reads each text on its own: tokens in, the states of tokens out. The base of all kinds of backbones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d2llm.core.errors import InputError, ModelError
from d2llm.models.device import choose_device, choose_dtype
from d2llm.models.tokens import TextReader
from d2llm.ops.batching import pad_right
from d2llm.recipe import AutoPooling, BackboneConfig, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backbone(TextReader, nn.Module):
    """What reads texts: ``tokenize`` and ``pad`` give the ids of tokens, ``forward`` their states.

    The base of ``PretrainedBackbone`` and of what other kinds open (``recipe.CustomBackbone``). A subclass has ``dim``,
    ``fingerprint_base``, ``forward`` and a ``tokenizer`` of ``transformers``, which is saved with a student and splits
    texts; its own ``tokenize`` and ``pad`` may read texts in another way. What it has as weights is trained and saved
    with tuning ``full``.

    Attributes:
        pooling: what its states are for; it may weigh them by the model's attention.
        own_pooling: the pooling without weights that is the backbone's own (``Pooling.weightless``), never ``auto``.
        compute_dtype: number format of matrix products.
        location: where its weights are.
    """

    def __init__(
        self,
        config: BackboneConfig,
        pooling: Pooling | None = None,
        *,
        compute_dtype: torch.dtype = torch.float32,
        auto_pooling: str = "mean",
    ) -> None:
        """``auto_pooling`` is the kind of pooling that ``auto`` stands for."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.location = config.model
        self.pooling = pooling or AutoPooling()
        self.own_pooling = (
            Pooling.of(auto_pooling) if isinstance(self.pooling.weightless, AutoPooling) else self.pooling.weightless
        )
        self.query_model: PreTrainedModel | None = None

    @classmethod
    def load(
        cls,
        config: BackboneConfig,
        pooling: Pooling | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Backbone:
        """Load a backbone, by default on the fastest device and in the fastest number format of this machine.

        It is what the kind of ``config`` opens.
        """
        chosen = choose_device(device)
        return open_backbone(config, pooling, device=chosen, compute_dtype=choose_dtype(chosen, dtype))

    @property
    def model(self) -> PreTrainedModel:
        """The model of ``transformers``.

        Raises:
            InputError: it is none.
        """
        raise InputError(
            f"'{self.config.model}' is read by a {self.config.kind} backbone, whose weights cannot be read or exported "
            "as those of a model of transformers; use a student with another backbone for this"
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether it gives token states; some kinds only give vectors of whole texts."""
        return self.config.reads_tokens

    @property
    def texts_at_once(self) -> int | None:
        """How many texts to read before progress is reported, if that is not left to the batches."""
        return None

    def require_tokens(self, purpose: str) -> None:
        """Raise an ``InputError`` if it gives no token states, which ``purpose`` needs."""
        if not self.reads_tokens:
            raise InputError(
                f"{purpose} needs the states of tokens, and '{self.config.model}' is a {self.config.kind} backbone, "
                "which gives one vector for each text; use a student with another one"
            )

    def require_merged(self, purpose: str) -> None:
        """Raise an ``InputError`` if tuning cannot be merged into its weights, which ``purpose`` needs."""
        if (reason := self.config.why_not_merged) is not None:
            raise InputError(
                f"{purpose} has one set of weights, which this student cannot give: {reason}; keep it as a student "
                "with its adapters (merge=False, engine torch)"
            )

    @property
    def dim(self) -> int:
        """Width of the states."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Number of layers; 0 for a model without layers."""
        return 0

    @property
    def state_size(self) -> int:
        """How many numbers the states of a token have: ``dim`` for each layer."""
        return self.dim * self.num_layers

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.parameters()).device

    def fingerprint_base(self) -> str:
        """Fingerprint of the pretrained weights, before any tuning."""
        raise NotImplementedError

    def cut(self, depth: int) -> None:
        """Remove all layers but the first ``depth``, in place.

        Raises:
            InputError: there are not so many, or they cannot be removed.
        """
        raise InputError(f"a {self.config.kind} backbone cannot be cut to {depth} layers")

    def prepare_training(self, *, seed: int = 0) -> None:  # noqa: ARG002 - for adapters
        """Make trainable what ``config.tuning`` says: everything, or nothing."""
        self.requires_grad_(self.config.tuning.kind == "full")

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changed since the pretrained weights."""
        if self.config.tuning.kind == "frozen":
            return {}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    def load_tuned_state(self, state: dict[str, Tensor], *, merge: bool) -> None:  # noqa: ARG002 - for adapters
        """Load tensors made by ``tuned_state``; ``merge``: permanently, if they are adapters.

        Raises:
            ModelError: the tensors belong to another architecture.
        """
        if self.config.tuning.kind != "frozen":
            load_weights(self, state, name=self.config.model)

    @property
    def is_saved_whole(self) -> bool:
        """Whether a student's folder has all weights (``save_merged``) rather than what tuning changed."""
        return False

    def save_merged(self, folder: Path) -> None:
        """Write the configuration and all weights, adapters merged, in the format of the plain model.

        Raises:
            InputError: there is no such format, or queries and passages have adapters of their own.
        """
        raise InputError(
            f"{folder}: the weights of a {self.config.kind} backbone cannot be saved as a model of their own; save the "
            "student with merge=False"
        )

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """Token ids as one right-padded tensor, and the mask of real tokens."""
        return pad_right(ids, cast(int, self.tokenizer.pad_token_id or 0), self.device)

    def forward(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """States of the last layer and their mask, right-padded regardless of the input's padding."""
        raise NotImplementedError

    def states_at(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], depths: Sequence[int]
    ) -> tuple[list[Float[Tensor, "batch tokens dim"]], Bool[Tensor, "batch tokens"]]:
        """States after the first ``depths`` layers, then those of the last layer, and their mask.

        Raises:
            ModelError: the states cannot be read after fewer layers.
        """
        if depths:
            raise ModelError(f"a {self.config.kind} backbone has no states after fewer layers; name no depths")
        states, mask = self(token_ids, mask)
        return [states], mask

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """The backbone's own pooling, in float32."""
        return self.own_pooling.pool(states.float(), mask)


def load_weights(model: nn.Module, state: dict[str, Tensor], *, name: str) -> None:
    """Load all weights of a model (``name`` in the message).

    Raises:
        ModelError: they do not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the tuned weights do not fit '{name}' ({reason}...); use the model that was tuned"
        ) from error


def open_backbone(
    config: BackboneConfig,
    pooling: Pooling | None = None,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    auto_pooling: str | None = None,
    student: Path | None = None,
) -> Backbone:
    """The backbone that a configuration describes: what its kind opens, or else a ``PretrainedBackbone``.

    The arguments are those of the two.
    """
    opened = config.open(pooling, device=device, compute_dtype=compute_dtype, student=student)
    if opened is not None:
        return opened
    from d2llm.models.pretrained import PretrainedBackbone

    return PretrainedBackbone(
        config,
        pooling,
        device=device,
        compute_dtype=compute_dtype,
        auto_pooling=auto_pooling,
    )
