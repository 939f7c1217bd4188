"""Batches of texts of similar length, to keep padding low."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def token_budget_batches(
    lengths: Sequence[int], *, max_tokens: int, max_items: int, enough_tokens: int | None = None
) -> list[list[int]]:
    """Group texts into batches of at most ``max_items`` whose padded size stays within ``max_tokens``.

    Args:
        lengths: number of tokens of each text.
        max_tokens: limit on (number of texts) x (longest text of the batch). A longer text forms its own batch.
        max_items: limit on the number of texts in a batch.
        enough_tokens: a batch that has reached this padded size takes no text that would need more padding than its
            first one: more batches, less padding.

    Returns:
        Batches of indices into ``lengths``, longest text first (so that running out of memory shows at once); every
        index exactly once; texts of equal length in input order.

    Raises:
        ValueError: a limit is below 1.
    """
    if max_tokens < 1 or max_items < 1:
        raise ValueError(f"max_tokens and max_items must be at least 1, got {max_tokens} and {max_items}")
    batches: list[list[int]] = []
    capacity = enough = longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        count = len(batches[-1]) if batches else 0
        if count >= capacity or (count >= enough and _padded(lengths[index]) < _padded(longest)):
            batches.append([])
            # The first text of a batch is its longest, so it alone decides how many fit.
            longest = lengths[index]
            capacity = min(max_items, max(1, max_tokens // max(1, longest)))
            enough = capacity if enough_tokens is None else -(-enough_tokens // max(1, longest))
        batches[-1].append(index)
    return batches


def even_batches(num_items: int, most: int) -> tuple[int, int]:
    """Number of batches of at most ``most`` items, and the batch size that makes them as even as possible.

    With 97 items in batches of 32, the last item would be alone in a step that counts as much as the others: 4 batches
    of 25 are better.
    """
    count = -(-num_items // most)
    return count, -(-num_items // count) if count else most


def pad_right(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Rows of token ids as one right-padded tensor, and its mask (true for real tokens).

    The width is rounded up to a multiple of 8: kernels are prepared once per shape, so fewer shapes mean fewer kernels.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return _fill(np.arange(_padded(int(lengths.max()))) < lengths[:, None], rows, padding, device)


def pad_left(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Rows of token ids as one left-padded tensor, and its mask; the width is that of ``pad_right``."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    width = _padded(int(lengths.max()))
    return _fill(np.arange(width) >= width - lengths[:, None], rows, padding, device)


def _fill(
    mask: Bool[np.ndarray, "batch tokens"], rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """The rows' tokens where the mask is true, in order, and padding elsewhere; and the mask."""
    ids = np.full(mask.shape, padding, np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), np.int64)
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _padded(length: int) -> int:
    return -(-length // 8) * 8
