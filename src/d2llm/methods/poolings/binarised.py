"""Vectors that an index stores as they are in one, three or four bits a dimension, by trained maps (BEBR)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from d2llm.models.backbone import Backbone
from d2llm.models.pooling import TextPooling, make_pooling, to_sphere
from d2llm.recipe.student import ChangedPooling
from d2llm.store.vector_formats import RotatedFormat, VectorFormat


class Binarised(ChangedPooling, kind="binarised"):
    """The signs of a trained map of another pooling's vectors, and of what these signs miss (BEBR)."""

    paper = "Gan et al., KDD 2023, arXiv 2302.08714 (BEBR)"
    costs = "two maps a bit while texts are encoded; queries are rounded like passages"
    measured = (
        "one bit on frozen minilm, maps trained on 240 queries a set: wikiqa .726 to .731, banking77 .588 to .676; in "
        "an index (floats as queries before) .884 to .875, .625 to .681 ([one "
        "seed](log/2026-11.md#2026-11-30-more-methods-measured-and-retromae-and-bebr))"
    )
    reads_tokens: ClassVar[bool] = False

    vector_format: Literal["binary", "int3", "int4"] = "binary"
    """The format in which an index stores these vectors as they are (``d2llm encode --vectors``)."""

    def module(self, backbone: Backbone) -> TextPooling:
        return BinarisedPooling(make_pooling(self.pooling, backbone), VectorFormat.kinds.find(self.vector_format))


class BinarisedPooling(TextPooling):
    """b = s_0 + s_1 / 2 + s_2 / 4 + ..., with s_0 = sign(W x) and s_i = sign(R_i (x - f_i)), f_i the unit vector of
    B_i (s_0 + ... + s_{i-1} / 2^{i-1}), turned back by the rotation of the index's format and scaled to its levels.

    Gan et al., "Binary Embedding-based Retrieval at Tencent", KDD 2023 (arXiv 2302.08714), section 3.2, and its code.
    Here W, R_i and B_i are linear, and start as the rotation and its inverse: training begins with the codes that any
    vector gets in the index. There they are networks of two layers that start at random.
    """

    inner: TextPooling  # pyright: ignore[reportIncompatibleVariableOverride]
    rotation: Tensor

    def __init__(self, inner: TextPooling, stored_as: type[RotatedFormat]) -> None:
        super().__init__(inner.dim, inner)
        turned = stored_as(self.dim)
        rotation = torch.tensor(np.stack([turned.turn(axis) for axis in np.eye(self.dim, dtype=np.float32)]).T).float()
        self.register_buffer("rotation", rotation, persistent=False)
        self.scale = turned.step * 2 ** (turned.bits - 2)  # levels of b are 2^(2 - bits) apart
        self.signs = nn.ParameterList([rotation.clone() for _ in range(turned.bits)])
        self.back = nn.ParameterList([rotation.T.clone() for _ in range(turned.bits - 1)])

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        vectors = self.inner(states, mask)
        first, *others = self.signs
        bits = straight_through_sign(vectors @ first.T)
        for index, (signs, back) in enumerate(zip(others, self.back, strict=True), start=1):
            missing = vectors - to_sphere(bits @ back.T)
            bits = bits + straight_through_sign(missing @ signs.T) / 2**index
        return self.scale * bits @ self.rotation


def straight_through_sign(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1 or -1; the gradient is that of the values between -1 and 1, and 0 of others."""
    clipped = values.clamp(-1, 1)
    return torch.where(values >= 0, 1.0, -1.0) + (clipped - clipped.detach())
