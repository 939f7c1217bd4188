"""Tokens count as much as they attend to themselves in one head of the model (Ditto)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.tokens import TextKind
from d2llm.ops.pooling import mean_of_tokens
from d2llm.recipe.student import Pooling

_BATCH = 16


class Ditto(Pooling, kind="ditto"):
    """Tokens count as much as they attend to themselves in one head (Ditto).

    Attention is computed in its plain form, because the fused one does not give its weights.

    Chen et al., "Ditto: A Simple and Efficient Approach to Improve Sentence Embeddings", EMNLP 2023, section 3.
    """

    paper = "Chen et al., EMNLP 2023, arXiv 2305.10786"
    costs = "plain instead of fused attention; finding a head (``methods.poolings.ditto.choose_head``)"
    measured = (
        "before training, against the mean: minilm loses .04 to .05 (layer 0, head 1), smollm2 wins .01 on one set and "
        "loses .01 on the other (layer 29, head 1; [200 dev "
        "queries](log/2026-11.md#2026-11-25-ditto-before-any-training))"
    )
    reads_attention: ClassVar[bool] = True

    layer: int = Field(ge=0)
    """The layer, counted from 0, such as 0 for BERT-base."""
    head: int = Field(ge=0)
    """The head in it, counted from 0, such as 9 for BERT-base."""

    def check_model(self, model_config: Any, name: str) -> None:
        sizes = [getattr(model_config, size, None) for size in ("num_hidden_layers", "num_attention_heads")]
        if None in sizes:
            raise InputError(
                f"'{name}' has no attention, so pooling 'ditto' cannot weigh its tokens; set another pooling"
            )
        for index, size, what in zip((self.layer, self.head), sizes, ("layer", "head"), strict=True):
            if size is not None and index >= size:
                raise InputError(
                    f"pooling.{what} is {index}, but '{name}' has only 0 to {size - 1}; it is counted from 0"
                )

    def weigh(
        self,
        states: Float[Tensor, "batch tokens dim"],
        mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
        output: Any,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The states, each times its weight A_ii / mean_j A_jj in the head.

        A_ij is the attention of token i to token j, and the mean is over a text's real tokens. So the plain mean of
        these states is the weighted mean.
        """
        diagonal = attention_to_itself(output.attentions[self.layer], mask)[:, self.head]
        mean = diagonal.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return states * (diagonal / mean.clamp(min=1e-30)).unsqueeze(-1)

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        return mean_of_tokens(states, mask)


def attention_to_itself(
    attention: Float[Tensor, "batch heads tokens tokens"],
    mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch heads tokens"]:
    """How much each token attends to itself in every head of a layer; 0 for padding."""
    return torch.diagonal(attention, dim1=2, dim2=3).float().masked_fill(~mask.bool()[:, None], 0.0)


def choose_head(backbone: Backbone, queries: Sequence[str], passages: Sequence[str]) -> Ditto:
    """The head whose weights make the cosine rank each query's own passage best.

    Every head is tried, by the mean reciprocal rank of ``passages[i]`` among all passages for ``queries[i]``, as in the
    paper.

    Args:
        backbone: a backbone with the pooling ``ditto`` and any head.
        queries: queries to choose by, which the result should not be measured on; fifty are enough for a rough choice.
        passages: for each query a passage that answers it, and after them any others.

    Raises:
        InputError: the backbone has another pooling, there are no queries, or fewer passages than queries.
    """
    if backbone.pooling.weighing is None:
        raise InputError("only a backbone with the pooling 'ditto' gives its attention; set pooling and any head")
    if not queries or len(passages) < len(queries):
        raise InputError(f"{len(queries)} queries need as many passages or more, not {len(passages)}, and at least one")
    by_query, by_passage = _vectors_by_head(backbone, queries, "query"), _vectors_by_head(backbone, passages, "passage")
    scores = by_query @ by_passage.transpose(2, 3)  # [layers, heads, queries, passages]
    paired = torch.diagonal(scores, dim1=2, dim2=3).unsqueeze(-1)
    ranks = (scores > paired).sum(dim=3) + 1
    layer, head = divmod(int((1 / ranks).mean(dim=2).argmax()), scores.shape[1])
    return Ditto(layer=layer, head=head)


def _vectors_by_head(
    backbone: Backbone, texts: Sequence[str], kind: TextKind
) -> Float[Tensor, "layers heads texts dim"]:
    """Unit vectors of texts, pooled by the weights of every head."""
    vectors: list[Tensor] = []
    with torch.inference_mode():
        for batch in batched(texts, _BATCH):
            ids, mask = backbone.pad(backbone.tokenize(batch, kind).ids)
            output: Any = backbone.model(input_ids=ids, attention_mask=mask.long(), output_attentions=True)
            weights = torch.stack([attention_to_itself(attention, mask) for attention in output.attentions])
            pooled = torch.einsum("lbht,btd->lhbd", weights, output.last_hidden_state.float())
            vectors.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(vectors, dim=2)
