"""Prefix sharing: the common beginning of several inputs is read once, and they all use its keys and values.

The candidates of a query differ only in their passages, and the prompt begins with the query. Special tokens, prompt
head, query and middle are therefore read once per query; passage and question once per pair, on top of the query's keys
and values. Up to rounding, the result is the same as reading each input whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from d2llm.ops.batching import pad_right
from d2llm.ops.pooling import last_positions

_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError)
"""Errors raised by architectures whose caches hold more than keys and values."""


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of some prefixes; those of the tokens that follow are used but not stored."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix, followed by those of the tokens after it."""
        del args, kwargs
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class SharedPrefixes:
    """Keys and values of some prefixes, one row each, padded on the left.

    With left padding, the text that follows comes directly after its prefix, so that sliding windows, which count
    positions in the cache, stay correct.
    """

    def __init__(self, model: Any, prefixes: Sequence[Sequence[int]], *, padding: int, device: torch.device) -> None:
        """Read the token ids of at least one prefix with a causal model of ``transformers`` without its head."""
        self._model, self._padding, self._device = model, padding, device
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        width = max(map(len, prefixes))
        ids = [[padding] * (width - len(row)) + list(row) for row in prefixes]
        self._lengths = torch.tensor([len(row) for row in prefixes], device=device)
        self._mask = torch.arange(width, device=device) >= (width - self._lengths)[:, None]
        self._cache = DynamicCache()
        self._forward(torch.tensor(ids, device=device), self._mask, self._cache, 0)

    def last_states(self, rows: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Float[Tensor, "pairs dim"]:
        """The last layer's state of each suffix's last token, where suffix i follows prefix ``rows[i]``."""
        chosen = torch.tensor(rows, device=self._device)
        layers = cast("list[Any]", self._cache.layers)
        cache = Cache(layers=[_PrefixLayer(_take(layer.keys, chosen), _take(layer.values, chosen)) for layer in layers])
        width = max(map(len, suffixes))  # not the next multiple of 8: for short texts that would add 10 %
        ids, mask = (padded[:, :width] for padded in pad_right(suffixes, self._padding, self._device))
        states = self._forward(ids, torch.cat([self._mask[chosen], mask], dim=1), cache, self._lengths[chosen])
        return states[torch.arange(len(states), device=self._device), last_positions(mask)]

    def _forward(
        self,
        ids: Int[Tensor, "rows tokens"],
        mask: Bool[Tensor, "rows places"],
        cache: Any,
        num_before: Int[Tensor, " rows"] | int,
    ) -> Float[Tensor, "rows tokens dim"]:
        """Read tokens after those in the cache (``num_before`` tokens per row); ``mask`` covers both."""
        positions: dict[str, Tensor] = {}
        if self._takes_positions:
            own = mask[:, -ids.shape[1] :].long()
            before = num_before[:, None] if isinstance(num_before, Tensor) else num_before
            positions["position_ids"] = (before + own.cumsum(1) - 1).clamp(min=0)
        output = self._model(
            input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **positions
        )
        return output.last_hidden_state.to(self._device)


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows of one layer, which may be on another device than the inputs."""
    return values[rows.to(values.device)]


def why_not_shared(model: Any, tokens: Sequence[int], *, padding: int, device: torch.device) -> str:
    """Why ``model`` cannot continue from a shared prefix, determined by a trial with 20 tokens; empty if it can."""
    prefixes, suffixes = [tokens[:3], tokens[3:11]], [tokens[11:15], tokens[11:20], tokens[8:13]]
    rows = [0, 1, 1]
    try:
        shared = SharedPrefixes(model, prefixes, padding=padding, device=device).last_states(rows, suffixes)
    except _REFUSALS as error:
        return f"its cache cannot be shared ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    for row, suffix, state in zip(rows, suffixes, shared, strict=True):
        whole = model(input_ids=torch.tensor([[*prefixes[row], *suffix]], device=device), use_cache=False)
        expected = whole.last_hidden_state[0, -1].float()
        if (state.float() - expected).norm() > 0.03 * expected.norm():  # bfloat16 rounds by up to a hundredth
            return "its states after a shared prefix differ from those of the whole text"
    return ""
