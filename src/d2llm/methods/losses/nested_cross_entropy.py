"""The first components of a vector, and what fewer layers make of a text, are to be useful vectors (Matryoshka)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.models.student import Student
from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.recipe import CustomBackbone, Recipe
from d2llm.recipe.losses import Loss
from d2llm.training.losses import LossInput

_log = logging.getLogger(__name__)


class NestedCrossEntropy(Loss, kind="nested_cross_entropy"):
    """In-batch cross-entropy of the cosines of a vector's first components, and of the vectors after fewer layers.

    The student records both, so that a server cuts its vectors on request, and ``Student.cut`` makes a faster student.
    """

    paper = (
        "Kusupati et al., NeurIPS 2022, arXiv 2205.13147 (Matryoshka); Li et al. 2024, arXiv 2402.14776 (2D Matryoshka)"
    )
    needs = frozenset({"judgements"})
    costs = "next to nothing; with ``layers`` pooling once for each depth, no second reading"
    measured = (
        "cosines of the first 64 components: qnli .761 to .792, banking77 .582 to .610 "
        "([`dims`](log/2026-11.md#2026-11-25-two-heads-nested-widths-and-whitening-after-training)); after 2 of "
        "6 layers .453 to .719, .288 to .400 ([`layers`](log/2026-11.md#2026-11-25-two-adapters-fewer-layers-and-"
        "fewer-dimensions)), as published: note below; one seed"
    )
    of_vectors: ClassVar[bool] = True
    of_products: ClassVar[bool] = True
    dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Widths at which the first components are to be useful without the others, such as ``[64, 128, 256]``."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of layers after which a vector is to be useful without the layers above, such as ``[2, 4]``; at the
    widths, and in full."""

    sampled: bool = False
    """Train one of the widths and one of the depths in each step, drawn at random, instead of all (2D Matryoshka)."""
    alignment: float = Field(default=0.0, ge=0)
    """Weight of the divergence of the last layer's vectors from those after fewer layers; 1 in 2D Matryoshka."""

    @model_validator(mode="after")
    def _check_order(self) -> NestedCrossEntropy:
        for name, what in (("dims", "width"), ("layers", "depth")):
            values = [*getattr(self, name)]
            if sorted({*values}) != values:
                raise ValueError(f"{name} is {values}, but must name each {what} once, in ascending order")
        if self.weight and not (self.dims or self.layers):
            raise ValueError("names neither dims nor layers, so nothing would be trained: set one of them")
        if self.alignment and not self.layers:
            raise ValueError("alignment compares vectors after fewer layers, but layers names none: set it")
        return self

    @property
    def depths(self) -> tuple[int, ...]:
        return self.layers

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        backbone = recipe.student.backbone
        if recipe.training.dual_head:
            raise ValueError(
                "losses.nested_cross_entropy trains one inner product, but training.dual_head combines two at the end: "
                "set dual_head to false, or delete nested_cross_entropy"
            )
        if self.layers and isinstance(backbone, CustomBackbone):
            raise ValueError(
                f"losses.nested_cross_entropy.layers trains layers, and a {backbone.kind} backbone has none here: "
                "delete layers"
            )
        if self.layers and (weighing := recipe.student.pooling.weighing) is not None:
            raise ValueError(
                "losses.nested_cross_entropy.layers reads texts after fewer layers, and the pooling "
                f"{weighing.kind} reads layers that these may lack: set another student.pooling, or delete layers"
            )
        if self.layers and backbone.layers is not None:
            count = backbone.layers if isinstance(backbone.layers, int) else len(backbone.layers)
            if self.layers[-1] >= count:
                raise ValueError(
                    f"losses.nested_cross_entropy.layers names {self.layers[-1]}, but student.backbone.layers keeps "
                    f"only {count} layers: name fewer"
                )

    def check_student(self, student: Student, *, has_lists: bool) -> None:
        if self.dims and self.dims[-1] >= student.vector_dim:
            raise InputError(
                f"losses.nested_cross_entropy.dims names {self.dims[-1]}, but the student's vectors have "
                f"{student.vector_dim} components; name smaller widths only"
            )
        if self.layers and self.layers[-1] >= (count := student.backbone.num_layers):
            raise InputError(
                f"losses.nested_cross_entropy.layers names {self.layers[-1]}, but the student's backbone has {count} "
                "layers; name fewer"
            )
        if not has_lists:
            raise InputError(
                "losses.nested_cross_entropy is trained on the passages of queries, but all data sets are labelled "
                "pairs; delete it, or add a retrieval set"
            )

    def record(self, *, is_trained: bool) -> dict[str, Any]:
        if not is_trained:
            sizes = " or ".join(str(nested) for nested in (self.dims, self.layers) if nested)
            _log.warning("no trained state was better on dev than the start, so the vectors cannot be cut to %s", sizes)
            return {"nested_dims": []}
        depths = {"nested_depths": [*self.layers]} if self.layers else {}
        return {"nested_dims": [*self.dims]} | depths

    def __call__(self, inputs: LossInput) -> Tensor | None:
        if inputs.vectors is None:
            return None
        dims, layers = self.dims, self.layers
        if self.sampled:
            drawn = random.Random(" ".join(inputs.batch.query_ids))  # so that a resumed run draws the same
            dims, layers = (tuple(drawn.sample(sizes, min(1, len(sizes)))) for sizes in (dims, layers))
        counted = [(inputs.vectors_after[depth], True) for depth in layers]
        counted += [(inputs.vectors, False)] if dims else []
        values: list[Tensor] = []
        for vectors, in_full in counted:
            queries, passages = inputs.for_products(vectors)
            widths = (*dims, vectors.shape[1]) if in_full else dims
            values.append(nested_cross_entropy(queries, passages, inputs.positive, inputs.candidates, widths))
        value = torch.stack(values).mean()
        for depth in layers if self.alignment else ():
            value = value + self.alignment / len(layers) * alignment(inputs.vectors_after[depth], inputs.vectors)
        return value


def nested_cross_entropy(
    queries: Float[Tensor, "queries dim"],
    passages: Float[Tensor, "passages dim"],
    positive_mask: Bool[Tensor, "queries passages"],
    candidate_mask: Bool[Tensor, "queries passages"],
    dims: Sequence[int],
) -> Float[Tensor, ""]:
    """In-batch cross-entropy of the cosines of the vectors' first components, for each width; the mean over widths.

    L = 1/|M| sum_{m in M} L_CE( 20 cos(a_i[1..m], b_j[1..m]) ), where L_CE is ``in_batch_cross_entropy``. Kusupati et
    al., "Matryoshka Representation Learning", NeurIPS 2022 (arXiv 2205.13147), equation 1, with equal weights.

    Args:
        queries: the queries' vectors, ready for inner products.
        passages: the passages' vectors.
        positive_mask: which passages are relevant.
        candidate_mask: which passages a query is compared with.
        dims: the widths, at most that of the vectors.
    """
    values: list[Tensor] = []
    dtype = torch.promote_types(queries.dtype, torch.float32)
    for width in dims:
        a, b = (functional.normalize(vectors[:, :width].to(dtype), dim=1) for vectors in (queries, passages))
        values.append(in_batch_cross_entropy(a @ b.T, positive_mask, candidate_mask, temperature=0.05))
    return torch.stack(values).mean()


def alignment(
    shallow: Float[Tensor, "texts dim"], whole: Float[Tensor, "texts dim"], *, temperature: float = 0.3
) -> Float[Tensor, ""]:
    """The mean over texts of KL( softmax(y^N / t) || softmax(y^n / t) ) over a vector's components, times t^2.

    y^N is the last layer's vector, through which no gradient flows. Li et al., "2D Matryoshka Sentence Embeddings",
    2024 (arXiv 2402.14776), section 3; t as in the implementation of sentence-transformers.
    """
    predicted, target = ((vectors.float() / temperature).log_softmax(dim=1) for vectors in (shallow, whole.detach()))
    return temperature**2 * (target.exp() * (target - predicted)).sum(dim=1).mean()
