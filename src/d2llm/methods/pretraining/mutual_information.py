"""A backbone learns to say as much as it can about another one's states of tokens (Distiller)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from d2llm.methods.pretraining._imitation import Imitation, ImitationTask
from d2llm.models.backbone import Backbone
from d2llm.training.pretrain import NO_ATTENTION, PretrainingTask, identity_map


class MutualInformation(Imitation, kind="mutual_information"):
    """To share as much information as possible with another backbone's states: each state is to tell which of the
    batch's teacher states is its own.
    """

    paper = "He et al. 2021, arXiv 2109.11105 (MI-alpha of Distiller), with the bound of Poole et al. 2019"
    costs = (
        "every text read once with gradient, and by the teacher; the products of all states of tokens read in one pass"
    )
    measured = (
        "four of minilm's six layers: squad-sent .739 to .766, banking77 .574 to .605 before distillation ([one "
        "seed](log/2026-11.md#2026-11-25-mutual-information-before-distillation)); qnli and banking77 .7432 to "
        ".7601 after it ([one seed](log/2026-11.md#2026-11-26-four-layers-before-and-after-distillation-the-"
        "context-of-a-passage))"
    )

    alpha: float = Field(default=0.9, ge=0, le=1)
    """Between the bound of least bias (0) and that of least variance (1)."""

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        return _Information(backbone, self, seed)


class _Information(ImitationTask):
    critic: _Critic

    def __init__(self, backbone: Backbone, config: MutualInformation, seed: int) -> None:
        super().__init__(backbone, config, seed)
        self.alpha = config.alpha

    def build(self) -> nn.Module:
        self.linear = identity_map(self.backbone.dim, self.taught_by.dim, self.seed)
        self.critic = _Critic(self.linear).to(self.backbone.device)
        return self.critic

    @torch.no_grad()
    def fitted(self, features: Float[Tensor, "rows width"]) -> None:
        # The critic compares directions: what all have in common tells no token apart.
        linear = self.critic.projection
        linear.bias.copy_(-linear.weight @ features.float().mean(dim=0))

    def differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        scores = self.critic(states[mask], teacher_states[mask])
        return -mutual_information(scores, alpha=self.alpha).expand(len(states))


class _Critic(nn.Module):
    """Scores of the student's states with the teacher's: a e^s cos(W x, y) + b, with W, s and b learned."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.constant = nn.Parameter(torch.zeros(()))

    def forward(
        self, student: Float[Tensor, "tokens student_dim"], teacher: Float[Tensor, "tokens teacher_dim"]
    ) -> Float[Tensor, "tokens tokens"]:
        """The score of each of the student's states (rows) with each of the teacher's (columns)."""
        one = functional.normalize(self.projection(student.float()), dim=1)
        return self.log_scale.exp() * one @ functional.normalize(teacher.float(), dim=1).T + self.constant


def mutual_information(scores: Float[Tensor, "tokens tokens"], *, alpha: float) -> Float[Tensor, ""]:
    """A lower bound, in nats, of what the student's state of a token says about the teacher's state of the same token.

    I = 1 + mean_j log( e^f_jj / (alpha m_j + 1 - alpha) ) - mean_j m'_j / (alpha m'_j + 1 - alpha)

    with f_ij the ``scores`` of the student's state i with the teacher's state j, m_j the mean of e^f_ij over all i, and
    m'_j that over i other than j. alpha = 1 is InfoNCE, which cannot exceed the log of the number of tokens; a lower
    one has less bias and more variance. He et al., "Distiller: A Systematic Study of Model Distillation Methods in
    Natural Language Processing", SustaiNLP 2021 (arXiv 2109.11105), which takes the bound from Poole et al., "On
    Variational Bounds of Mutual Information", ICML 2019. Its q(y) is 1 here: the critic that gives the scores has a
    constant of its own. There, the states of several layers are compared; here those of the last layer.
    """
    scores, num_tokens = scores.float(), len(scores)
    if num_tokens < 2:
        return scores.sum() * 0
    same = torch.eye(num_tokens, dtype=torch.bool, device=scores.device)
    means = scores.logsumexp(dim=0) - math.log(num_tokens)
    others = scores.masked_fill(same, NO_ATTENTION).logsumexp(dim=0) - math.log(num_tokens - 1)

    def mixed(values: Tensor) -> Tensor:  # log(alpha e^value + 1 - alpha)
        terms = [values + math.log(alpha)] if alpha else []
        return torch.stack([*terms, *([torch.full_like(values, math.log1p(-alpha))] if alpha < 1 else [])]).logsumexp(0)

    return 1 + (scores.diagonal() - mixed(means)).mean() - (others - mixed(others)).exp().mean()
