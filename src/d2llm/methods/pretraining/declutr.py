"""A backbone learns that spans near each other in one text are alike (DeCLUTR)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from d2llm.methods.pretraining.cocondenser import contrast_of_spans, text_span
from d2llm.methods.pretraining.condenser import CondenserHead
from d2llm.methods.pretraining.retromae import TwiceMasked, sample
from d2llm.models.backbone import Backbone
from d2llm.recipe.training import Pretraining


class DeCLUTR(Pretraining, kind="declutr"):
    """To find, by a span of a text with masks, the mean of spans that overlap it or touch it, among those of other
    texts; and to predict what is masked (DeCLUTR).
    """

    paper = "Giorgi et al., ACL 2021, arXiv 2006.03659 (DeCLUTR)"
    needs = frozenset({"texts", "mask_token"})
    costs = "spans of every text read, with gradient; logits of the vocabulary for masked tokens; an encoder"
    measured = (
        "minilm before distillation, of single sentences: squad-sent .795 to .811, banking77 .635 to .509 "
        "([one seed](log/2026-11.md#2026-11-30-spans-of-a-text-before-distillation-declutr))"
    )

    max_tokens: int = Field(default=512, ge=4)
    shortest_span: float = Field(default=0.1, gt=0, le=1)
    """Shortest span, as a fraction of the text; the paper has 32 tokens of 2,048 or more."""
    longest_span: float = Field(default=0.5, gt=0, le=1)
    """Longest span, as a fraction of the text; the paper has 512 tokens of 2,048 or more."""
    positives: int = Field(default=2, ge=1)
    """Spans whose mean is to be found."""
    masked_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Fraction of the tokens that are masked in the span that searches."""
    temperature: float = Field(default=0.05, gt=0)

    def task(self, backbone: Backbone, seed: int) -> _NearSpans:
        """What is learnt."""
        return _NearSpans(backbone, self, seed, self.masked_fraction)


class _NearSpans(TwiceMasked):
    """One anchor a text: those of the paper's documents are more than two of the longest spans apart."""

    def make_decoder(self, dim: int, heads: int) -> nn.Module:
        return CondenserHead(dim, heads, layers=0)  # masked tokens are predicted by the last states alone

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """Giorgi et al., "DeCLUTR: Deep Contrastive Learning for Unsupervised Textual Representations", ACL 2021 (arXiv
        2006.03659), sections 3.2 and 3.3.
        """
        config = cast("DeCLUTR", self.config)
        spans = [draw_spans(ids, self.special, config, rng) for ids in batch]
        anchors = [one[0] for one in spans]
        masked = [sample(words, self.masked, rng) for words in self.words_of(anchors)]
        order, vectors, missed = list[int](), list[Tensor](), list[Tensor]()
        for part, ids, mask, states in self.read_masked(anchors, masked):
            order += part
            vectors.append(self.backbone.pool(states, mask))
            missed.append(self.missed(states, ids, [masked[index] for index in part]))
        positives = self.vectors_of([span for one in spans for span in one[1:]])
        means = positives.unflatten(0, (len(batch), -1)).mean(dim=1)
        pairs = torch.stack([torch.cat(vectors)[torch.tensor(order).argsort()], means], dim=1).flatten(0, 1)
        # Inner products are then cosines divided by the temperature.
        scaled = functional.normalize(pairs.float(), dim=1) / math.sqrt(config.temperature)
        yield torch.stack(missed).sum() / max(1, sum(map(len, masked))) + contrast_of_spans(scaled)


def draw_spans(ids: Sequence[int], special: set[int], config: DeCLUTR, rng: random.Random) -> list[list[int]]:
    """An anchor and its positives, each between the special tokens of the text.

    Lengths are shortest + p (longest - shortest), with p of Beta(4, 2) for the anchor and of Beta(2, 4) for positives;
    a positive of n tokens begins at most n tokens before the anchor, and at the latest where the anchor ends.
    """
    begin, end = text_span(ids, special)
    total = end - begin
    shortest, longest = (
        min(total, max(1, round(fraction * total))) for fraction in (config.shortest_span, config.longest_span)
    )

    def length(alpha: float, beta: float) -> int:
        return shortest + math.floor(rng.betavariate(alpha, beta) * (longest - shortest))

    def span(first: int, size: int) -> list[int]:
        return [*ids[:begin], *ids[begin + first : begin + first + size], *ids[end:]]

    anchor = length(4, 2)
    start = rng.randint(0, total - anchor)
    spans = [span(start, anchor)]
    for _ in range(config.positives):
        size = length(2, 4)
        spans.append(span(rng.randint(max(0, start - size), min(start + anchor, total - size)), size))
    return spans
