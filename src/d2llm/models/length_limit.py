"""What a model can read: how many tokens (and how many layers it has), and how texts are measured and cut to fewer.

``TextLengths`` does so for writers and for models behind an API, in characters if their tokenizer is not known. The
texts of students and local teachers are cut as they are tokenized (``models.backbone``, ``models.length_limit``).

In a query and a passage that are read together, the end of the passage is cut first; a query that would take more than
half of the room is cut only down to that half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2llm.core.errors import InputError
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.ops.token_bounds import costs
from d2llm.recipe import EndpointConfig

_POSITIONS_AFTER_PADDING = frozenset(
    {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet", "data2vec-text"}
)


def readable_tokens(config: Any) -> int | None:
    """How many tokens a model with this ``transformers`` configuration can read; None if there is no limit."""
    readable: int | None = getattr(config, "max_position_embeddings", None)
    if readable is None or readable < 0:
        return None
    # These models number positions starting after the padding id.
    return readable - int(config.pad_token_id) - 1 if config.model_type in _POSITIONS_AFTER_PADDING else readable


def check_limits(config: Any, model: str, limits: Mapping[str, int]) -> None:
    """Raise an ``InputError`` if a model with this configuration cannot read so many tokens (setting -> limit)."""
    readable = readable_tokens(config)
    for name, limit in limits.items():
        if readable is not None and limit > readable:
            raise InputError(
                f"{name} is {limit}, but '{model}' reads at most {readable} tokens; set {name} to {readable} or less"
            )


def check_layers(layers: int | Sequence[int], total: int, *, name: str) -> None:
    """Raise an ``InputError`` if the model ``name`` with ``total`` layers lacks these: the first, or numbers from 0."""
    if isinstance(layers, int):
        if layers > total:
            raise InputError(f"layers is {layers}, but '{name}' has {total}; set layers to {total} or less")
    elif layers[-1] >= total:
        raise InputError(f"layers names layer {layers[-1]}, but '{name}' has only layers 0 to {total - 1}")


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
            return [self._character_ends(text) for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]

    def cut(self, pairs: Sequence[tuple[str, str]], room: int) -> list[tuple[str, str]]:
        """Each pair of texts, cut to ``room`` units together (``models.length_limit.cut_pair``)."""
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
        return math.ceil(len(self._character_ends(text)) / self._characters_per_token)

    def _character_ends(self, text: str) -> list[int]:
        """The end of each character, several times if it may be more tokens than a character of plain text.

        (``ops.token_bounds``: other scripts, emoji, digits)
        """
        units = (math.ceil(cost * self._characters_per_token) for cost in costs(text, long_runs=False))
        return [end for end, num_units in enumerate(units, start=1) for _ in range(max(1, num_units))]


def fit_pair(num_query: int, num_passage: int, room: int) -> tuple[int, int]:
    """How many tokens of a query and of a passage are kept if they share ``room`` tokens."""
    kept_query = min(num_query, max(room // 2, room - num_passage))
    return kept_query, min(num_passage, max(0, room - kept_query))


def cut_pair(pair: tuple[str, str], ends: tuple[Sequence[int], Sequence[int]], room: int) -> tuple[str, str]:
    """Query and passage cut to ``room`` tokens together; ``ends`` say where in each text its tokens end.

    A text that is not cut keeps what follows its last token, such as white space.
    """
    counts = fit_pair(len(ends[0]), len(ends[1]), room)
    query, passage = (
        text if count >= len(text_ends) else text[: text_ends[count - 1]] if count else ""
        for text, text_ends, count in zip(pair, ends, counts, strict=True)
    )
    return query, passage
