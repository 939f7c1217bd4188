"""The mean of the tokens' states after the first and after the last layer."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.ops.pooling import mean_of_tokens
from d2llm.recipe.student import Pooling


class FirstLast(Pooling, kind="first_last"):
    """The mean of all tokens, after the first and after the last layer (WhiteningBERT, whitened or not)."""

    paper = "Huang et al., EMNLP Findings 2021, arXiv 2104.01767 (WhiteningBERT)"
    measured = (
        "before training, against the mean: smollm2 squad-sent .279 to .424, whitened to a third of the dimensions "
        "(WhiteningBERT) .557; minilm .793 to .773 "
        "([200 dev queries](log/2026-11.md#2026-11-30-more-methods-measured-and-retromae-and-bebr))"
    )
    reads_layers: ClassVar[bool] = True

    def check_model(self, model_config: Any, name: str) -> None:
        if not getattr(model_config, "num_hidden_layers", 0):
            raise InputError(f"'{name}' has no layers, which the pooling 'first_last' reads; set another pooling")

    def weigh(
        self,
        states: Float[Tensor, "batch tokens dim"],
        mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
        output: Any,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The mean of a token's states after the first and after the last layer.

        Huang et al., "WhiteningBERT: An Easy Unsupervised Sentence Embedding Approach", EMNLP Findings 2021, section 2.
        """
        return (output.hidden_states[1] + states) / 2

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        return mean_of_tokens(states, mask)
