"""A backbone learns vectors from which two layers, dropped afterwards, reconstruct what stands beside (CoT-MAE)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.methods.pretraining.cocondenser import halves
from d2llm.methods.pretraining.condenser import CondenserHead
from d2llm.methods.pretraining.retromae import TwiceMasked, sample
from d2llm.models.backbone import Backbone
from d2llm.recipe.training import Pretraining


class CoTMAE(Pretraining, kind="cot_mae"):
    """To reconstruct each half of a text by two layers from its tokens, about half of them masked, and the vector of
    the other half, which has masks too (CoT-MAE).
    """

    paper = "Wu et al., AAAI 2023, arXiv 2208.07670 (CoT-MAE)"
    needs = frozenset({"texts", "mask_token"})
    costs = "every text read once, with gradient; logits of the vocabulary for masked tokens; an encoder"
    measured = (
        "minilm before distillation: squad-sent .795 to .772, banking77 .635 to .540 "
        "([one seed](log/2026-11.md#2026-11-30-halves-of-texts-before-distillation-cocondenser-and-cot-mae))"
    )

    encoder_masked: float = Field(default=0.3, gt=0, lt=1)
    """Fraction of the tokens that are masked when the vector is made."""
    decoder_masked: float = Field(default=0.45, gt=0, lt=1)
    """Fraction of the tokens that are masked in what is reconstructed."""
    decoder_layers: int = Field(default=2, ge=1)
    """Layers that read the vector and the tokens of the other half."""

    def task(self, backbone: Backbone, seed: int) -> _ContextReconstruction:
        """What is learnt; an ``InputError`` for a model without a layer of embeddings."""
        if not hasattr(backbone.model, "embeddings"):
            raise InputError(
                f"'{backbone.config.model}' has no layer of embeddings, which the pretraining cot_mae needs: use an "
                "encoder such as minilm, or another kind, such as words"
            )
        return _ContextReconstruction(backbone, self, seed, self.encoder_masked)


class _ContextReconstruction(TwiceMasked):
    """The text's vector is in the place of the first token, where the paper has that token's last state."""

    def make_decoder(self, dim: int, heads: int) -> nn.Module:
        return CondenserHead(dim, heads, cast("CoTMAE", self.config).decoder_layers)

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """Wu et al., "ConTextual Masked Auto-Encoder for Dense Passage Retrieval", AAAI 2023 (arXiv 2208.07670),
        section 3.2: what the encoder misses of a half, and what the decoder misses of the other half.
        """
        config, embeddings = cast("CoTMAE", self.config), cast(Any, self.backbone.model).embeddings
        spans = [span for ids in batch for span in halves(ids, self.special)]
        words = self.words_of(spans)
        drawn = [[sample(one, rate, rng) for one in words] for rate in (config.encoder_masked, config.decoder_masked)]
        counts = [max(1, sum(map(len, masked))) for masked in drawn]
        for part in self.batches(batch):
            here = [2 * index + half for index in part for half in (0, 1)]
            encoded = [drawn[0][index] for index in here]
            reconstructed = [drawn[1][index ^ 1] for index in here]
            ids, mask = self.backbone.pad([spans[index] for index in here])
            other_ids, other_mask = self.backbone.pad([spans[index ^ 1] for index in here])
            states, _ = self.backbone(self.with_masks(ids, encoded), mask)
            tokens = embeddings(input_ids=self.with_masks(other_ids, reconstructed)).float()
            vectors = self.backbone.pool(states, mask)
            decoded = self.decoder(torch.cat([vectors[:, None], tokens[:, 1:]], dim=1), other_mask)
            missed = self.missed(decoded, other_ids, reconstructed) / counts[1]
            yield self.missed(states, ids, encoded) / counts[0] + missed
