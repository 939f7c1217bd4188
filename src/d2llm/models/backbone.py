"""The pretrained language model that encodes each text on its own: tokens in, last-layer states out.

With two adapters, queries and passages are read with different low-rank changes of the same weights, after Jung et al.,
"Semi-Siamese Bi-encoder Neural Ranking Model Using Lightweight Fine-Tuning", WWW 2022 (arXiv 2110.14943). There the
adapters of the attention's queries are shared and those of its values are not; here nothing is shared but the backbone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import InputError, ModelError
from d2llm.core.files import MANIFEST_NAME as MANIFEST
from d2llm.core.inputs import texts_of
from d2llm.core.types import Span, is_text
from d2llm.models.depths import final_module, read_depths
from d2llm.models.device import choose_device, choose_dtype, use_plain_attention_on_cpu
from d2llm.models.engines.lean import open_lean
from d2llm.models.length_limit import check_limits
from d2llm.models.lora import (
    adapter_state,
    attach_lora,
    has_adapters,
    join_adapters,
    load_adapter_state,
    merge_adapter,
    merged_state_dict,
    own_linear_weights,
    sharing_copy,
    train_adapters_only,
)
from d2llm.models.sources import (
    STATIC_MODEL_TYPE,
    find_model,
    find_model_file,
    fingerprint_model,
    load_pretrained,
    load_tokenizer,
    model_type,
)
from d2llm.models.token_vectors import TokenVectors
from d2llm.ops.batching import pad_right
from d2llm.ops.pooling import to_right_padding
from d2llm.ops.token_bounds import bounded_ends
from d2llm.recipe import AutoPooling, BackboneConfig, Lora, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TextKind = Literal["query", "passage"]

TOKENIZING = Lock()
"""Held while a student's tokenizer runs: its truncation setting is state that all threads share."""
_QUERY = "query:"  # before the names of the tensors of the queries' adapter, if there are two


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of each text, with special tokens; ``truncated`` has the indices of those over the limit.

    If queries have an adapter of their own, the ids of their tokens are ~id, below 0, so that wherever texts are read
    together, each row says which adapter reads it.

    ``counts`` has the number of tokens of each text, where an id stands for a whole text (``models.remote.backbone``).
    """

    ids: list[list[int]]
    truncated: tuple[int, ...] = ()
    counts: tuple[int, ...] | None = None

    @property
    def num_truncated(self) -> int:
        """How many texts were truncated."""
        return len(self.truncated)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self.ids] if self.counts is None else [*self.counts]


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Vectors of n texts, the indices of those cut to the length limit, and the tokens read, in total and per text.

    ``tokens`` are the vectors of the texts' tokens, if they were requested (``Student.encode_with_tokens``).
    """

    vectors: Float32[np.ndarray, "texts dim"]
    truncated: tuple[int, ...]
    num_tokens: int
    lengths: tuple[int, ...] = ()
    tokens: TokenVectors | None = None

    @property
    def num_truncated(self) -> int:
        """How many texts were truncated."""
        return len(self.truncated)

    @classmethod
    def join(cls, parts: Sequence[EncodedTexts], dim: int) -> EncodedTexts:
        """The texts of all parts, which have vectors [n, dim], in order."""
        starts = np.cumsum([0, *(len(part.vectors) for part in parts)]).tolist()
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return cls(
            np.concatenate([np.zeros((0, dim), np.float32), *(part.vectors for part in parts)]),
            tuple(start + place for start, part in zip(starts, parts, strict=False) for place in part.truncated),
            sum(part.num_tokens for part in parts),
            tuple(length for part in parts for length in part.lengths),
            TokenVectors(*(np.concatenate(each) for each in zip(*tokens, strict=True))) if tokens else None,
        )


class Backbone(nn.Module):
    """Any decoder or encoder of ``transformers`` without its language-model head.

    ``compute_dtype`` is the number format of matrix products; trained weights stay in float32.

    Attributes:
        pooling: what its states are for; it may weigh them by the model's attention.
        own: the pooling without weights that is the backbone's own (``Pooling.own``), never ``auto``.
    """

    def __init__(
        self,
        config: BackboneConfig,
        pooling: Pooling | None = None,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        lean_tokenizer: Path | None = None,
        auto_pooling: str | None = None,
    ) -> None:
        """Load the weights that ``config.model`` names, for a pooling of their states, by default ``auto``.

        ``auto_pooling`` is the kind of pooling that ``auto`` stands for; by default, the model's folder says it. If
        ``lean_tokenizer`` is the folder of a tokenizer, the model is loaded without ``transformers`` where possible
        (``models.engines.lean``): the backbone can then encode texts, but not be trained, saved or exported.

        Raises:
            ModelNotFoundError: no usable weights there.
            ModelError: the model is neither a plain encoder nor a plain decoder.
            InputError: a token limit exceeds what the model can read, ``layers`` exceeds its number of layers, the
                pooling does not fit, ``bidirectional`` is set for an encoder, or tuning is "lora" and it has no layers.
        """
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.location = find_model(config.model)
        self.pooling = pooling or AutoPooling()
        weight_dtype = torch.float32 if config.tuning.kind == "full" else compute_dtype
        lean = None
        # The lean model gives no attention, and is no decoder.
        if lean_tokenizer is not None and self.pooling.weighing is None and not config.bidirectional:
            lean = open_lean(self.location, lean_tokenizer, dtype=weight_dtype)
        self.is_lean = lean is not None
        if lean is not None:
            # Typed as the usual classes; the lean ones have every method that encoding calls.
            self.tokenizer = cast("PreTrainedTokenizerBase", lean.tokenizer)
            self.model = cast("PreTrainedModel", lean.model.to(device).eval())
        else:
            self.tokenizer = load_tokenizer(self.location)
            model = _load_model(self.location, weight_dtype)
            self.model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        self.model.requires_grad_(False)
        if config.tuning.kind == "lora" and self.model.config.model_type == STATIC_MODEL_TYPE:
            raise InputError(
                f"'{config.model}' has token embeddings and no layers, so LoRA has nothing to adapt; set tuning to "
                "full or frozen"
            )
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"'{config.model}' is an encoder-decoder model ({type(self.model).__name__}) whose encoder cannot be "
                "loaded alone; a backbone is an encoder, a decoder, or the encoder of a T5 model: use another model"
            )
        if config.layers is not None:
            keep_layers(self.model, config.layers, name=config.model)
        if config.bidirectional:
            read_both_ways(self.model, name=config.model)
        if (weighing := self.pooling.weighing) is not None:
            weighing.check_model(self.model.config, config.model)
            self.model.set_attn_implementation("eager")  # fused attention does not give its weights
        if hasattr(self.model.config, "use_cache"):
            self.model.config.use_cache = False  # each text is read once, so no key-value cache is needed
        self.query_model = sharing_copy(self.model) if config.has_two_adapters else None
        self._merged_adapter: dict[str, Tensor] = {}
        self._final: list[nn.Module] = []  # what follows the last layer: in a list, as it is a part of the model
        self.own = self.pooling.own
        if isinstance(self.own, AutoPooling):
            self.own = Pooling.of(auto_pooling or _auto_pooling(config, self.location, self.model.config))
        limits = {"max_query_tokens": config.max_query_tokens, "max_passage_tokens": config.max_passage_tokens}
        check_limits(self.model.config, config.model, limits)

    @classmethod
    def load(
        cls,
        config: BackboneConfig,
        pooling: Pooling | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Backbone:
        """Load a backbone, by default on the fastest device and in the fastest number format of this machine.

        With the section ``remote`` it is a ``RemoteBackbone``.
        """
        chosen = choose_device(device)
        return open_backbone(config, pooling, device=chosen, compute_dtype=choose_dtype(chosen, dtype))

    @property
    def reads_tokens(self) -> bool:
        """Whether there are states of tokens; a remote backbone has vectors of whole texts only."""
        return True

    @property
    def texts_at_once(self) -> int | None:
        """How many texts to read before progress is reported, if that is not left to the batches."""
        return None

    def require_tokens(self, purpose: str) -> None:
        """Raise an ``InputError`` if there are no states of tokens, which ``purpose`` needs."""
        if not self.reads_tokens:
            raise InputError(
                f"{purpose} needs the states of tokens, and '{self.config.model}' is an embedding API, which gives one "
                "vector for each text; use a student with a local backbone"
            )

    def require_one_adapter(self, purpose: str) -> None:
        """Raise an ``InputError`` if queries and passages are read with weights of their own (``purpose`` has one)."""
        if self.query_model is not None:
            raise InputError(
                f"{purpose} has one set of weights, but this student reads queries and passages with adapters of their "
                "own; keep it as a student with adapters (merge=False, engine torch)"
            )

    @property
    def dim(self) -> int:
        """Width of the states."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of layers; 0 for a model without layers."""
        return int(getattr(self.model.config, "num_hidden_layers", 0))

    @property
    def state_size(self) -> int:
        """How many numbers the states of a token have: ``dim`` for each layer."""
        return self.dim * self.num_layers

    def cut(self, depth: int) -> None:
        """Remove all layers but the first ``depth``, in place.

        Raises:
            InputError: there are not so many, or the backbone was loaded with ``lean_tokenizer``.
        """
        if self.is_lean:
            raise InputError("this student was loaded only to encode texts; load it with lean=False to cut it")
        modules: set[str] = set()
        for prefix, model in self._models.items():
            keep_layers(model, depth, name=self.config.model)
            modules |= {prefix + name for name, _ in model.named_modules()}
        merged = self._merged_adapter.items()
        self._merged_adapter = {name: tensor for name, tensor in merged if name.rpartition(".")[0] in modules}

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.model.parameters()).device

    def fingerprint_base(self) -> str:
        """Fingerprint of the pretrained weights, before any tuning."""
        return fingerprint_model(self.location)

    def prepare_training(self, *, seed: int = 0) -> None:
        """Make trainable what ``config.tuning`` says: adapters, everything, or nothing. Adapters that are there stay.

        Raises:
            InputError: the backbone was loaded with ``lean_tokenizer``.
        """
        if self.is_lean:
            raise InputError("this student was loaded only to encode texts; load it with lean=False to train it")
        if isinstance(self.config.tuning, Lora) and not has_adapters(self.model):
            for number, model in enumerate(self._models.values()):
                attach_lora(model, self.config.tuning, seed=seed + number)
        elif self.config.tuning.kind == "full":
            self.model.requires_grad_(True)
        for model in self._models.values():
            use_plain_attention_on_cpu(model)

    def train(self, mode: bool = True) -> Backbone:
        """Switch training mode; with LoRA, only the adapters' dropout is switched on."""
        super().train(mode)
        if self.config.tuning.kind != "full":
            for model in self._models.values():
                train_adapters_only(model, mode)
        return self

    @property
    def _models(self) -> dict[str, PreTrainedModel]:
        """The model, and that of queries if they have their own, by the prefix of the names of their adapters."""
        return {"": self.model} | ({} if self.query_model is None else {_QUERY: self.query_model})

    def _adapters(self, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The adapter of each of the models in a tuned state, by prefix."""
        return {
            prefix: {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(_QUERY) == (prefix == _QUERY)
            }
            for prefix in self._models
        }

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changed since the pretrained weights: the adapter's tensors, all weights, or nothing."""
        if self.config.tuning.kind == "lora":
            attached = {
                p + n: tensor for p, model in self._models.items() for n, tensor in adapter_state(model).items()
            }
            return join_adapters(self._merged_adapter, attached)
        if self.config.tuning.kind == "full":
            return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        return {}

    def load_tuned_state(self, state: dict[str, Tensor], *, merge: bool) -> None:
        """Load tensors made by ``tuned_state`` into the attached adapters, or merge them permanently into the weights.

        Raises:
            ModelError: the tensors belong to another architecture.
        """
        if self.config.tuning.kind == "full":
            try:
                self.model.load_state_dict(state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ModelError(
                    f"the tuned weights do not fit '{self.config.model}' ({reason}...); use the model that was tuned"
                ) from error
        elif self.config.tuning.kind == "lora":
            if self.query_model is not None and merge:
                own_linear_weights(self.query_model)
            for prefix, adapter in self._adapters(state).items():
                (merge_adapter if merge else load_adapter_state)(self._models[prefix], adapter)
            if merge:
                self._merged_adapter = join_adapters(self._merged_adapter, state)

    def save_merged(self, folder: Path) -> None:
        """Write the configuration and all weights, adapters merged, in the format of the plain model.

        Raises:
            InputError: queries and passages have adapters of their own.
        """
        self.require_one_adapter("a copy with all weights merged")
        self.model.config.save_pretrained(folder)
        weights = {name: tensor.contiguous() for name, tensor in merged_state_dict(self.model).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def tokenize(
        self, texts: Sequence[str], kind: TextKind, *, prefix: str | None = None, limit: int | None = None
    ) -> TokenizedTexts:
        """Token ids of each text with its prefix, cut to the limit; cuts are counted. Thread-safe.

        If ``prefix`` or ``limit`` is None, the configuration's value for the kind is used, as in training.

        Raises:
            InputError: ``texts`` is a single string, or a text holds a lone surrogate.
        """
        prefixed, limit = self._prepare(texts, kind, prefix, limit)
        if not prefixed:
            return TokenizedTexts([])
        # Only texts over the limit are tokenized twice, so that the tokenizer keeps its closing special token.
        with TOKENIZING:
            ids = cast("list[list[int]]", self.tokenizer(prefixed, truncation=False, verbose=False)["input_ids"])
            too_long = [index for index, row in enumerate(ids) if len(row) > limit]
            if too_long:
                cut = self.tokenizer([prefixed[index] for index in too_long], truncation=True, max_length=limit)
                for index, row in zip(too_long, cast("list[list[int]]", cut["input_ids"]), strict=True):
                    ids[index] = row
        # A tokenizer without special tokens returns no token for an empty text, but a model needs at least one.
        fallback = self.tokenizer.eos_token_id or self.tokenizer.pad_token_id or 0
        rows = [row or [cast(int, fallback)] for row in ids]
        if kind == "query" and self.query_model is not None:
            rows = [[~token for token in row] for row in rows]
        return TokenizedTexts(rows, tuple(too_long))

    def _prepare(
        self, texts: Sequence[str], kind: TextKind, prefix: str | None, limit: int | None
    ) -> tuple[list[str], int]:
        """The texts with their prefix, checked, and their limit in tokens (``tokenize``)."""
        texts = texts_of(texts)
        if prefix is None:
            prefix = self.config.query_prefix if kind == "query" else self.config.passage_prefix
        if limit is None:
            limit = self.config.max_query_tokens if kind == "query" else self.config.max_passage_tokens
        _check_text(prefix)
        return [prefix + text for text in texts], limit

    def num_tokens(self, text: str) -> int:
        """How many tokens a text has, with special tokens.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        _check_text(text)
        with TOKENIZING:
            ids = cast("list[list[int]]", self.tokenizer([text], truncation=False, verbose=False)["input_ids"])
        return len(ids[0])

    def first_own_tokens(self, texts: Sequence[str], prefix: str) -> list[int]:
        """The place of each text's first token in its ids with this prefix; a token of both belongs to the text.

        Raises:
            InputError: the tokenizer gives no character offsets.
        """
        texts_offsets = _offsets(self.tokenizer, [prefix + text for text in texts_of(texts)])
        return [
            next((place for place, (_, end) in enumerate(offsets) if end > len(prefix)), len(offsets))
            for offsets in texts_offsets
        ]

    def token_ends(self, text: str) -> list[int]:
        """Where the tokens of a text end, in characters, without prefix and special tokens (``token_ends``)."""
        return token_ends(self.tokenizer, text)

    def token_places(self, text: str, num_tokens: int, kind: TextKind = "passage") -> list[Span]:
        """Character spans in a text, by default a passage, of the ``num_tokens`` tokens of ``tokenize``.

        Needs a fast tokenizer. The span of a special token is empty.
        """
        prefix = self.config.query_prefix if kind == "query" else self.config.passage_prefix
        (offsets,) = _offsets(self.tokenizer, [prefix + text], max_tokens=num_tokens)
        return [(start - len(prefix), end - len(prefix)) for start, end in offsets]

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """Token ids as one right-padded tensor, and the mask of real tokens."""
        return pad_right(ids, cast(int, self.tokenizer.pad_token_id or 0), self.device)

    def forward(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """States of the last layer and their mask, right-padded regardless of the input's padding."""
        (states,), mask = self.states_at(token_ids, mask, ())
        return states, mask

    def states_at(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], depths: Sequence[int]
    ) -> tuple[list[Float[Tensor, "batch tokens dim"]], Bool[Tensor, "batch tokens"]]:
        """States after the first ``depths`` layers, then those of the last layer, and their mask (``models.depths``).

        Raises:
            ModelError: the states of this architecture cannot be read after fewer layers.
        """
        token_ids, mask = to_right_padding(token_ids, mask)
        if self.query_model is None:
            return self._read(self.model, token_ids, mask, depths), mask
        is_query = token_ids[:, 0] < 0
        token_ids = torch.where(token_ids < 0, ~token_ids, token_ids)
        models = (self.model, ~is_query), (self.query_model, is_query)
        read = [(rows, self._read(model, token_ids[rows], mask[rows], depths)) for model, rows in models if rows.any()]
        together = [states.new_zeros(*token_ids.shape, self.dim) for states in read[0][1]]
        for rows, parts in read:
            for states, part in zip(together, parts, strict=True):
                states[rows] = part
        return together, mask

    def _read(
        self,
        model: PreTrainedModel,
        token_ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        depths: Sequence[int],
    ) -> list[Float[Tensor, "batch tokens dim"]]:
        def read() -> Tensor:
            return last_states(model, token_ids, mask, self.pooling.weighing)

        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            if not depths:
                return [read()]
            layers = layers_of(model, name=self.config.model)
            if not self._final:
                self._final.append(final_module(model, layers, read, name=self.config.model))
            return read_depths(layers, self._final[0], depths, read)

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """The backbone's own pooling, in float32."""
        return self.own.pool(states.float(), mask)


def last_states(
    model: Any,
    token_ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    weighing: Pooling | None,
) -> Float[Tensor, "batch tokens dim"]:
    """States of a model's last layer, weighed by a pooling that reads its attention, if there is one."""
    if weighing is None:
        return model(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
    output = model(input_ids=token_ids, attention_mask=mask.long(), output_attentions=True)
    return weighing.weigh(output.last_hidden_state, mask, output.attentions)


def open_backbone(
    config: BackboneConfig,
    pooling: Pooling | None = None,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    lean_tokenizer: Path | None = None,
    auto_pooling: str | None = None,
    student: Path | None = None,
) -> Backbone:
    """The backbone that a configuration describes; the arguments are those of ``Backbone``.

    ``student`` is the folder of the student that it belongs to, if it was saved.
    """
    if config.remote is None:
        return Backbone(
            config,
            pooling,
            device=device,
            compute_dtype=compute_dtype,
            lean_tokenizer=lean_tokenizer,
            auto_pooling=auto_pooling,
        )
    from d2llm.models.remote.backbone import RemoteBackbone

    if student is None:
        return RemoteBackbone(config, device=device, compute_dtype=compute_dtype)
    section = f"{student / MANIFEST}: config.backbone"
    return RemoteBackbone(config, device=device, compute_dtype=compute_dtype, tokenizer=student, section=section)


def _check_text(text: str) -> None:
    if not is_text(text):
        raise InputError(f"{text[:100]!r}: is not valid Unicode text; write it as UTF-8")


def token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where the tokens of a text end, in characters, without special tokens; their number is the text's length.

    What the vocabulary lacks, or the tokenizer leaves out, counts as many tokens as it may be for a model that reads it
    (``ops.token_bounds``): long strings of letters, emoji, blank lines.

    Raises:
        InputError: the tokenizer gives no character offsets.
    """
    tokens = _offsets(tokenizer, [text], add_special_tokens=False)[0]
    (ids,) = tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"]
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    return bounded_ends(text, tokens, [token == unknown for token in ids])


def _offsets(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
) -> list[list[Span]]:
    """The span of each token of each text, cut to ``max_tokens``, in characters; that of a special token is empty."""
    try:
        with TOKENIZING:
            encoded = tokenizer(
                texts,
                truncation=max_tokens is not None,
                max_length=max_tokens,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
    except NotImplementedError as error:
        raise InputError(
            "this tokenizer gives no character offsets, so its tokens cannot be counted; name another tokenizer"
        ) from error
    return cast("list[list[Span]]", encoded["offset_mapping"])


def search_query_tokens(config: BackboneConfig) -> int:
    """How many tokens of a query a search reads: as many as of a passage, even if training read fewer.

    The backbone encodes both in the same way, and queries of the usual length keep their vectors (docs/log).
    """
    return max(config.max_query_tokens, config.max_passage_tokens)


def keep_layers(model: nn.Module, layers: int | Sequence[int], *, name: str) -> None:
    """Remove all layers of a model but the first ``layers``, or but those of these numbers, in place.

    Raises:
        InputError: the model (``name`` in the message) has fewer layers.
        ModelError: its layers are not a single list of modules.
    """
    config = cast(Any, model).config
    stack = layers_of(model, name=name)
    total = len(stack)
    kept = range(layers) if isinstance(layers, int) else layers
    if kept[0] > 0 and any("relative_attention_bias" in part for part, _ in stack[0].named_parameters()):
        raise InputError(f"layers leaves out layer 0 of '{name}', which has the positions of all its layers; keep it")
    if kept[-1] >= total:
        if isinstance(layers, int):
            raise InputError(f"layers is {layers}, but '{name}' has {total}; set layers to {total} or less")
        raise InputError(f"layers names layer {kept[-1]}, but '{name}' has only layers 0 to {total - 1}")
    for number in reversed(range(total)):
        if number not in kept:
            del stack[number]
    config.num_hidden_layers = len(stack)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number] for number in kept]


def read_both_ways(model: nn.Module, *, name: str) -> None:
    """Let every token of a decoder attend to all tokens of its text, in place.

    BehnamGhader et al., "LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders", COLM 2024 (arXiv
    2404.05961), section 2, the first of three steps.

    Raises:
        InputError: the model (``name`` in the message) already reads so.
        ModelError: its attention cannot be changed in this way.
    """
    config = cast(Any, model).config
    if getattr(config, "is_causal", True) and _sees_what_follows(model):  # a student's weights say that they are not
        raise InputError(f"'{name}' is no decoder: its tokens attend to all others already; delete bidirectional")
    config.is_causal = False  # from it, transformers makes the mask
    for module in model.modules():
        if hasattr(module, "is_causal"):
            cast(Any, module).is_causal = False  # and from these what fused attention does without one
    if not _sees_what_follows(model):
        raise ModelError(
            f"the attention of '{name}' ({type(model).__name__}) cannot be made bidirectional; use a decoder such as "
            "Llama, Mistral, Qwen or Gemma, or delete bidirectional"
        )


def _sees_what_follows(model: nn.Module) -> bool:
    """Whether a text's first state depends on its last token."""
    device = next(model.parameters()).device
    ids = torch.tensor([[3, 3, 3], [3, 3, 4]], device=device)
    with torch.no_grad():
        states = [model(input_ids=each[None], attention_mask=torch.ones_like(each[None])) for each in ids]
    first, other = (each.last_hidden_state[0, 0].float() for each in states)
    return not torch.allclose(first, other, rtol=1e-4, atol=1e-6)


def layers_of(model: nn.Module, *, name: str) -> nn.ModuleList:
    """The layers of a model (``name`` in the message).

    Raises:
        ModelError: they are not a single list of modules.
    """
    total = int(cast(Any, model).config.num_hidden_layers)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(stacks) != 1:
        raise ModelError(f"'{name}' ({type(model).__name__}) has no single list of layers to cut; leave layers unset")
    return stacks[0]


def _load_model(location: str, dtype: torch.dtype) -> PreTrainedModel:
    if model_type(location) == STATIC_MODEL_TYPE:
        from d2llm.models.static_model import load_static

        return load_static(location, dtype=dtype)
    return load_pretrained(_model_class(location), location, dtype=dtype)


def _model_class(location: str) -> Any:
    """The class that loads a model without its language-model head, and without its decoder if it is a T5 model."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    encoder_class = {**MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}.get(model_type(location), "")
    return AutoModelForTextEncoding if encoder_class.endswith("EncoderModel") else AutoModel


def _auto_pooling(config: BackboneConfig, location: str, model_config: Any) -> str:
    """The kind of pooling that a model was trained with."""
    settings = find_model_file(location, "1_Pooling/config.json")  # where sentence-transformers keeps it
    if settings is not None:
        modes: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        # Newer files name the mode or modes, older ones have a flag per mode.
        named = modes.get("pooling_mode")
        flagged = [name for flag, name in _POOLING_FLAGS.items() if modes.get(flag) is True]
        chosen = [named] if isinstance(named, str) else list(named or flagged)
        kinds = {mode: kind for kind, mode in SENTENCE_TRANSFORMERS_POOLINGS.items()} | {"mean_sqrt_len_tokens": "mean"}
        if len(chosen) != 1 or chosen[0] not in kinds:
            raise ModelError(
                f"'{location}' is pooled by {' and '.join(map(str, chosen)) or 'nothing'}, which is none of "
                f"{', '.join(kinds)}; set student.pooling to one of {', '.join(SENTENCE_TRANSFORMERS_POOLINGS)}"
            )
        return kinds[chosen[0]]  # the mean by the square root has the direction of the mean
    return "last" if is_decoder(model_config) and not config.bidirectional else "mean"


def is_decoder(model_config: Any) -> bool:
    """Whether a model with this configuration predicts the next token."""
    architecture = (getattr(model_config, "architectures", None) or [""])[0]
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or model_config.model_type in _DECODER_TYPES


SENTENCE_TRANSFORMERS_POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "first": "cls",
    "last": "lasttoken",
}
"""The kinds of pooling that sentence-transformers has, with their names there."""
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DECODER_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gpt2"}
)
