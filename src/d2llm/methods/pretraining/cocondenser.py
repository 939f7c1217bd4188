"""A backbone learns vectors as Condenser does, and to tell which two spans are of one text (coCondenser)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from d2llm.methods.pretraining.condenser import Condensation, Condenser
from d2llm.models.backbone import Backbone


class CoCondenser(Condenser, kind="cocondenser"):
    """What `condenser` learns, of the two halves of each text, and which halves are of one text (coCondenser)."""

    paper = "Gao and Callan, ACL 2022, arXiv 2108.05540 (coCondenser)"
    measured = (
        "minilm before distillation: squad-sent .795 to .760, banking77 .635 to .486 "
        "([one seed](log/2026-11.md#2026-11-30-halves-of-texts-before-distillation-cocondenser-and-cot-mae))"
    )

    def task(self, backbone: Backbone, seed: int) -> _CoCondensation:
        """What is learnt; an ``InputError`` for a model without a mask, or with one layer."""
        self.require(backbone)
        return _CoCondensation(backbone, self, seed)


class _CoCondensation(Condensation):
    """The vectors that are compared are those of the masked spans, and the gradient is that of a whole batch."""

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """Gao and Callan, "Unsupervised Corpus Aware Language Model Pre-training for Dense Passage Retrieval", ACL 2022
        (arXiv 2108.05540), section 3.3, equations 7 and 8.
        """
        spans = [span for ids in batch for span in halves(ids, self.special)]
        self.vectors: list[Tensor] = []
        predicted = torch.stack([*super().losses(spans, rng)]).sum()
        order = torch.tensor([index for part in self.batches(spans) for index in part])
        yield predicted + contrast_of_spans(torch.cat(self.vectors)[order.argsort()])

    def decode(
        self,
        vectors: Float[Tensor, "texts dim"],
        ids: Tensor,
        mask: Bool[Tensor, "texts tokens"],
        words: Sequence[Sequence[int]],
        rng: random.Random,
    ) -> Float[Tensor, "texts tokens dim"]:
        self.vectors.append(vectors)
        return super().decode(vectors, ids, mask, words, rng)


def contrast_of_spans(vectors: Float[Tensor, "spans dim"]) -> Float[Tensor, ""]:
    """The two spans of each text, one after the other, are to find each other among all spans, by inner products."""
    products = vectors.float() @ vectors.float().T
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    partners = torch.arange(len(vectors), device=vectors.device) ^ 1
    return functional.cross_entropy(products.masked_fill(itself, float("-inf")), partners)


def halves(ids: Sequence[int], special: set[int]) -> tuple[list[int], list[int]]:
    """The two halves of a text's tokens, each between the special tokens of the text; a single token is in both."""
    begin, end = text_span(ids, special)
    middle = begin + (end - begin + 1) // 2
    first, second = ids[begin:middle], ids[middle:end] or ids[begin:middle]
    return [*ids[:begin], *first, *ids[end:]], [*ids[:begin], *second, *ids[end:]]


def text_span(ids: Sequence[int], special: set[int]) -> tuple[int, int]:
    """Where a text's tokens begin and end between its special tokens."""
    begin = next((index for index, one in enumerate(ids) if one not in special), len(ids))
    return begin, len(ids) - next((index for index, one in enumerate(reversed(ids)) if one not in special), 0)
