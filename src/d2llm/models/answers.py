"""The answer to a yes/no question, from the last state of a causal LLM and two rows of its language-model head."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AnswerHead(nn.Module):
    """Logits of a few tokens only: no tensor of the vocabulary's size is ever made.

    It does what the model's own ``forward`` does between last state and logits: the linear layer with or without bias,
    the constant factor of some models (Cohere, Granite, Falcon-H1), the soft cap of others (Gemma).
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        config = language_model.config.get_text_config()
        self._linear = cast(nn.Linear, language_model.get_output_embeddings())
        self._scale = _scale(config)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        self._softcap: float | None = softcap

    def forward(self, states: Float[Tensor, "pairs dim"], token_ids: tuple[int, ...]) -> Float[Tensor, "pairs answers"]:
        """Logits of the tokens ``token_ids`` after each state, float32."""
        rows = torch.tensor(token_ids, device=states.device)
        bias = cast("Tensor | None", self._linear.bias)
        logits = nn.functional.linear(
            states.float(), self._linear.weight[rows].float(), None if bias is None else bias[rows].float()
        )
        logits = logits * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _scale(config: Any) -> float:
    """The constant factor of a model's logits."""
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type != "hyperclovax":  # the others divide by what they call so
        scaling = 1.0 / scaling
    return (
        scaling * (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    )
