"""A backbone learns vectors that make up for the later layers of its tokens (Condenser)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2llm.core.errors import InputError
from d2llm.methods.pretraining.retromae import TwiceMasked, to_words
from d2llm.models.backbone import Backbone
from d2llm.models.pretrained import layers_of
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask


class Condenser(Pretraining, kind="condenser"):
    """To predict masked tokens by two layers, dropped afterwards, from the text's vector and the states that its tokens
    had after half of the layers; and from the last states, as ever (Condenser).
    """

    paper = "Gao and Callan, EMNLP 2021, arXiv 2104.08253 (Condenser)"
    needs = frozenset({"texts", "mask_token"})
    costs = "every text read once, with gradient; logits of the vocabulary for masked tokens; an encoder"
    measured = (
        "minilm before distillation: squad-sent .795 to .808, banking77 .635 to .580 "
        "([one seed](log/2026-11.md#2026-11-30-learned-words-splade-dsr-spar-and-condenser))"
    )

    masked_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Fraction of a text's tokens that are masked."""
    head_layers: int = Field(default=2, ge=1)
    """Layers that read the vector and the earlier states."""

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt; an ``InputError`` for a model with one layer."""
        self.require(backbone)
        return Condensation(backbone, self, seed)

    def require(self, backbone: Backbone) -> None:
        """Refuse a model with one layer."""
        if backbone.num_layers < 2:
            raise InputError(
                f"'{backbone.config.model}' has a single layer, but the pretraining {self.kind} reads tokens after "
                "half of the layers: use an encoder such as minilm, or another kind, such as retromae"
            )


class Condensation(TwiceMasked):
    """The text's vector is in the place of the first token, where the paper has that token's last state."""

    early: Tensor

    def __init__(self, backbone: Backbone, config: Condenser, seed: int) -> None:
        super().__init__(backbone, config, seed, config.masked_fraction)
        self.head_layers = config.head_layers

    def make_decoder(self, dim: int, heads: int) -> nn.Module:
        return CondenserHead(dim, heads, self.head_layers)

    def hooks(self) -> list[RemovableHandle]:
        layers = layers_of(self.backbone.model, name=self.backbone.config.model)

        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.early = output if isinstance(output, Tensor) else output[0]

        return [layers[len(layers) // 2 - 1].register_forward_hook(keep)]

    def decode(
        self,
        vectors: Float[Tensor, "texts dim"],
        ids: Tensor,
        mask: Bool[Tensor, "texts tokens"],
        words: Sequence[Sequence[int]],
        rng: random.Random,
    ) -> Float[Tensor, "texts tokens dim"]:
        """Gao and Callan, "Condenser: a Pre-training Architecture for Dense Retrieval", EMNLP 2021 (arXiv 2104.08253),
        section 3.2.
        """
        return self.decoder(torch.cat([vectors[:, None], self.early[:, 1:].float()], dim=1), mask)


class CondenserHead(nn.Module):
    """Transformer layers over a text's vector and its tokens, and the layer that makes words of their states."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers)
        self.to_words = to_words(dim)

    def forward(
        self, states: Float[Tensor, "texts tokens dim"], mask: Bool[Tensor, "texts tokens"]
    ) -> Float[Tensor, "texts tokens dim"]:
        return self.layers(states, src_key_padding_mask=~mask)
