"""Lengths of texts in tokens or, where the tokenizer of a remote model is not known, in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2llm.core.recipe import EndpointConfig
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.ops.pair_truncation import cut_pair


class TextLengths:
    """Measures texts with a tokenizer or, if ``tokenizer`` is None, by their characters."""

    def __init__(self, tokenizer: Any, *, characters_per_token: float = 1.0) -> None:
        self.tokenizer = tokenizer
        self._characters_per_token = characters_per_token

    @classmethod
    def of_endpoint(cls, config: EndpointConfig) -> TextLengths:
        """Lengths as an endpoint's settings count them; ``ModelNotFoundError`` if there is no such tokenizer."""
        name, tokenizer = config.tokenizer, None
        if name is not None:
            # A tokenizer's folder needs no weights.
            tokenizer = load_tokenizer(name if Path(name).is_dir() else find_model(name))
        return cls(tokenizer, characters_per_token=config.characters_per_token)

    def room(self, max_tokens: int) -> int:
        """How many units (tokens or characters) correspond to ``max_tokens``."""
        return max_tokens if self.tokenizer is not None else int(max_tokens * self._characters_per_token)

    def ends(self, texts: list[str]) -> list[Sequence[int]]:
        """Where in each text its units end, in characters."""
        if self.tokenizer is None or not texts:
            return [range(1, len(text) + 1) for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]

    def cut(self, pairs: Sequence[tuple[str, str]], room: int) -> list[tuple[str, str]]:
        """Each pair of texts, cut to ``room`` units together (``ops.pair_truncation.cut_pair``)."""
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        ends = dict(zip(distinct, self.ends(distinct), strict=True))
        return [cut_pair(pair, (ends[pair[0]], ends[pair[1]]), room) for pair in pairs]

    def count(self, texts: list[str]) -> Sequence[int | None]:
        """How many tokens a model reads for each text, with special tokens; None without a tokenizer."""
        if self.tokenizer is None or not texts:
            return [None] * len(texts)
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def estimate(self, text: str) -> int:
        """About how many tokens a text has, from its characters."""
        return math.ceil(len(text) / self._characters_per_token)
