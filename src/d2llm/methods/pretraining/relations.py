"""A backbone imitates another one's attention: the relations of queries, keys and values (MiniLMv2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2llm.core.errors import InputError, ModelError
from d2llm.methods.pretraining._imitation import Imitation, ImitationTask
from d2llm.models.backbone import Backbone
from d2llm.models.pretrained import layers_of
from d2llm.training.pretrain import NO_ATTENTION, PretrainingTask

_ATTENTION_PARTS = (
    ("query", "q_proj", "q_lin", "q"),
    ("key", "k_proj", "k_lin", "k"),
    ("value", "v_proj", "v_lin", "v"),
)
"""What models call the linear layers that make queries, keys and values."""


class Relations(Imitation, kind="relations"):
    """To imitate the relations of queries, of keys and of values in one layer of another backbone's attention; widths
    may differ (MiniLMv2), or its attention and the relations of values (MiniLM).
    """

    paper = "Wang et al. 2021, arXiv 2012.15828 (MiniLMv2); Wang et al. 2020, arXiv 2002.10957 (MiniLM)"
    costs = (
        "every text read once with gradient, and by the teacher, which has the same tokenizer; separate layers "
        "for queries, keys and values"
    )
    measured = (
        "four of minilm's layers: squad-sent .739 to .763, banking77 .574 to .599 before distillation ([one "
        "seed](log/2026-11.md#2026-11-24-a-backbone-trained-on-texts-without-labels-before-distillation)); version 1 "
        ".753 and .595 ([one seed](log/2026-11.md#2026-11-30-more-methods-measured-and-retromae-and-bebr)); qnli "
        "and banking77 .7432 to .7586 after it ([one seed](log/2026-11.md#2026-11-26-four-layers-before-and-"
        "after-distillation-the-context-of-a-passage))"
    )
    needs_same_tokens: ClassVar[bool] = True

    version: Literal[1, 2] = 2
    """2: queries are compared with queries, keys with keys, values with values. 1: queries with keys, which is the
    attention itself, and values with values."""
    relation_heads: int | None = Field(default=None, ge=1)
    """Into how many parts queries, keys and values are split, in both backbones. By default 48, or, for version 1, the
    student's attention heads."""
    teacher_layer: int | None = Field(default=None, ge=0)
    """The layer of the teacher, counted from 0, that the student's last layer imitates. By default the last; an upper
    middle one is better if the teacher is large."""

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt."""
        return _Relations(backbone, self, seed)


class _Relations(ImitationTask):
    attention: list[_Attention]

    def __init__(self, backbone: Backbone, config: Relations, seed: int) -> None:
        super().__init__(backbone, config, seed)
        model: Any = backbone.model.config
        heads = 48 if config.version == 2 else int(getattr(model, "num_attention_heads", 1))
        self.heads, self.teacher_layer = config.relation_heads or heads, config.teacher_layer
        self.pairs = ((0, 0), (1, 1), (2, 2)) if config.version == 2 else ((0, 1), (2, 2))

    def build(self) -> None:
        """Find the attention of both; a ``ModelError`` if it cannot be read."""
        pairs = ((self.backbone, None), (self.taught_by, self.teacher_layer))
        self.attention = [_Attention(model, layer, self.heads) for model, layer in pairs]

    def hooks(self) -> list[RemovableHandle]:
        return [hook for layer in self.attention for hook in layer.listen()]

    def differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        student_vectors, taught = (layer.vectors for layer in self.attention)
        values = [
            relation_divergence(
                (student_vectors[one], student_vectors[other]), (taught[one], taught[other]), mask, heads=self.heads
            )
            for one, other in self.pairs
        ]
        return torch.stack(values).sum(dim=0)


class _Attention:
    """The queries, keys and values of one layer of a backbone (by default the last), as it last read texts."""

    def __init__(self, backbone: Backbone, layer: int | None, heads: int) -> None:
        """Find the linear layers that make them, and check that each can be split into ``heads`` parts."""
        name = backbone.config.model
        layers = layers_of(backbone.model, name=name)
        if layer is not None and layer >= len(layers):
            raise InputError(f"teacher_layer is {layer}, but '{name}' has only layers 0 to {len(layers) - 1}")
        self._linear: list[nn.Module] = []
        for names in _ATTENTION_PARTS:
            modules = layers[-1 if layer is None else layer].named_modules()
            named = [module for path, module in modules if path.rpartition(".")[2] in names]
            if len(named) != 1:
                raise ModelError(
                    f"'{name}' ({type(backbone.model).__name__}) has no separate layers for queries, keys and values, "
                    "which the pretraining relations compares; use hidden_states or vectors"
                )
            if (width := int(cast(Any, named[0]).out_features)) % heads:
                raise InputError(
                    f"relation_heads is {heads}, but '{name}' has queries, keys or values of width {width}, which is "
                    "not a multiple of it; set another number"
                )
            self._linear += named
        self.vectors: list[Tensor] = []

    def listen(self) -> list[RemovableHandle]:
        """Keep them from now on; returns the hooks, for when that is to end."""
        self.vectors = [torch.empty(0)] * len(self._linear)

        def keep(layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                self.vectors[layer] = output

            return hook

        return [linear.register_forward_hook(keep(layer)) for layer, linear in enumerate(self._linear)]


def relation_divergence(
    student: tuple[Float[Tensor, "texts tokens student_dim"], Float[Tensor, "texts tokens student_dim"]],
    teacher: tuple[Float[Tensor, "texts tokens teacher_dim"], Float[Tensor, "texts tokens teacher_dim"]],
    mask: Bool[Tensor, "texts tokens"],
    *,
    heads: int,
) -> Float[Tensor, " texts"]:
    """How far the relations of a text's tokens differ from the teacher's: the mean KL divergence over heads and tokens.

    Each relation is softmax(A_h B_h^T / sqrt(d_h)) over the text's tokens, where A_h and B_h are the parts of the
    two given that belong to the relation head h, of width d_h. Wang et al., "MiniLMv2", ACL Findings 2021 (arXiv
    2012.15828), section 3, with A = B; of queries with keys it is attention: "MiniLM", NeurIPS 2020 (arXiv 2002.10957).
    """

    def log_relations(pair: tuple[Tensor, Tensor]) -> Tensor:  # [texts, heads, tokens, tokens]
        one, other = (vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2) for vectors in pair)
        scores = one @ other.transpose(2, 3) / one.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, None], NO_ATTENTION).log_softmax(dim=-1)

    target, predicted = log_relations(teacher), log_relations(student)
    by_token = (target.exp() * (target - predicted)).sum(dim=-1).mean(dim=1)
    return (by_token * mask).sum(dim=1) / mask.sum(dim=1)
