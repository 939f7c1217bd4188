"""States of tokens across two tokenizers: which tokens share characters of a text, and the teacher's states there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from d2llm.core.types import Span


def align_tokens(text: str, spans: Sequence[Span], teacher_spans: Sequence[Span]) -> Int32[np.ndarray, "pairs 3"]:
    """Which tokens of the student and of the teacher share characters of a text, and how many.

    White space does not count, because one tokenizer takes it into the word that follows and another leaves it out.

    Args:
        text: the text.
        spans: where the student's tokens begin and end in it (``Backbone.token_spans``). What is outside the text,
            such as a prefix, counts no more than an empty span, which special tokens have.
        teacher_spans: the same of the teacher's tokens.

    Returns:
        The position of the student's token, that of the teacher's, and the number of characters, in this order.
    """
    letters = np.cumsum([0, *(not character.isspace() for character in text)])  # before each character
    one, other = (
        letters[np.asarray(bounds, np.int64).reshape(-1, 2).clip(0, len(text))] for bounds in (spans, teacher_spans)
    )
    shared = np.minimum(one[:, None, 1], other[:, 1]) - np.maximum(one[:, None, 0], other[:, 0])
    positions, teacher_positions = (shared > 0).nonzero()
    return np.stack([positions, teacher_positions, shared[positions, teacher_positions]], axis=1).astype(np.int32)


def aligned_states(
    teacher: Float[Tensor, "texts teacher_tokens dim"], pairs: Sequence[Int32[np.ndarray, "_ 3"]], num_tokens: int
) -> tuple[Float[Tensor, "texts tokens dim"], Bool[Tensor, "texts tokens"]]:
    """The teacher's states at the student's tokens, and which of these have any.

    For each of the student's tokens, the mean of the teacher's states with which it shares characters, weighted by
    their number.

    Args:
        teacher: the states of the teacher's own tokens.
        pairs: which tokens share how many characters, for each text (``align_tokens``).
        num_tokens: width of the student's batch, padding included.
    """
    rows = torch.from_numpy(np.repeat(np.arange(len(pairs)), [len(aligned) for aligned in pairs])).to(teacher.device)
    positions, teacher_positions, weights = torch.from_numpy(np.concatenate(pairs).T.astype(np.int64)).to(
        teacher.device
    )
    flat, weights = rows * num_tokens + positions, weights.float()
    sums = weights.new_zeros(len(pairs) * num_tokens).index_add(0, flat, weights)
    fractions = (weights / sums[flat])[:, None]
    states = weights.new_zeros(len(sums), teacher.shape[2])
    states = states.index_add(0, flat, fractions * teacher[rows, teacher_positions].float())
    return states.unflatten(0, (len(pairs), num_tokens)), (sums > 0).unflatten(0, (len(pairs), num_tokens))
