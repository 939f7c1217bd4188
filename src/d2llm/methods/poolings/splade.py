"""Weights of a vocabulary's tokens as a text's vector, most of them 0 (SPLADE), or the best of each slice (DSR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling
from d2llm.recipe.student import Pooling

if TYPE_CHECKING:
    from d2llm.models.tokens import EncodedTexts

_FITTED_TOKENS = 20_000
_NUM_WORDS = 10  # that a token has at the start, beside itself
_OWN_LOGIT = 2.0  # of a token itself at the start, on average


class Splade(Pooling, kind="splade"):
    """How much each token of the vocabulary counts: the most that a token of the text makes of it (SPLADE).

    A student with this pooling has the head ``product``, and is trained with the loss ``flops``, which makes most
    weights 0. ``d2llm fit-scores --learned-words`` makes it
    the words of another student, whose index then has them among its own.
    """

    paper = "Formal et al. 2021, arXiv 2107.05720 and 2109.10086 (SPLADE); Lin and Lin 2022, arXiv 2112.04666 (DSR)"
    costs = "logits of the whole vocabulary for each token; passages are read by another student"

    measured = (
        "words of an index alone, 48 steps on minilm: BM25 .730 and .365 (wikiqa, banking77), with these words .784 "
        "and .478 ([one seed](log/2026-11.md#2026-11-30-learned-words-splade-dsr-spar-and-condenser)); in the whole "
        "score of d2llm-minilm [nothing](log/2026-11.md#2026-11-30-learned-words-in-the-whole-score)"
    )

    slices: int | None = Field(default=None, ge=2)
    """Keep the largest weight in each of so many slices of the vocabulary alone (DSR). None: all weights."""

    def module(self, backbone: Backbone) -> TextPooling:
        embeddings = embeddings_of(backbone)
        if embeddings is None or embeddings.shape[1] != backbone.dim:
            raise InputError(
                f"'{backbone.config.model}' has no token embeddings as wide as its states, of which splade would make "
                "words; use an encoder such as minilm, or another pooling"
            )
        return SpladePooling(backbone, len(embeddings), self.slices)


def embeddings_of(backbone: Backbone) -> Float[Tensor, "tokens dim"] | None:
    """The backbone's token embeddings; None if it has none."""
    find: Any = getattr(getattr(backbone, "model", None), "get_input_embeddings", None)
    return None if find is None else find().weight


class SpladePooling(TextPooling):
    """w_j = max over tokens i of log(1 + relu(e_j . (A h_i + a) + b_j)), with the backbone's token embeddings e.

    Formal et al., "SPLADE v2: Sparse Lexical and Expansion Model for Information Retrieval", 2021 (arXiv 2109.10086),
    equations 1 and 6. Encoders come without the head that predicted their masked tokens, so A, a and b begin as the
    map by which a token's state predicts its own embedding best.

    DSR: Lin and Lin, "Densifying Sparse Representations for Passage Retrieval by Representational Slicing", 2022 (arXiv
    2112.04666). Its gated inner product, over the slices in which both texts have the same token, is the inner product
    of vectors that are 0 but for the largest weight of each slice.
    """

    is_fitted_to_passages = True
    backbone: Backbone

    def __init__(self, backbone: Backbone, vocabulary: int, slices: int | None) -> None:
        super().__init__(vocabulary)
        self.slices = slices
        self.map = nn.Linear(backbone.dim, backbone.dim)
        self.bias = nn.Parameter(torch.zeros(self.dim))
        self.__dict__["backbone"] = backbone  # not a module of this one

    @property
    def embeddings(self) -> Float[Tensor, "tokens dim"]:
        """The backbone's token embeddings, which learn nothing from this."""
        embeddings = embeddings_of(self.backbone)
        assert embeddings is not None
        return embeddings.detach().float()

    @torch.no_grad()
    def fit_texts(self, texts: Sequence[str], encode: Callable[[Sequence[str]], EncodedTexts]) -> None:
        from d2llm.methods.pretraining._imitation import fit_linear

        states: list[Tensor] = []
        tokens: list[Tensor] = []
        for ids in self.backbone.tokenize(texts, "passage").ids:
            if sum(map(len, tokens)) > _FITTED_TOKENS:
                break
            read, mask = self.backbone(*self.backbone.pad([ids]))
            states.append(read[mask].float())
            tokens.append(torch.tensor(ids, device=mask.device))
        features, targets = torch.cat(states), torch.cat(tokens)
        embeddings = self.embeddings
        centred = embeddings - embeddings.mean(dim=0)
        fit_linear(self.map, features, centred[targets])
        sample = torch.arange(0, len(targets), max(1, len(targets) // 1_000), device=targets.device)
        logits = self.map(features[sample]) @ centred.T
        usual = logits.topk(_NUM_WORDS + 1, dim=1).values[:, -1].mean()
        scale = _OWN_LOGIT / (logits.gather(1, targets[sample, None]).mean() - usual).clamp(min=1e-3)
        for weights in (self.map.weight, self.map.bias):
            weights *= scale
        self.bias.fill_(float(-scale * usual))

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch vocabulary"]:
        embeddings = self.embeddings
        mapped = self.map(states.float())
        # Text by text: the logits of a batch would take gigabytes.
        largest = [(rows[kept] @ embeddings.T).max(dim=0).values for rows, kept in zip(mapped, mask, strict=True)]
        weights = torch.relu(torch.stack(largest) + self.bias).log1p()
        return weights if self.slices is None else best_of_slices(weights, self.slices)


def best_of_slices(weights: Float[Tensor, "batch vocabulary"], slices: int) -> Float[Tensor, "batch vocabulary"]:
    """The largest weight of each of equal slices of neighbouring tokens; the others are 0."""
    width = -(-weights.shape[1] // slices)
    padded = nn.functional.pad(weights, (0, slices * width - weights.shape[1])).unflatten(1, (slices, width))
    best = padded.argmax(dim=2, keepdim=True)
    return torch.zeros_like(padded).scatter(2, best, padded.gather(2, best)).flatten(1)[:, : weights.shape[1]]
