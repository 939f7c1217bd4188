"""A backbone learns to recognise a text that it reads twice with different dropout (SimCSE)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask, restore_dropout, set_dropout


class SimCSE(Pretraining, kind="simcse"):
    """To recognise a text that is read twice with different dropout, among the texts of a batch (SimCSE)."""

    paper = "Gao et al. 2021, arXiv 2104.08821 (SimCSE)"
    costs = "every text read twice, with gradient"
    measured = (
        "minilm before distillation: squad-sent .795 to .822, banking77 .635 to .375 ([one "
        "seed](log/2026-11.md#2026-11-24-a-backbone-trained-on-texts-without-labels-before-distillation))"
    )
    usual_dropout: ClassVar[float] = 0.1

    temperature: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _check_dropout(self) -> SimCSE:
        if self.dropout == 0:
            raise ValueError(
                "dropout is 0, but simcse compares two readings of a text that differ by nothing else: set it to 0.1"
            )
        return self

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt; an ``InputError`` for a model without dropout."""
        dropouts = set_dropout(backbone.model, self.dropout_rate)
        restore_dropout(dropouts)
        if not dropouts:
            raise InputError(
                f"'{backbone.config.model}' has no layer with dropout, which the pretraining simcse needs; use another"
            )
        return TwoReadings(backbone, self, seed, temperature=self.temperature)


class TwoReadings(PretrainingTask):
    """Two readings of each text, of which the second may be changed."""

    def __init__(self, backbone: Backbone, config: Pretraining, seed: int, *, temperature: float) -> None:
        super().__init__(backbone, config, seed)
        self.temperature = temperature

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """The loss of the batch, as one part: each text is compared with all."""
        first, second = self.vectors_of(batch), self.vectors_of(self.changed(batch, rng))
        yield contrastive_loss(first, second, temperature=self.temperature)

    def changed(self, batch: Sequence[list[int]], rng: random.Random) -> Sequence[list[int]]:
        """The texts of the second reading."""
        return batch


def contrastive_loss(
    first: Float[Tensor, "texts dim"], second: Float[Tensor, "texts dim"], *, temperature: float
) -> Float[Tensor, ""]:
    """Each text is to be recognised among all texts of the batch, from two of its vectors.

    L = -1/N sum_i log( exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t) )

    Gao et al., "SimCSE", EMNLP 2021 (arXiv 2104.08821), section 3. Liu et al., "Mirror-BERT", EMNLP 2021 (arXiv
    2104.08027), section 2, also compares the other way round, and the texts of one side with each other.
    """
    cosines = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T
    same = torch.eye(len(first), dtype=torch.bool, device=first.device)
    return in_batch_cross_entropy(cosines, same, torch.ones_like(same), temperature=temperature)
