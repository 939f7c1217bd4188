"""A backbone learns vectors from which one layer, dropped afterwards, reconstructs their texts (RetroMAE)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask, word_head


class RetroMAE(Pretraining, kind="retromae"):
    """To reconstruct a text by one layer from its vector and half of its tokens, others for each token; the vector is
    that of the text with masks, which are predicted too (RetroMAE).
    """

    paper = "Xiao et al., EMNLP 2022, arXiv 2205.12035 (RetroMAE)"
    needs = frozenset({"texts", "mask_token"})
    costs = "every text read once, with gradient; logits of the vocabulary for each token; an encoder"
    measured = (
        "minilm before distillation: squad-sent level at .795, banking77 .635 to .597 "
        "([one seed](log/2026-11.md#2026-11-30-more-methods-measured-and-retromae-and-bebr))"
    )

    encoder_masked: float = Field(default=0.3, gt=0, lt=1)
    """Fraction of the tokens that are masked when the vector is made."""
    decoder_masked: float = Field(default=0.5, gt=0, lt=1)
    """Fraction of the tokens that the reconstruction of a token does not see, beside itself."""

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt; an ``InputError`` for a model without a mask, or without vectors of positions."""
        embeddings: Any = getattr(backbone.model, "embeddings", None)
        if not hasattr(embeddings, "position_embeddings"):
            raise InputError(
                f"'{backbone.config.model}' has no vectors of positions, which the pretraining retromae needs: use an "
                "encoder such as minilm, or another kind, such as words"
            )
        return _Reconstruction(backbone, self, seed, self.encoder_masked)


class TwiceMasked(PretrainingTask):
    """Masked tokens that are predicted from a text's states, and again by a module that reads the text's vector."""

    decoder: Any
    """Makes states of tokens, and by ``to_words`` what the token embeddings are multiplied by."""
    predicts_all: ClassVar[bool] = False
    """Whether it predicts the other tokens too."""

    def __init__(self, backbone: Backbone, config: Pretraining, seed: int, masked: float) -> None:
        super().__init__(backbone, config, seed)
        self.masked = masked
        self.special = {*map(int, backbone.tokenizer.all_special_ids)}
        self.mask_id: Any = backbone.tokenizer.mask_token_id

    def make_decoder(self, dim: int, heads: int) -> nn.Module:
        """The untrained module."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """The module, with the layer that makes words of states: encoders come without theirs."""
        self.head = word_head(self.backbone)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.decoder = self.make_decoder(self.backbone.dim, int(self.backbone.model.config.num_attention_heads))
        return self.decoder.to(self.backbone.device)

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """The cross-entropy of masked tokens, plus that of the tokens that the module predicts."""
        words = self.words_of(batch)
        masked = [sample(indices, self.masked, rng) for indices in words]
        predicted = words if self.predicts_all else masked
        counts = [max(1, sum(map(len, indices))) for indices in (masked, predicted)]
        for part, ids, mask, states in self.read_masked(batch, masked):
            hidden, sought = ([tokens[index] for index in part] for tokens in (masked, predicted))
            vectors = self.backbone.pool(states, mask)
            decoded = self.decode(vectors, ids, mask, [words[index] for index in part], rng)
            yield self.missed(states, ids, hidden) / counts[0] + self.missed(decoded, ids, sought) / counts[1]

    def read_masked(
        self, texts: Sequence[list[int]], masked: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Some of the texts at a time: which, their ids without masks, what is no padding, and states with masks."""
        for part in self.batches(texts):
            ids, mask = self.backbone.pad([texts[index] for index in part])
            states, _ = self.backbone(self.with_masks(ids, [masked[index] for index in part]), mask)
            yield part, ids, mask, states

    def words_of(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Where the tokens of each text are that are not special."""
        return [[index for index, one in enumerate(ids) if one not in self.special] for ids in texts]

    def with_masks(self, ids: Tensor, masked: Sequence[Sequence[int]]) -> Tensor:
        """Token ids [texts, tokens] of which the ``masked`` ones of each text are replaced by the mask."""
        read = ids.clone()
        for row, indices in enumerate(masked):
            read[row, indices] = self.mask_id
        return read

    def missed(
        self, states: Float[Tensor, "texts tokens dim"], ids: Tensor, predicted: Sequence[Sequence[int]]
    ) -> Float[Tensor, ""]:
        """The cross-entropy of the ``predicted`` tokens of each text by their states, summed over all."""
        rows = [row for row, indices in enumerate(predicted) for _ in indices]
        columns = [column for indices in predicted for column in indices]
        logits = self.head(self.decoder.to_words(states[rows, columns].float())).float()
        return functional.cross_entropy(logits, ids[rows, columns].long(), reduction="sum")

    def decode(
        self,
        vectors: Float[Tensor, "texts dim"],
        ids: Tensor,
        mask: Bool[Tensor, "texts tokens"],
        words: Sequence[Sequence[int]],
        rng: random.Random,
    ) -> Float[Tensor, "texts tokens dim"]:
        """The module's state of each token of texts with these vectors, ids (without masks) and places of words."""
        raise NotImplementedError


class _Reconstruction(TwiceMasked):
    predicts_all: ClassVar[bool] = True

    def make_decoder(self, dim: int, heads: int) -> nn.Module:
        self.embeddings: Any = self.backbone.model.embeddings
        return EnhancedDecoder(dim, heads)

    def decode(
        self,
        vectors: Float[Tensor, "texts dim"],
        ids: Tensor,
        mask: Bool[Tensor, "texts tokens"],
        words: Sequence[Sequence[int]],
        rng: random.Random,
    ) -> Float[Tensor, "texts tokens dim"]:
        """A state for each token, from the text's vector and the tokens that it sees.

        Xiao et al., "RetroMAE: Pre-Training Retrieval-oriented Language Models Via Masked Auto-Encoder", EMNLP 2022
        (arXiv 2205.12035), section 3.3: queries are h + p_i, keys and values h, e_1 + p_1, e_2 + p_2, ...
        """
        config, lengths = cast("RetroMAE", self.config), mask.sum(dim=1).tolist()
        seen = [
            visible(length, indices, config.decoder_masked, ids.shape[1], rng)
            for length, indices in zip(lengths, words, strict=True)
        ]
        first = getattr(self.embeddings, "padding_idx", -1) + 1  # RoBERTa's positions begin there
        positions = self.embeddings.position_embeddings.weight[first : first + ids.shape[1]].float()
        tokens = self.embeddings(input_ids=ids).float()
        keys = torch.cat([vectors[:, None], tokens[:, 1:]], dim=1)
        return self.decoder(vectors[:, None] + positions, keys, torch.stack(seen).to(ids.device))


class EnhancedDecoder(nn.Module):
    """One transformer layer in which each token attends to tokens of its own, and the layer that makes words of it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.to_words = to_words(dim)

    def forward(
        self,
        queries: Float[Tensor, "texts tokens dim"],
        keys: Float[Tensor, "texts tokens dim"],
        seen: Bool[Tensor, "texts tokens tokens"],
    ) -> Float[Tensor, "texts tokens dim"]:
        hidden = ~seen.repeat_interleave(self.heads, dim=0)
        attended, _ = self.attention(queries, keys, keys, attn_mask=hidden, need_weights=False)
        states = self.norms[0](queries + attended)
        return self.norms[1](states + self.feed_forward(states))


def to_words(dim: int) -> nn.Sequential:
    """What makes of a state what token embeddings are multiplied by, as in BERT's head for masked tokens."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))


def sample(indices: Sequence[int], fraction: float, rng: random.Random) -> list[int]:
    """A ``fraction`` of the indices, at least one if there is any, in order."""
    return sorted(rng.sample(indices, min(len(indices), max(1, round(fraction * len(indices))))))


def visible(
    length: int, words: Sequence[int], fraction: float, width: int, rng: random.Random
) -> Bool[Tensor, "width width"]:
    """What each token of a text of ``length`` tokens sees: all but a ``fraction`` of its ``words``, and not itself.

    The first token, in whose stead the text's vector is, is seen by all.
    """
    seen = torch.zeros(width, width, dtype=torch.bool)
    seen[:, :length] = True
    for index in words:
        seen[index, sample(words, fraction, rng)] = False
    seen.fill_diagonal_(False)
    seen[:, 0] = True
    return seen
