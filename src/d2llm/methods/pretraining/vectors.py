"""A backbone imitates another one's vectors of texts."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from d2llm.methods.pretraining._imitation import Imitation, ImitationTask
from d2llm.models.backbone import Backbone
from d2llm.training.pretrain import PretrainingTask, identity_map


class Vectors(Imitation, kind="vectors"):
    """To imitate another backbone's vectors, such as those of itself before layers were left out."""

    paper = "after Turc et al. 2019, arXiv 1908.08962 (Well-Read Students)"
    measured = (
        "four of minilm's six layers: squad-sent .739 to .755, banking77 .574 to .613 before distillation ([one "
        "seed](log/2026-11.md#2026-11-24-a-backbone-trained-on-texts-without-labels-before-distillation)); qnli "
        "and banking77 .7432 to .7610 after it ([one seed](log/2026-11.md#2026-11-26-four-layers-before-and-"
        "after-distillation-the-context-of-a-passage))"
    )
    aligns_tokens: ClassVar[bool] = False

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        return _VectorsOfTexts(backbone, self, seed)


class _VectorsOfTexts(ImitationTask):
    def build(self) -> nn.Module | None:
        """Vectors of the same width are compared as they are, so that the student's become the teacher's.

        Unless the teacher is a strange one, with another tokenizer.
        """
        if self.backbone.dim != self.taught_by.dim or self.readings:
            self.linear = identity_map(self.backbone.dim, self.taught_by.dim, self.seed).to(self.backbone.device)
        return self.linear

    def compared(
        self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        taught = self.taught_by.pool(teacher_states, teacher_mask).float()
        return self.backbone.pool(states, mask), functional.normalize(taught, dim=1)

    def differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        vectors, taught = self.backbone.pool(states, mask), self.taught_by.pool(teacher_states, teacher_mask)
        return vector_distance(vectors if self.linear is None else self.linear(vectors), taught)


def vector_distance(
    student: Float[Tensor, "texts dim"], teacher: Float[Tensor, "texts dim"]
) -> Float[Tensor, " texts"]:
    """1 minus the cosine of the student's and the teacher's vector.

    Distillation on texts without labels before that on labels: Turc et al., "Well-Read Students Learn Better", 2019
    (arXiv 1908.08962), whose teacher gives classes; here it gives vectors.
    """
    return 1 - torch.cosine_similarity(student.float(), teacher.float(), dim=1)
