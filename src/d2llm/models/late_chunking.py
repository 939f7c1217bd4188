"""Late chunking: a long text is read whole, and each chunk is pooled from token states that have seen the rest.

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
from d2llm.models.backbone import Backbone
from d2llm.models.length_limit import readable_tokens
from d2llm.models.pooling import TextPooling
from d2llm.models.token_vectors import TokenProjection
from d2llm.models.tokens import TOKENIZING, TokenVectors
from d2llm.ops.batching import pad_right, token_budget_batches

_LEAST_WINDOW = 16
_BATCH_TOKENS, _BATCH_ROWS = 8192, 256


@dataclass(frozen=True, slots=True)
class EncodedChunks:
    """Vectors of n chunks, the indices of those that were cut, and the number of tokens and windows that were read.

    ``tokens`` are the vectors of the chunks' tokens, if they were requested.
    """

    vectors: Float32[np.ndarray, "chunks dim"]
    truncated: tuple[int, ...]
    num_tokens: int
    num_windows: int
    tokens: TokenVectors | None = None


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A text's tokens: those before it (special tokens, prefix, title), its own, and those after it.

    Token t of ``text`` covers the characters ``starts[t]`` to ``ends[t]``.
    """

    opening: list[int]
    text: list[int]
    closing: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_cut: bool

    def span(self, start: int, end: int) -> Span:
        """The tokens of these characters; a token that crosses a boundary belongs to both sides."""
        inside = np.flatnonzero((self.starts < end) & (self.ends > start))
        if start < end and len(inside):
            return int(inside[0]), int(inside[-1]) + 1
        before = int((self.ends <= start).sum())
        return before, before


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens that are read at once, and the chunks pooled from them: each with its index and its token positions."""

    ids: list[int]
    chunks: list[tuple[int, list[int]]] = field(default_factory=list[tuple[int, list[int]]])


class ChunkReader:
    """Pools chunks of long texts with a student's own pooling.

    A chunk is pooled over the same tokens as when it is read alone (special tokens, prefix, title, its text), so a text
    with a single chunk gets the vector of ``encode_passages``. The difference is that the token states have seen the
    whole text; those of a decoder only the text before them.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooling: TextPooling,
        pool: Callable[[Tensor, Tensor], Tensor],
        projection: TokenProjection | None = None,
    ) -> None:
        """Check that chunks can be pooled by ``pool``: states [batch, tokens, dim] and mask to vectors [batch, dim].

        ``projection`` makes the vectors of their tokens, if these are wanted.

        Raises:
            InputError: the pooling takes the state of a single token, or the tokenizer gives no character offsets.
        """
        backbone.require_tokens("late chunking")
        if any(stage.takes_one_token for stage in pooling.stages):
            # The first token is the same for every chunk; the last was trained to represent all text before it.
            raise InputError(
                f"'{backbone.config.model}' is pooled by its {backbone.own_pooling.kind} token, which represents the "
                "whole text and not a chunk of it; split the text before encoding, or use a student with mean pooling, "
                "or with PMA without warm start"
            )
        if not backbone.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of '{backbone.config.model}' gives no character offsets; split the text before "
                "encoding, or use a model with a tokenizer.json"
            )
        self._backbone = backbone
        self._pool, self._dim = pool, pooling.dim
        self._projection = projection

    def window(self, requested: int | None = None) -> int | None:
        """How many tokens are read at once: as requested, or as many as the backbone can read (None: no limit).

        Raises:
            InputError: fewer than 16 were requested, or more than the backbone can read.
        """
        readable = readable_tokens(self._backbone.model.config)
        if requested is None:
            return readable
        if requested < _LEAST_WINDOW or (readable is not None and requested > readable):
            limits = (
                f"at least {_LEAST_WINDOW} are needed"
                if readable is None
                else f"'{self._backbone.config.model}' reads up to {readable}; give {_LEAST_WINDOW} to {readable}"
            )
            raise InputError(f"a window of {requested} tokens was requested, but {limits}")
        return requested

    def encode(self, texts: Iterable[tuple[WholeText, Sequence[Span]]]) -> EncodedChunks:
        """Vectors of the chunks of each text, in order; their spans are in characters of ``WholeText.text``.

        A text longer than its window is read in windows that overlap by half, each preceded by the title. A chunk is
        pooled from the window that maximises its smaller context (before or after). A chunk longer than a window is cut
        at the end of the window and counted as truncated, as are all chunks of a text whose title alone takes more than
        half of the window.

        Raises:
            InputError: a span lies outside its text, or a window is too small or too large.
        """
        windows: list[_Window] = []
        truncated: list[int] = []
        count = 0
        for whole, spans in texts:
            for start, end in spans:
                if not 0 <= start <= end <= len(whole.text):
                    raise InputError(
                        f"a chunk from character {start} to {end} is outside a text of {len(whole.text)} characters "
                        f"({whole.text[:60]!r}); give spans inside it"
                    )
            truncated += self._add_windows(whole, spans, count, windows)
            count += len(spans)
        vectors = np.empty((count, self._dim), np.float32)
        token_rows: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * count
        lengths = [len(window.ids) for window in windows]
        for batch in token_budget_batches(lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_ROWS):
            self._read([windows[index] for index in batch], vectors, token_rows)
        tokens = None if self._projection is None else TokenVectors.join(token_rows, self._projection.dim)
        return EncodedChunks(vectors, tuple(truncated), sum(lengths), len(windows), tokens)

    def _add_windows(self, whole: WholeText, spans: Sequence[Span], first: int, windows: list[_Window]) -> list[int]:
        """Add the windows for a text's chunks, which are numbered from ``first``; returns the numbers of those cut."""
        limit = self.window(whole.window)
        tokens = self._tokenize(whole, limit)
        around = len(tokens.opening) + len(tokens.closing)
        room = max(len(tokens.text), 1) if limit is None else limit - around
        windows_at: dict[int, _Window] = {}
        truncated: list[int] = []
        for chunk, (start, end) in enumerate(spans, start=first):
            begin, stop = tokens.span(start, end)
            if around == 0 and begin == stop:
                # No tokens to pool; the student reads an empty text as one token.
                (ids,) = self._backbone.tokenize([""], "passage").ids
                windows.append(_Window(ids, [(chunk, list(range(len(ids))))]))
                continue
            offset = window_start(begin, stop, len(tokens.text), room)
            if tokens.is_cut or stop > offset + room:
                truncated.append(chunk)
            if offset not in windows_at:
                windows_at[offset] = _Window([*tokens.opening, *tokens.text[offset : offset + room], *tokens.closing])
            shift, length = len(tokens.opening) - offset, len(windows_at[offset].ids)
            inner = range(begin + shift, min(stop + shift, length - len(tokens.closing)))
            windows_at[offset].chunks.append(
                (chunk, [*range(len(tokens.opening)), *inner, *range(length - len(tokens.closing), length)])
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
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) - len(before)
        first = next((t for t in range(len(ids)) if not special[t] and offsets[t, 1] > 0), len(ids))
        last = next((t for t in range(len(ids), first, -1) if not special[t - 1]), first)
        opening, closing = ids[:first], ids[last:]
        kept = len(opening) if limit is None else max(0, min(len(opening), limit // 2 - len(closing)))
        starts, ends = offsets[first:last].T
        return _Tokens(opening[:kept], ids[first:last], closing, starts, ends, is_cut=kept < len(opening))

    def _read(
        self,
        windows: Sequence[_Window],
        vectors: Float32[np.ndarray, "chunks dim"],
        tokens: list[NDArray[np.float32]],
    ) -> None:
        """Encode windows and fill in the vectors of their chunks, and of the chunks' tokens if they are wanted."""
        states: Float[Tensor, "batch tokens dim"]
        states, _ = self._backbone(*self._backbone.pad([window.ids for window in windows]))
        chunks = [(row, index, positions) for row, window in enumerate(windows) for index, positions in window.chunks]
        if self._projection is not None:
            for row, index, positions in chunks:
                kept = self._projection.positions([windows[row].ids[position] for position in positions])
                tokens[index] = self._projection(states[row, [positions[at] for at in kept]]).cpu().numpy()
        lengths = [len(positions) for _, _, positions in chunks]
        for batch in token_budget_batches(lengths, max_tokens=_BATCH_TOKENS, max_items=_BATCH_ROWS):
            mask: Bool[Tensor, "chunks tokens"]
            positions, mask = pad_right([chunks[i][2] for i in batch], 0, states.device)
            rows = torch.tensor([chunks[i][0] for i in batch], device=states.device)
            vectors[[chunks[i][1] for i in batch]] = self._pool(states[rows[:, None], positions], mask).cpu().numpy()


def window_start(begin: int, stop: int, length: int, room: int) -> int:
    """Start of the window in which the tokens ``begin`` to ``stop`` have the most context.

    Windows hold ``room`` of a text's ``length`` tokens and start every half window; the last one ends with the text. A
    chunk that fits in none of them gets its own window. At the beginning and the end of the text no context is missing.
    """
    last = max(0, length - room)
    starts = [*range(0, last, max(1, room // 2)), last]
    inside = [start for start in starts if start <= begin and stop <= start + room]
    if not inside:
        return min(max(0, begin - max(0, room - (stop - begin)) // 2), last)

    def least_context(start: int) -> int:
        return min(begin - start if start > 0 else room, start + room - stop if start < last else room)

    return max(inside, key=least_context)
