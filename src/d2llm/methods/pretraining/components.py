"""A backbone with a narrow projection imitates the principal components of another one's vectors (HPD)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.methods.poolings.projection import ProjectedPooling, Projection
from d2llm.methods.pretraining._imitation import Imitation, ImitationTask
from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling, to_sphere
from d2llm.ops.whitening import principal_components
from d2llm.training.pretrain import PretrainingTask

if TYPE_CHECKING:
    from d2llm.recipe import Recipe

_MAX_TEXTS = 10_000  # on which the components are found; the published code has the first 40,000


class Components(Imitation, kind="components"):
    """To imitate the principal components of another backbone's vectors by a trained projection (HPD)."""

    paper = "Zhao et al., Findings of ACL 2022, arXiv 2203.07687 (HPD)"
    costs = "every text read once with gradient, and by the teacher; the pooling `projection` over one without weights"
    measured = (
        "128 dimensions, four of minilm's six layers, before distillation: squad-sent .725 to .752, banking77 .577 to "
        ".623; `vectors` in its place .750 and .607 ([one "
        "seed](log/2026-11.md#2026-11-29-principal-components-of-a-teachers-vectors-hpd))"
    )
    aligns_tokens: ClassVar[bool] = False

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe without a teacher, or whose vectors are not projected."""
        super().check(recipe)
        if (problem := _why_not_projected(recipe.student.pooling)) is not None:
            raise ValueError(problem)

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        if (problem := _why_not_projected(backbone.pooling)) is not None:
            raise InputError(problem)
        return _ComponentsOfVectors(backbone, self, seed)


def _why_not_projected(pooling: object) -> str | None:
    if isinstance(pooling, Projection) and not pooling.pooling.is_trained:
        return None
    return (
        "training.pretraining is components, which trains a projection: set student.pooling to one over a pooling "
        'without weights, such as { kind = "projection", dim = 128 }'
    )


class _ComponentsOfVectors(ImitationTask):
    """The mean squared difference between P y and W h, by component.

    y and h are the vectors of student and teacher, of norm sqrt(dim) each; W are the teacher's principal components,
    applied without centring, as in the published code. There the student's projection has a bias and a tanh; here it is
    the linear map of the pooling ``projection``, and begins as the one that predicts W h best.
    """

    projection: nn.Linear
    components: nn.Linear

    def build(self) -> nn.Module:
        pooling = self.backbone.pooling
        assert isinstance(pooling, Projection)
        if pooling.dim > self.taught_by.dim:
            raise InputError(
                f"pooling.dim is {pooling.dim}, but the vectors of the teacher '{self.taught_by.config.model}' have "
                f"only {self.taught_by.dim} components; give fewer, or a wider teacher"
            )
        linear, components = (
            nn.Linear(model.dim, pooling.dim, bias=False) for model in (self.backbone, self.taught_by)
        )
        self.linear = self.projection = linear
        self.components = components.requires_grad_(False)  # kept in checkpoints
        return nn.ModuleDict({"linear": linear, "components": components}).to(self.backbone.device)

    @torch.no_grad()
    def begin(self, texts: Sequence[list[int]]) -> None:
        """Find the teacher's components, then the map of the student that predicts them best."""
        chosen = random.Random(f"{self.seed}:components").sample([*texts], min(_MAX_TEXTS, len(texts)))
        vectors: list[Tensor] = []
        for batch in self.batches(chosen):
            *_, states, mask = self.read([chosen[index] for index in batch])
            vectors.append(to_sphere(self.taught_by.pool(states, mask)).cpu())
        found = principal_components(torch.cat(vectors).numpy(), self.components.out_features)
        self.components.weight.copy_(torch.from_numpy(found.copy()))
        self.fit(self.projection, texts)

    def compared(
        self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        vectors, taught = self.backbone.pool(states, mask), self.taught_by.pool(teacher_states, teacher_mask)
        return to_sphere(vectors), self.components(to_sphere(taught))

    def differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        vectors, target = self.compared(states, mask, teacher_states, teacher_mask)
        return (self.projection(vectors) - target).square().mean(dim=1)

    def end(self, pooling: TextPooling) -> None:
        """The trained map is the student's projection."""
        assert isinstance(pooling, ProjectedPooling)
        with torch.no_grad():
            pooling.projection.copy_(self.projection.weight)
        pooling.is_fitted_to_passages = False
