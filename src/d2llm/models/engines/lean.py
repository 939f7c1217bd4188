"""A BERT and its tokenizer without ``transformers``, for a process that only encodes a few texts, such as a CLI search.

Importing ``transformers`` and loading a small model with it takes longer than everything else in such a search. This is
the same encoder, with the same operations and parameter names, so a student's adapter fits it, and the same tokenizer,
loaded from the file in the student's folder. Only plain BERT models are supported: ``open_lean`` returns None for all
others, which are then loaded with ``transformers``. A test checks that both give the same states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.models.sources import load_tensors

_SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"}
_LIMITS = {"max_position_embeddings", "type_vocab_size", "vocab_size", "layer_norm_eps"}
_NOT_USED = ("pooler.", "cls.", "embeddings.position_ids")
_MODEL_FILE, _TOKENIZER_FILE = "model.safetensors", "tokenizer.json"


class LeanTokenizer:
    """The part of the ``transformers`` tokenizer interface that ``Backbone`` uses to encode texts."""

    is_fast = True
    """It gives character offsets."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(folder / _TOKENIZER_FILE))
        self._tokenizer.no_padding()
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.eos_token_id = self._id(settings.get("eos_token"))
        self.pad_token_id = self._id(settings["pad_token"])
        self.unk_token_id = self._id(settings.get("unk_token"))

    def __call__(
        self,
        texts: Sequence[str],
        *,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> dict[str, list[list[Any]]]:
        """Token ids of texts, cut to ``max_length`` if ``truncation`` is set, and the tokens' spans if requested."""
        del verbose
        if truncation:
            self._tokenizer.enable_truncation(max_length)
        else:
            self._tokenizer.no_truncation()
        # Only encode_batch computes the spans.
        encode = self._tokenizer.encode_batch if return_offsets_mapping else self._tokenizer.encode_batch_fast
        encodings: list[Any] = encode(list(texts), add_special_tokens=add_special_tokens)
        encoded = {"input_ids": [encoding.ids for encoding in encodings]}
        return encoded | {"offset_mapping": [e.offsets for e in encodings]} if return_offsets_mapping else encoded

    def save_pretrained(self, folder: Path) -> None:
        """Not supported: a student loaded with ``lean=True`` lacks some of the files to save.

        Raises:
            InputError: always.
        """
        raise InputError(f"{folder}: this student was loaded only to encode texts; load it with lean=False to save it")

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


class _Linear(nn.Linear):
    """A layer without random initialisation, because its weights come from a file."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class _Embedding(nn.Embedding):
    """A layer without random initialisation, because its weights come from a file."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class LeanBert(nn.Module):
    """A BERT encoder without dropout that returns the last layer's states. Module names match the weights' names."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": _Embedding(config.vocab_size, dim),
                "position_embeddings": _Embedding(config.max_position_embeddings, dim),
                "token_type_embeddings": _Embedding(config.type_vocab_size, dim),
                "LayerNorm": nn.LayerNorm(dim, eps=eps),
            }
        )
        layers = (_Layer(dim, config.intermediate_size, eps) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> SimpleNamespace:
        """``last_hidden_state`` [batch, tokens, dim]; tokens with mask 0 are ignored."""
        parts = self.embeddings
        types = parts["token_type_embeddings"](torch.zeros_like(input_ids))
        positions = parts["position_embeddings"](torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        states = parts["LayerNorm"](parts["word_embeddings"](input_ids) + types + positions)
        key_mask = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None, :]
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            states = layer(states, key_mask, self.config.num_attention_heads)
        return SimpleNamespace(last_hidden_state=states)


class _Layer(nn.Module):
    """Attention and a feed-forward layer, each followed by a residual sum and a LayerNorm."""

    def __init__(self, dim: int, inner: int, eps: float) -> None:
        super().__init__()
        projections = nn.ModuleDict({name: _Linear(dim, dim) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _residual(dim, dim, eps)})
        self.intermediate = nn.ModuleDict({"dense": _Linear(dim, inner)})
        self.output = _residual(inner, dim, eps)

    def forward(
        self, states: Float[Tensor, "batch tokens dim"], key_mask: Tensor | None, num_heads: int
    ) -> Float[Tensor, "batch tokens dim"]:
        project = cast(nn.ModuleDict, self.attention["self"])
        shape = (*states.shape[:2], num_heads, -1)
        query, key, value = (project[name](states).view(shape).transpose(1, 2) for name in ("query", "key", "value"))
        scale = 1 / math.sqrt(query.shape[-1])
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, scale=scale)
        states = _add(self.attention["output"], attended.transpose(1, 2).reshape(states.shape), states)
        return _add(self.output, functional.gelu(self.intermediate["dense"](states)), states)


class LeanParts(NamedTuple):
    """The encoder and its tokenizer."""

    model: LeanBert
    tokenizer: LeanTokenizer


def open_lean(location: str, tokenizer_folder: Path, *, dtype: torch.dtype) -> LeanParts | None:
    """Load the model at ``location`` (a local folder) and a student's tokenizer; None if they are of another kind.

    A student of a model with a large vocabulary may come without a tokenizer; then the model's own is used.

    Raises:
        ModelError: the weights cannot be read.
    """
    folder = Path(location)
    if not (tokenizer_folder / _TOKENIZER_FILE).is_file():
        tokenizer_folder = folder
    if not (folder / _MODEL_FILE).is_file() or not (tokenizer_folder / _TOKENIZER_FILE).is_file():
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings: dict[str, Any] = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    plain = config.get("model_type") == "bert" and config.get("hidden_act") == "gelu"
    plain = plain and config.get("position_embedding_type", "absolute") == "absolute"
    plain = plain and not config.get("is_decoder") and "quantization_config" not in config
    plain = plain and config.keys() >= _SIZES | _LIMITS and isinstance(settings.get("pad_token"), str)
    if not plain:
        return None
    model = LeanBert(SimpleNamespace(**config))
    state, expected = _weights(folder), model.state_dict()
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in expected.items()}:
        return None
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return LeanParts(model, LeanTokenizer(tokenizer_folder))


def _weights(folder: Path) -> dict[str, Tensor]:
    """The encoder's weights in the file, without the prefix that models with a head add to their names."""
    state = load_tensors(folder / _MODEL_FILE, remedy="restore the model's folder")
    named = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(_NOT_USED)}


def _residual(inner: int, dim: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": _Linear(inner, dim), "LayerNorm": nn.LayerNorm(dim, eps=eps)})


def _add(parts: nn.Module, change: Tensor, states: Tensor) -> Tensor:
    """LayerNorm of the states plus a dense layer of the change."""
    named = cast(nn.ModuleDict, parts)
    return named["LayerNorm"](named["dense"](change) + states)
