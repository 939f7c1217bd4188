"""A decoder that reads in both directions learns to predict masked tokens (LLM2Vec)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask, word_head

if TYPE_CHECKING:
    from d2llm.recipe import Recipe


class MaskedNextToken(Pretraining, kind="masked_next_token"):
    """To predict masked tokens from both sides, each at the state before it: for decoders with ``backbone.bidirectional
    = true`` (LLM2Vec).
    """

    paper = "BehnamGhader et al. 2024, arXiv 2404.05961 (LLM2Vec)"
    costs = "every text read once, with gradient; logits of the vocabulary for each masked token"
    measured = (
        "the first 8 layers of smollm2 before distillation: squad-sent .452 to .161, banking77 .194 to .164 "
        "([one seed](log/2026-11.md#2026-11-25-words-and-masked-tokens-before-distillation))"
    )

    masked_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of a text's tokens that are masked."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a decoder that reads in one direction."""
        if not recipe.student.backbone.bidirectional:
            raise ValueError(
                "training.pretraining is masked_next_token, which teaches a decoder to read in both directions, but "
                "student.backbone reads in one: set student.backbone.bidirectional = true, or choose another kind"
            )

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt; an ``InputError`` for a model that reads in one direction or has no mask."""
        if not backbone.config.bidirectional:
            raise InputError(
                f"the pretraining masked_next_token is for decoders that read in both directions; set bidirectional "
                f"for '{backbone.config.model}', or choose another"
            )
        return _MaskedTokens(backbone, self, seed)


class _MaskedTokens(PretrainingTask):
    head: Callable[[Tensor], Tensor]

    def __init__(self, backbone: Backbone, config: MaskedNextToken, seed: int) -> None:
        super().__init__(backbone, config, seed)
        self.fraction, self.mask_id = config.masked_fraction, _mask_id(backbone)

    def build(self) -> None:
        self.head = word_head(self.backbone)

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """How badly the masked tokens of each text are predicted."""
        for part in self.batches(batch):
            texts = [batch[index] for index in part]
            masks = [mask_tokens(ids, self.fraction, self.mask_id, rng) for ids in texts]
            states, _ = self.backbone(*self.backbone.pad([ids for ids, _ in masks]))
            values = masked_next_token_loss(states, texts, [positions for _, positions in masks], self.head)
            yield values.sum() / len(batch)


def mask_tokens(ids: Sequence[int], fraction: float, mask_id: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids with a ``fraction`` of them, at least one, replaced by the mask, and the places of these, in order.

    The first token stays, because no state is before it. A text of one token has no masks.
    """
    positions = sorted(rng.sample(range(1, len(ids)), max(1, round(fraction * (len(ids) - 1))))) if len(ids) > 1 else []
    masked = [*ids]
    for index in positions:
        masked[index] = mask_id
    return masked, positions


def masked_next_token_loss(
    states: Float[Tensor, "texts tokens dim"],
    ids: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    head: Callable[[Tensor], Tensor],
) -> Float[Tensor, " texts"]:
    """How surprising the masked tokens of each text are to a language model's ``head``, read at the state before each.

    The state before, because there a decoder predicted the token before it became bidirectional. BehnamGhader et al.,
    "LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders", COLM 2024 (arXiv 2404.05961), section 2, the
    second of three steps; the third is ``simcse``.
    """
    rows = [row for row, in_row in enumerate(positions) for _ in in_row]
    columns = [index for in_row in positions for index in in_row]
    target = torch.tensor([ids[row][column] for row, column in zip(rows, columns, strict=True)], device=states.device)
    before = states[rows, [column - 1 for column in columns]]
    losses = functional.cross_entropy(head(before).float(), target.long(), reduction="none")
    sums = losses.new_zeros(len(ids)).index_add(0, torch.tensor(rows, device=states.device, dtype=torch.long), losses)
    return sums / torch.tensor([max(1, len(in_row)) for in_row in positions], device=states.device)


def _mask_id(backbone: Backbone) -> int:
    """The token that stands for masked ones: the tokenizer's own, or ``_`` as in LLM2Vec."""
    tokenizer = backbone.tokenizer
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        mask_id = tokenizer.get_vocab().get("_")
    if mask_id is None:
        raise InputError(f"'{backbone.config.model}' has no token for masked text and none for '_'; use another model")
    return cast(int, mask_id)
