"""What reads each text on its own: tokens in, the states of tokens out. The base of all kinds of backbones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from d2llm.core.errors import InputError, ModelError
from d2llm.core.inputs import texts_of
from d2llm.core.types import Span, is_text
from d2llm.models.device import choose_device, choose_dtype
from d2llm.models.token_vectors import TokenVectors
from d2llm.ops.batching import pad_right
from d2llm.ops.token_bounds import bounded_ends
from d2llm.recipe import AutoPooling, BackboneConfig, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TextKind = Literal["query", "passage"]

TOKENIZING = Lock()
"""Held while a student's tokenizer runs: its truncation setting is state that all threads share."""


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of each text, with special tokens; ``truncated`` has the indices of those over the limit.

    If queries have an adapter of their own, the ids of their tokens are ~id, below 0, so that wherever texts are read
    together, each row says which adapter reads it.

    ``counts`` has the number of tokens of each text, where an id stands for a whole text (a remote backbone).
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
    """What reads texts: ``tokenize`` and ``pad`` give the ids of tokens, ``forward`` their states.

    The base of ``PretrainedBackbone`` and of what other kinds open (``recipe.CustomBackbone``). A subclass has ``dim``,
    ``fingerprint_base``, ``forward`` and a ``tokenizer`` of ``transformers``; without one, ``tokenize`` and ``pad``.
    What it has as weights is trained and saved with tuning ``full``.

    Attributes:
        pooling: what its states are for; it may weigh them by the model's attention.
        own: the pooling without weights that is the backbone's own (``Pooling.own``), never ``auto``.
        compute_dtype: number format of matrix products.
        location: where its weights are.
        is_lean: whether it can only encode texts, and not be trained, saved or exported (``models.engines.lean``).
        query_model: what reads queries, if that is another model.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        config: BackboneConfig,
        pooling: Pooling | None = None,
        *,
        compute_dtype: torch.dtype = torch.float32,
        auto_pooling: str = "mean",
    ) -> None:
        """``auto_pooling`` is the kind of pooling that ``auto`` stands for."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.location = config.model
        self.pooling = pooling or AutoPooling()
        self.own = Pooling.of(auto_pooling) if isinstance(self.pooling.own, AutoPooling) else self.pooling.own
        self.is_lean = False
        self.query_model: PreTrainedModel | None = None

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

        It is what the kind of ``config`` opens.
        """
        chosen = choose_device(device)
        return open_backbone(config, pooling, device=chosen, compute_dtype=choose_dtype(chosen, dtype))

    @property
    def model(self) -> PreTrainedModel:
        """The model of ``transformers``.

        Raises:
            InputError: it is none.
        """
        raise InputError(
            f"'{self.config.model}' is read by a {self.config.kind} backbone, whose weights cannot be read or exported "
            "as those of a model of transformers; use a student with another backbone for this"
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether there are states of tokens; some kinds have vectors of whole texts only."""
        return self.config.reads_tokens

    @property
    def texts_at_once(self) -> int | None:
        """How many texts to read before progress is reported, if that is not left to the batches."""
        return None

    def require_tokens(self, purpose: str) -> None:
        """Raise an ``InputError`` if there are no states of tokens, which ``purpose`` needs."""
        if not self.reads_tokens:
            raise InputError(
                f"{purpose} needs the states of tokens, and '{self.config.model}' is a {self.config.kind} backbone, "
                "which gives one vector for each text; use a student with another one"
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
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Number of layers; 0 for a model without layers."""
        return 0

    @property
    def state_size(self) -> int:
        """How many numbers the states of a token have: ``dim`` for each layer."""
        return self.dim * self.num_layers

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.parameters()).device

    def fingerprint_base(self) -> str:
        """Fingerprint of the pretrained weights, before any tuning."""
        raise NotImplementedError

    def cut(self, depth: int) -> None:
        """Remove all layers but the first ``depth``, in place.

        Raises:
            InputError: there are not so many, or they cannot be removed.
        """
        raise InputError(f"a {self.config.kind} backbone cannot be cut to {depth} layers")

    def prepare_training(self, *, seed: int = 0) -> None:  # noqa: ARG002 - for adapters
        """Make trainable what ``config.tuning`` says: everything, or nothing.

        Raises:
            InputError: the backbone can only encode texts (``is_lean``).
        """
        self.requires_grad_(self.config.tuning.kind == "full")

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changed since the pretrained weights."""
        if self.config.tuning.kind == "frozen":
            return {}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    def load_tuned_state(self, state: dict[str, Tensor], *, merge: bool) -> None:  # noqa: ARG002 - for adapters
        """Load tensors made by ``tuned_state``; ``merge``: permanently, if they are adapters.

        Raises:
            ModelError: the tensors belong to another architecture.
        """
        if self.config.tuning.kind != "frozen":
            load_weights(self, state, name=self.config.model)

    @property
    def is_saved_whole(self) -> bool:
        """Whether a student's folder has all weights (``save_merged``) rather than what tuning changed."""
        return False

    def save_merged(self, folder: Path) -> None:
        """Write the configuration and all weights, adapters merged, in the format of the plain model.

        Raises:
            InputError: there is no such format, or queries and passages have adapters of their own.
        """
        raise InputError(
            f"{folder}: the weights of a {self.config.kind} backbone cannot be saved as a model of their own; save the "
            "student with merge=False"
        )

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
        raise NotImplementedError

    def states_at(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], depths: Sequence[int]
    ) -> tuple[list[Float[Tensor, "batch tokens dim"]], Bool[Tensor, "batch tokens"]]:
        """States after the first ``depths`` layers, then those of the last layer, and their mask (``models.depths``).

        Raises:
            ModelError: the states cannot be read after fewer layers.
        """
        if depths:
            raise ModelError(f"a {self.config.kind} backbone has no states after fewer layers; name no depths")
        states, mask = self(token_ids, mask)
        return [states], mask

    def pool(
        self, states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """The backbone's own pooling, in float32."""
        return self.own.pool(states.float(), mask)


def load_weights(model: nn.Module, state: dict[str, Tensor], *, name: str) -> None:
    """Load all weights of a model (``name`` in the message).

    Raises:
        ModelError: they do not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the tuned weights do not fit '{name}' ({reason}...); use the model that was tuned"
        ) from error


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
    """The backbone that a configuration describes: what its kind opens, or else a ``PretrainedBackbone``.

    The arguments are those of the two.
    """
    opened = config.open(pooling, device=device, compute_dtype=compute_dtype, student=student)
    if opened is not None:
        return opened
    from d2llm.models.pretrained import PretrainedBackbone

    return PretrainedBackbone(
        config,
        pooling,
        device=device,
        compute_dtype=compute_dtype,
        lean_tokenizer=lean_tokenizer,
        auto_pooling=auto_pooling,
    )


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
