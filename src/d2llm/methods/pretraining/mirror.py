"""SimCSE with a span of tokens masked in the second reading (Mirror-BERT)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from d2llm.methods.pretraining.simcse import TwoReadings
from d2llm.models.backbone import Backbone
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask


class Mirror(Pretraining, kind="mirror"):
    """As ``simcse``, with a span of the tokens masked the second time (Mirror-BERT)."""

    paper = "Liu et al. 2021, arXiv 2104.08027 (Mirror-BERT)"
    needs = frozenset({"texts", "mask_token"})
    costs = "every text read twice, with gradient"
    measured = (
        "minilm before distillation: squad-sent .795 to .815, banking77 .635 to .399 ([one "
        "seed](log/2026-11.md#2026-11-24-a-backbone-trained-on-texts-without-labels-before-distillation))"
    )
    usual_dropout: ClassVar[float] = 0.1

    masked_tokens: int = Field(default=3, ge=1)
    """How many neighbouring tokens are masked."""
    temperature: float = Field(default=0.05, gt=0)

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        return _MaskedReading(backbone, self, seed)


class _MaskedReading(TwoReadings):
    def __init__(self, backbone: Backbone, config: Mirror, seed: int) -> None:
        super().__init__(backbone, config, seed, temperature=config.temperature)
        self.num_masked = config.masked_tokens

    def changed(self, batch: Sequence[list[int]], rng: random.Random) -> Sequence[list[int]]:
        mask_id: Any = self.backbone.tokenizer.mask_token_id
        return [mask_span(ids, self.num_masked, mask_id, rng) for ids in batch]


def mask_span(ids: Sequence[int], length: int, mask_id: int, rng: random.Random) -> list[int]:
    """Token ids with ``length`` neighbouring tokens, but neither the first nor the last one, replaced by one mask.

    A text keeps at least one of its tokens. Mirror-BERT (arXiv 2104.08027), section 2, masks characters instead.
    """
    length = min(length, len(ids) - 3)
    if length < 1:
        return list(ids)
    start = rng.randint(1, len(ids) - 1 - length)
    return [*ids[:start], mask_id, *ids[start + length :]]
