"""A BERT and its tokenizer with NumPy, from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import ModelError
from d2llm.core.json_values import read_model_json
from d2llm.models.engines.lean_layers import Arrays, attend, dense, gelu, norm
from d2llm.models.sources import find_model, fingerprint_model
from d2llm.models.tokens import TextReader
from d2llm.recipe import BackboneConfig

_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    *("max_position_embeddings", "type_vocab_size", "vocab_size"),
)
_TOKENS = ("pad_token", "eos_token", "unk_token")
_NOT_USED = ("pooler.", "cls.", "embeddings.position_ids")
_MODEL_FILE, _TOKENIZER_FILE = "model.safetensors", "tokenizer.json"
_WORDS, _LAYER, _PEFT = "embeddings.word_embeddings.weight", "encoder.layer.", "base_model.model."


class LeanTokenizer:
    """The part of the ``transformers`` tokenizer interface that ``TextReader`` uses to encode texts."""

    is_fast = True
    """It gives character offsets."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(folder / _TOKENIZER_FILE))
        self._tokenizer.no_padding()
        settings = read_model_json(folder / "tokenizer_config.json")
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

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


class LeanBert(TextReader):
    """A BERT and its tokenizer; ``open`` checks the files."""

    def __init__(
        self, config: BackboneConfig, location: str, sizes: Mapping[str, Any], tokenizer: LeanTokenizer
    ) -> None:
        self.config = config
        self.location = location
        self.tokenizer = cast(Any, tokenizer)
        self.query_model = None
        self.dim: int = sizes["hidden_size"]
        self.num_layers: int = sizes["num_hidden_layers"]
        self._num_heads: int = sizes["num_attention_heads"]
        self._eps = np.float32(sizes["layer_norm_eps"])
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._adapter: Arrays = {}
        self._words: Any = None

    @classmethod
    def open(cls, config: BackboneConfig, tokenizer_folder: Path, adapter: Arrays) -> LeanBert | None:
        """The model that ``config`` names, in a local folder, with an adapter under PEFT's names; None for other kinds.

        A student of a model with a large vocabulary may come without a tokenizer; then the model's own is used.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        location = find_model(config.model)
        folder = Path(location)
        if not (tokenizer_folder / _TOKENIZER_FILE).is_file():
            tokenizer_folder = folder
        if not (folder / _MODEL_FILE).is_file() or not (tokenizer_folder / _TOKENIZER_FILE).is_file():
            return None
        try:
            sizes = read_model_json(folder / "config.json")
            settings = read_model_json(tokenizer_folder / "tokenizer_config.json")
        except ModelError:
            return None
        plain = sizes.get("model_type") == "bert" and sizes.get("hidden_act") == "gelu"
        plain = plain and sizes.get("position_embedding_type", "absolute") == "absolute"
        plain = plain and not sizes.get("is_decoder") and "quantization_config" not in sizes
        plain = plain and all(isinstance(sizes.get(name), int) and sizes[name] > 0 for name in _SIZES)
        if not plain or not isinstance(sizes.get("layer_norm_eps"), float):
            return None
        if any(not isinstance(settings.get(name, ""), str | None) for name in _TOKENS) or not settings.get("pad_token"):
            return None
        depth = config.layers or sizes["num_hidden_layers"]
        limits = (config.max_query_tokens, config.max_passage_tokens)
        if depth > sizes["num_hidden_layers"] or max(limits) > sizes["max_position_embeddings"]:
            return None
        try:
            tokenizer = LeanTokenizer(tokenizer_folder)
        except Exception:  # noqa: BLE001 - tokenizers raises a plain one
            return None
        model = cls(config, location, sizes | {"num_hidden_layers": depth}, tokenizer)
        return model if model._load(folder / _MODEL_FILE, sizes, adapter) else None

    def _load(self, path: Path, sizes: Mapping[str, Any], adapter: Arrays) -> bool:
        """Read the weights and take the adapter; whether both have the expected names and shapes."""
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(path, "np")
        except (OSError, SafetensorError):
            return False
        names = {name.removeprefix("bert."): name for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        slices = {name: file.get_slice(named) for name, named in names.items() if not name.startswith(_NOT_USED)}
        if sizes["num_hidden_layers"] > len(slices) or sizes["hidden_size"] % sizes["num_attention_heads"]:
            return False
        shapes = _shapes(sizes)
        if {name: tuple(part.get_shape()) for name, part in slices.items()} != shapes:
            return False
        if not {part.get_dtype() for part in slices.values()} <= {"F32", "F16"}:
            return False
        self._words = slices.pop(_WORDS)  # only the rows of the texts' tokens are read
        num_layers = sum(name.endswith("intermediate.dense.weight") for name in shapes)
        unused = tuple(f"{_LAYER}{n}." for n in range(self.num_layers, num_layers))
        for name in slices:
            if not name.startswith(unused):
                self._arrays[name] = file.get_tensor(names[name]).astype(np.float32, copy=False)
        layers = {name.removeprefix(_PEFT).rpartition(".lora_")[0] for name in adapter}
        for layer in layers:
            down, up = (adapter.get(f"{_PEFT}{layer}.lora_{part}.weight") for part in "AB")
            weight = self._arrays.get(f"{layer}.weight")
            if weight is None or down is None or up is None or (up.shape[0], down.shape[1]) != weight.shape:
                return False
        self._adapter = adapter
        return len(adapter) == 2 * len(layers)

    def fingerprint_base(self) -> str:
        """Fingerprint of the pretrained weights, before any tuning."""
        return fingerprint_model(self.location)

    def states(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The states of the last layer for the tokens of one text."""
        words = np.concatenate([self._words[token : token + 1] for token in ids]).astype(np.float32, copy=False)
        arrays = self._arrays
        positions = arrays["embeddings.position_embeddings.weight"][: len(ids)]
        states = words + arrays["embeddings.token_type_embeddings.weight"][0] + positions
        states = self._norm("embeddings.LayerNorm", states)
        for index in range(self.num_layers):
            layer = f"{_LAYER}{index}."
            attended = self._dense(f"{layer}attention.output.dense", self._attention(f"{layer}attention.self.", states))
            states = self._norm(f"{layer}attention.output.LayerNorm", attended + states)
            inner = gelu(self._dense(f"{layer}intermediate.dense", states))
            states = self._norm(f"{layer}output.LayerNorm", self._dense(f"{layer}output.dense", inner) + states)
        return states

    def _attention(self, layer: str, states: NDArray[np.float32]) -> NDArray[np.float32]:
        query, key, value = (self._dense(layer + name, states) for name in ("query", "key", "value"))
        return attend(query, key, value, self._num_heads)

    def _dense(self, layer: str, states: NDArray[np.float32]) -> NDArray[np.float32]:
        result = dense(self._arrays, layer, states)
        down = self._adapter.get(f"{_PEFT}{layer}.lora_A.weight")
        if down is None:
            return result
        return result + states @ down.T @ self._adapter[f"{_PEFT}{layer}.lora_B.weight"].T

    def _norm(self, layer: str, states: NDArray[np.float32]) -> NDArray[np.float32]:
        return norm(self._arrays, layer, states, self._eps)


def _shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a BERT's weights, by name."""
    dim, inner = sizes["hidden_size"], sizes["intermediate_size"]
    rows = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    shapes: dict[str, tuple[int, ...]] = {f"embeddings.{k}_embeddings.weight": (sizes[v], dim) for k, v in rows.items()}
    norms = ["embeddings.LayerNorm"]
    dense = {f"attention.self.{name}": (dim, dim) for name in ("query", "key", "value")}
    dense |= {"attention.output.dense": (dim, dim), "intermediate.dense": (inner, dim), "output.dense": (dim, inner)}
    for layer in (f"{_LAYER}{index}." for index in range(sizes["num_hidden_layers"])):
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        for name, shape in dense.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")}
