"""A backbone learns to predict from a text's vector which words are in it, and which follow (LLaRA)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2llm.core.progress import remarks
from d2llm.models.backbone import Backbone
from d2llm.ops.bm25_words import sentences
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask, identity_map, word_head


class Words(Pretraining, kind="words"):
    """To predict from a text's vector, by the language-model head, which words are in it and which are in the passage's
    second part, if it was the first (LLaRA).
    """

    paper = "Li et al. 2023, arXiv 2312.15503 (LLaRA: EBAE and EBAR)"
    costs = "every text read once, with gradient; logits of the whole vocabulary for each text"
    measured = (
        "the first 8 layers of smollm2 before distillation: squad-sent .507 to .526, banking77 .258 to .248 "
        "([one seed](log/2026-11.md#2026-11-25-words-and-masked-tokens-before-distillation))"
    )

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        return _WordsOfTexts(backbone, self, seed)


class _WordsOfTexts(PretrainingTask):
    head: Callable[[Tensor], Tensor]
    maps: nn.ModuleList

    def __init__(self, backbone: Backbone, config: Pretraining, seed: int) -> None:
        super().__init__(backbone, config, seed)
        self.following: dict[tuple[int, ...], list[int]] = {}
        self.special = {*map(int, backbone.tokenizer.all_special_ids)}

    def tokenize(self, passages: Sequence[str], queries: Sequence[str]) -> list[list[int]]:
        """Passages of several sentences in two parts each; the tokens of the second are what follows the first."""
        halves: list[str] = []
        for passage in passages:
            starts = [start for start, _ in sentences(passage)[1:]]
            # At the sentence that begins nearest to the middle.
            cut = min(starts, key=lambda start: abs(2 * start - len(passage)), default=len(passage))
            halves += [passage[:cut].rstrip(), *([passage[cut:]] if cut < len(passage) else [])]
            if cut < len(passage):
                one, other = self.backbone.tokenize(halves[-2:], "passage", limit=self.config.max_tokens).ids
                self.following[tuple(one)] = other
        remarks.info("pretraining: something follows in %d of %d passages", len(self.following), len(passages))
        return super().tokenize(halves, queries)

    def record(self, texts: Sequence[list[int]]) -> dict[str, Any]:
        """What follows each text."""
        return {"following": [self.following.get(tuple(ids), []) for ids in texts]}

    def build(self) -> nn.Module:
        """Two maps of the vectors: for the text's own words, and for those that follow."""
        dim = self.backbone.dim
        self.head = word_head(self.backbone)
        self.maps = nn.ModuleList([identity_map(dim, dim, self.seed) for _ in range(2)]).to(self.backbone.device)
        return self.maps

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """How badly vectors predict a text's own words and those that follow, one half each."""
        for part in self.batches(batch):
            texts = [batch[index] for index in part]
            states, mask = self.backbone(*self.backbone.pad(texts))
            vectors = self.backbone.pool(states, mask)
            following = [self.following.get(tuple(ids), []) for ids in texts]
            text_losses, next_ones = (
                word_loss(
                    self.head(project(vectors)), [[one for one in ids if one not in self.special] for ids in words]
                )
                for project, words in zip(self.maps, (texts, following), strict=True)
            )
            yield ((text_losses + next_ones) / 2).sum() / len(batch)


def word_loss(logits: Float[Tensor, "texts vocabulary"], words: Sequence[Sequence[int]]) -> Float[Tensor, " texts"]:
    """How surprising a text's words are, by the logits that its vector gives to all of them; 0 for a text without any.

    L = -1/|T| sum_{t in T} log softmax(logits)_t, with T the set of the text's tokens.

    Li et al., "Making Large Language Models A Better Foundation For Dense Retrieval" (LLaRA, also Llama2Vec), 2023
    (arXiv 2312.15503): EBAE if they are the text's own words, EBAR if they are those of what follows. There,
    prompts and added tokens ask a decoder for one vector or the other; here two linear maps make both from one vector.
    """
    log_probabilities = logits.float().log_softmax(dim=1)
    losses = [
        -row[[*{*of_text}]].mean() if of_text else row.sum() * 0
        for row, of_text in zip(log_probabilities, words, strict=True)
    ]
    return torch.stack(losses)
