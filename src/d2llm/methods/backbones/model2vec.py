"""Static token embeddings: a backbone that looks up one vector for each token and reads nothing in context."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from d2llm.core.errors import ModelError
from d2llm.core.json_values import read_model_json
from d2llm.models.sources import weights_folder
from d2llm.recipe import BackboneConfig


class Model2Vec(BackboneConfig, kind="model2vec"):
    """One vector for each token, whatever the tokens around it, in the format of model2vec (Model2Vec).

    Recognised by its config.json. ``d2llm distill-static`` makes one from another backbone. Set tuning to full or
    frozen: it has no layers to adapt.
    """

    paper = "Tulkens and van Dongen 2024, doi 10.5281/zenodo.17270888"
    costs = "encodes 47 to 50 times as fast as minilm"
    measured = (
        "from minilm, before training: squad-sent .801 to .722, banking77 .634 to .401, covidqa .462 to .442; trained: "
        ".726 against .792 ([one seed](recipes.md#static-vectors))"
    )

    @classmethod
    def load_model(cls, location: str, dtype: torch.dtype) -> PreTrainedModel:
        folder = weights_folder(location)
        settings = read_model_json(folder / "config.json")
        try:
            tensors = load_file(folder / "model.safetensors")
            embeddings = tensors["embeddings"].float()
            if "mapping" in tensors:  # many tokens share a vector
                embeddings = embeddings[tensors["mapping"].long()]
            if "weights" in tensors:
                embeddings = embeddings * tensors["weights"].float()[:, None]
        except Exception as error:
            raise ModelError(
                f"{folder / 'model.safetensors'} cannot be read as token embeddings in model2vec's format "
                f"({type(error).__name__}: {error}); save the model with model2vec 0.4 or later"
            ) from error
        settings |= {"hidden_dim": embeddings.shape[1], "vocab_size": embeddings.shape[0]}
        return StaticModel(StaticConfig(**settings), embeddings.to(dtype))


class StaticConfig(PreTrainedConfig):
    """Configuration with the names that model2vec has in its files."""

    model_type = Model2Vec.kind

    def __init__(self, hidden_dim: int = 0, vocab_size: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.hidden_dim = hidden_dim
        self.vocab_size = vocab_size
        self.hidden_size = hidden_dim


class StaticModel(PreTrainedModel):
    """The vector of each token as its state."""

    config_class = StaticConfig

    def __init__(self, config: StaticConfig, embeddings: Tensor) -> None:
        super().__init__(config)
        self.embeddings = nn.Parameter(embeddings)

    def forward(self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None = None) -> BaseModelOutput:
        """States [batch, tokens, dim]; the mask makes no difference to them."""
        del attention_mask
        return BaseModelOutput(last_hidden_state=cast(Any, nn.functional.embedding(input_ids, self.embeddings)))

    def set_attn_implementation(self, *_: Any, **__: Any) -> None:
        """Do nothing: there is no attention."""
