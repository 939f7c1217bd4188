"""Late chunking: a long text is read whole, and each of its parts is pooled from states that have seen the rest.

Source: Günther et al., "Late Chunking: Contextual Chunk Embeddings Using Long-Context Embedding Models", 2024,
https://arxiv.org/abs/2409.04701.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.types import Span, WholeText
from d2llm.models.backbone import TOKENIZING, Backbone
from d2llm.models.pooling import TextPooling
from d2llm.models.sources import readable_tokens
from d2llm.ops.batching import pad_right, token_budget_batches

_LEAST_WINDOW = 16
_BATCH_TOKENS, _BATCH_ROWS = 8192, 256


@dataclass(frozen=True, slots=True)
class EncodedChunks:
    """Vectors of n parts, the places of those not read whole, and how many tokens in how many windows were read."""

    vectors: Float32[np.ndarray, "chunks dim"]
    truncated: tuple[int, ...]
    num_tokens: int
    num_windows: int

    @property
    def num_truncated(self) -> int:
        """How many parts were not read whole."""
        return len(self.truncated)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A text as tokens: what stands before it (special tokens, prefix, title), itself, what stands behind.

    Token t of ``text`` covers the characters ``starts[t]`` to ``ends[t]``.
    """

    opening: list[int]
    text: list[int]
    closing: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_cut: bool

    def span(self, start: int, end: int) -> Span:
        """The tokens of these characters; one that reaches over an edge belongs to both sides."""
        inside = np.flatnonzero((self.starts < end) & (self.ends > start))
        if start < end and len(inside):
            return int(inside[0]), int(inside[-1]) + 1
        before = int((self.ends <= start).sum())
        return before, before


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens that are read at once, and the positions of the parts that are pooled from them, by the part's place."""

    ids: list[int]
    chunks: list[tuple[int, list[int]]] = field(default_factory=list[tuple[int, list[int]]])


class ChunkReader:
    """Pools parts of long texts with a student's own pooling.

    A part is pooled over the tokens that it has when it is read alone (special tokens, prefix, title, its text), so a
    text of one part gets the vector of ``encode_passages``; only their states have seen the whole text. A decoder's
    states have seen what stands before.
    """

    def __init__(self, backbone: Backbone, pooling: TextPooling, pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Make sure that a part can be pooled.

        Args:
            backbone: reads.
            pooling: the student's; says what takes part in it.
            pool: states [batch, tokens, dim] and mask to vectors [batch, dim].

        Raises:
            InputError: it is one token's state that is taken, or the tokenizer does not say where its tokens stand.
        """
        if pooling.uses_own and backbone.pooling != "mean":
            # The first token is the same for every part; the last was trained to stand for all of the text before it.
            raise InputError(
                f"'{backbone.config.model}' is pooled by its {backbone.pooling} token, which stands for the whole text "
                "and not for a part of it; chunk early, or use a student whose pooling takes the mean, or PMA without "
                "warm start"
            )
        if not backbone.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of '{backbone.config.model}' does not say where in the text its tokens stand; chunk "
                "early, or use a model with a tokenizer.json"
            )
        self._backbone = backbone
        self._pool = pool

    def window(self, requested: int | None = None) -> int | None:
        """How many tokens are read at once: as many as wanted, or as the backbone can (None: any number).

        Raises:
            InputError: fewer than 16, or more than the backbone can.
        """
        readable = readable_tokens(self._backbone.model.config)
        if requested is None:
            return readable
        if requested < _LEAST_WINDOW or (readable is not None and requested > readable):
            limit = "more" if readable is None else str(readable)
            raise InputError(
                f"a window is to have {requested} tokens, but '{self._backbone.config.model}' reads up to {limit}; "
                f"give {_LEAST_WINDOW} to {limit}"
            )
        return requested

    def encode(self, texts: Iterable[tuple[WholeText, Sequence[Span]]]) -> EncodedChunks:
        """Vectors of the parts of each text, one after another.

        A text longer than its window is read in windows that overlap by half, each with the title before it; a part is
        pooled from the window in which it has most around it on the side where it has less. A part longer than a window
        is read to the end of the window and counted as truncated, as are all parts of a text whose title alone takes
        more than half of the window.

        Args:
            texts: each with the places of its parts, in characters of ``text``.

        Raises:
            InputError: a place is not in the text, or a window is too small or too large.
        """
        windows: list[_Window] = []
        truncated: list[int] = []
        count = 0
        for whole, spans in texts:
            for start, end in spans:
                if not 0 <= start <= end <= len(whole.text):
                    raise InputError(
                        f"a part from character {start} to {end} is not in a text of {len(whole.text)} characters "
                        f"({whole.text[:60]!r}); give places inside it"
                    )
            truncated += self._place(whole, spans, count, windows)
            count += len(spans)
        vectors = np.empty((count, self._backbone.dim), np.float32)
        lengths = [len(window.ids) for window in windows]
        for batch in token_budget_batches(lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_ROWS):
            self._read([windows[place] for place in batch], vectors)
        return EncodedChunks(vectors, tuple(truncated), sum(lengths), len(windows))

    def _place(self, whole: WholeText, spans: Sequence[Span], first: int, windows: list[_Window]) -> list[int]:
        """Add the windows that a text's parts need, numbered from ``first``; returns those not read whole."""
        limit = self.window(whole.window)
        tokens = self._tokenize(whole, limit)
        around = len(tokens.opening) + len(tokens.closing)
        room = max(len(tokens.text), 1) if limit is None else limit - around
        windows_at: dict[int, _Window] = {}
        truncated: list[int] = []
        for place, (start, end) in enumerate(spans, start=first):
            begin, stop = tokens.span(start, end)
            if around == 0 and begin == stop:
                # Nothing to pool; the student reads such a text as one token.
                (ids,) = self._backbone.tokenize([""], "passage").ids
                windows.append(_Window(ids, [(place, list(range(len(ids))))]))
                continue
            at = window_start(begin, stop, len(tokens.text), room)
            if tokens.is_cut or stop > at + room:
                truncated.append(place)
            if at not in windows_at:
                windows_at[at] = _Window([*tokens.opening, *tokens.text[at : at + room], *tokens.closing])
            shift, length = len(tokens.opening) - at, len(windows_at[at].ids)
            own = range(begin + shift, min(stop + shift, length - len(tokens.closing)))
            windows_at[at].chunks.append(
                (place, [*range(len(tokens.opening)), *own, *range(length - len(tokens.closing), length)])
            )
        windows += windows_at.values()
        return truncated

    def _tokenize(self, whole: WholeText, limit: int | None) -> _Tokens:
        before = self._backbone.config.passage_prefix + (whole.title + "\n" if whole.title else "")
        tokenizer = cast(Any, self._backbone.tokenizer)
        with TOKENIZING:
            encoded = tokenizer(
                before + whole.text,
                truncation=False,
                verbose=False,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        ids: list[int] = encoded["input_ids"]
        special: list[int] = encoded["special_tokens_mask"]
        places = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) - len(before)
        first = next((t for t in range(len(ids)) if not special[t] and places[t, 1] > 0), len(ids))
        last = next((t for t in range(len(ids), first, -1) if not special[t - 1]), first)
        opening, closing = ids[:first], ids[last:]
        kept = len(opening) if limit is None else max(0, min(len(opening), limit // 2 - len(closing)))
        starts, ends = places[first:last].T
        return _Tokens(opening[:kept], ids[first:last], closing, starts, ends, is_cut=kept < len(opening))

    def _read(self, windows: Sequence[_Window], vectors: Float32[np.ndarray, "chunks dim"]) -> None:
        """Read windows and fill in the vectors of their parts."""
        states: Float[Tensor, "batch tokens dim"]
        states, _ = self._backbone(*self._backbone.pad([window.ids for window in windows]))
        chunks = [(row, place, at) for row, window in enumerate(windows) for place, at in window.chunks]
        lengths = [len(positions) for _, _, positions in chunks]
        for batch in token_budget_batches(lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_ROWS):
            mask: Bool[Tensor, "chunks tokens"]
            positions, mask = pad_right([chunks[i][2] for i in batch], 0, states.device)
            rows = torch.tensor([chunks[i][0] for i in batch], device=states.device)
            vectors[[chunks[i][1] for i in batch]] = self._pool(states[rows[:, None], positions], mask).cpu().numpy()


def window_start(begin: int, stop: int, length: int, room: int) -> int:
    """Where the window begins in which the tokens ``begin`` to ``stop`` have most around them.

    Windows hold ``room`` of a text's ``length`` tokens, and begin at every half of one; the last ends with the text.
    What is in none of them gets one of its own. At the beginning and the end of the text no context is missing.
    """
    last = max(0, length - room)
    starts = [*range(0, last, max(1, room // 2)), last]
    inside = [at for at in starts if at <= begin and stop <= at + room]
    if not inside:
        return min(max(0, begin - max(0, room - (stop - begin)) // 2), last)

    def least_context(at: int) -> int:
        return min(begin - at if at > 0 else room, at + room - stop if at < last else room)

    return max(inside, key=least_context)
