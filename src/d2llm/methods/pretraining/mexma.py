"""A backbone learns one vector for a text and its translation, from which masked tokens of the other are predicted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from d2llm.data.pairs import read_pairs
from d2llm.methods.pretraining.condenser import CondenserHead
from d2llm.methods.pretraining.retromae import TwiceMasked, sample
from d2llm.models.backbone import Backbone
from d2llm.recipe.sections import InputPath
from d2llm.recipe.training import Pretraining


class MEXMA(Pretraining, kind="mexma"):
    """To predict a text's masked tokens by layers, dropped afterwards, from their states and the vector of its
    translation, which is to be near the text's; vectors of different texts keep apart (MEXMA).
    """

    paper = "Janeiro et al., ACL 2025, arXiv 2409.12737 (MEXMA)"
    needs = frozenset({"translations", "mask_token"})
    costs = "text and translation read twice, with gradient; logits of the vocabulary for masked tokens; an encoder"
    measured = (
        "six of e5's layers, 500 translations: the nearest of 100 for .70 to .66 "
        "([one seed](log/2026-11.md#2026-11-30-translated-sentences-leallas-vectors))"
    )

    translations: InputPath
    """Labelled pairs (train split), each a text and its translation; the texts of the data sets are not read."""
    masked_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Fraction of the tokens that are masked."""
    head_layers: int = Field(default=2, ge=1)
    """Layers that read the translation's vector and the text's states."""
    token_weight: float = Field(default=1.0, ge=0)
    """Weight of the masked tokens, beside the squared distance of the two vectors."""
    spread_weight: float = Field(default=0.01, ge=0)
    """Weight of what keeps vectors apart (KoLeo)."""

    def task(self, backbone: Backbone, seed: int) -> _CrossUnmasking:
        """What is learnt."""
        return _CrossUnmasking(backbone, self, seed, self.masked_fraction)


class _CrossUnmasking(TwiceMasked):
    translated: dict[tuple[int, ...], list[int]]

    def make_decoder(self, dim: int, heads: int) -> nn.Module:
        return CondenserHead(dim, heads, cast("MEXMA", self.config).head_layers)

    def tokenize(self, passages: Sequence[str], queries: Sequence[str]) -> list[list[int]]:
        """The tokens of the texts; those of their translations are kept."""
        pairs = read_pairs(Path(cast("MEXMA", self.config).translations), splits=["train"]).pairs("train")
        sides = [[pair.query for pair in pairs], [pair.passage for pair in pairs]]
        texts, translated = (super(_CrossUnmasking, self).tokenize(side, []) for side in sides)
        self.translated = dict(zip(map(tuple, texts), translated, strict=True))
        return texts

    def record(self, texts: Sequence[list[int]]) -> dict[str, Any]:
        """The translations."""
        return {"translations": [self.translated[tuple(ids)] for ids in texts]}

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """Janeiro et al., "MEXMA: Token-level objectives improve sentence representations", ACL 2025 (arXiv
        2409.12737), section 3: of vectors of whole texts and states of masked ones, both ways.
        """
        config = cast("MEXMA", self.config)
        sides = [[*batch], [self.translated[tuple(ids)] for ids in batch]]
        vectors = [self.vectors_of(side).float() for side in sides]
        missed = [self.unmask(side, other, rng) for side, other in zip(sides, reversed(vectors), strict=True)]
        spread = [koleo(one) for one in vectors]
        tokens, apart = (torch.stack(both).mean() for both in (missed, spread))
        yield (vectors[0] - vectors[1]).square().mean() + config.token_weight * tokens + config.spread_weight * apart

    def unmask(
        self, texts: Sequence[list[int]], vectors: Float[Tensor, "texts dim"], rng: random.Random
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy of masked tokens, from states of the masked texts and vectors of the translations."""
        masked = [sample(words, self.masked, rng) for words in self.words_of(texts)]
        missed: list[Tensor] = []
        for part, ids, mask, states in self.read_masked(texts, masked):
            decoded = self.decoder(torch.cat([vectors[part][:, None], states[:, 1:].float()], dim=1), mask)
            missed.append(self.missed(decoded, ids, [masked[index] for index in part]))
        return torch.stack(missed).sum() / max(1, sum(map(len, masked)))


def koleo(vectors: Float[Tensor, "texts dim"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of each unit vector's distance to the nearest other one.

    Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019 (arXiv 1806.03198), equation 2.
    """
    unit = functional.normalize(vectors, dim=1)
    nearest = unit[(unit @ unit.T).detach().fill_diagonal_(-2.0).argmax(dim=1)]
    return -torch.log((unit - nearest).norm(dim=1) + 1e-8).mean()
