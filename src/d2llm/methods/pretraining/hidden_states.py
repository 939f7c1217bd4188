"""A backbone imitates another one's states of tokens (TinyBERT)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from d2llm.methods.pretraining._imitation import Imitation, ImitationTask
from d2llm.models.backbone import Backbone
from d2llm.training.pretrain import PretrainingTask, identity_map


class HiddenStates(Imitation, kind="hidden_states"):
    """To imitate another backbone's states of all tokens, in its last layer, through a linear map that is dropped
    afterwards (TinyBERT, ERNIE-Tiny).
    """

    paper = "Jiao et al. 2020, arXiv 1909.10351 (TinyBERT); Su et al. 2021, arXiv 2106.02241 (ERNIE-Tiny)"
    measured = (
        "four of minilm's six layers: squad-sent .739 to .751, banking77 .574 to .613 before distillation ([one "
        "seed](log/2026-11.md#2026-11-24-a-backbone-trained-on-texts-without-labels-before-distillation)); qnli "
        "and banking77 .7432 to .7622 after it ([one seed](log/2026-11.md#2026-11-26-four-layers-before-and-"
        "after-distillation-the-context-of-a-passage))"
    )

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        return _States(backbone, self, seed)


class _States(ImitationTask):
    projection: nn.Linear

    def build(self) -> nn.Module:
        self.linear = self.projection = identity_map(self.backbone.dim, self.taught_by.dim, self.seed).to(
            self.backbone.device
        )
        return self.projection

    def differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        return state_distance(self.projection(states.float()), teacher_states, mask)


def state_distance(
    student: Float[Tensor, "texts tokens dim"],
    teacher: Float[Tensor, "texts tokens dim"],
    mask: Bool[Tensor, "texts tokens"],
) -> Float[Tensor, " texts"]:
    """Mean squared difference of the tokens' states, 0 for a text without any; the student's were projected to the
    teacher's width.

    Jiao et al., "TinyBERT", EMNLP Findings 2020 (arXiv 1909.10351), the loss of hidden states, here of the last
    layer; also used in "ERNIE-Tiny" (Su et al. 2021, arXiv 2106.02241).
    """
    by_token = (student.float() - teacher.float()).square().mean(dim=2)
    return (by_token * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
