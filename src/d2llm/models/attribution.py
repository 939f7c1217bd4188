"""Which words of a passage matter to its score with a query.

The score is differentiated through interaction and pooling with respect to the token states of the backbone's last
layer. A token's weight is <dz / dh, h>, a first-order estimate of what the score would lose without it ("gradient x
input", Shrikumar et al., "Not Just a Black Box", 2016). The states are contextual, so a word's weight also reflects its
meaning in the passage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.types import Task
from d2llm.models.device import inference
from d2llm.models.student import Student
from d2llm.ops.words import words


@dataclass(frozen=True, slots=True)
class WordWeight:
    """Characters ``start`` to ``end`` of the passage and what they add to the score (negative if they lower it)."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """A query's score with a passage, broken down into parts.

    Attributes:
        score: final logit.
        dot: its inner-product part; None if the head has none.
        interaction: what the IEM added; None if the head has no inner product.
        words: words of the passage as far as it was read, in order of position; their weights are in logits.
        truncated: whether the passage was cut.
        query_truncated: whether the query was cut.
    """

    score: float
    dot: float | None
    interaction: float | None
    words: tuple[WordWeight, ...]
    truncated: bool
    query_truncated: bool = False


def attribute(student: Student, query: str, passage: str, task: Task) -> Attribution:
    """What each word of a passage (its full text) adds to its score with a query.

    Raises:
        InputError: the student's tokenizer gives no character offsets.
    """
    student.backbone.require_tokens("a weight for each word of a passage")
    if not getattr(student.backbone.tokenizer, "is_fast", False):
        raise InputError("this student's tokenizer gives no character offsets, so its words cannot be weighted")
    tokenized = student.tokenize([passage], "passage")
    spans = student.backbone.token_spans(passage, len(tokenized.ids[0]))
    encoded = student.encode_queries([query])
    query_vectors = torch.from_numpy(encoded.vectors).to(student.backbone.device)
    with inference(student):
        encoded_states, mask = student.backbone(*student.backbone.pad(tokenized.ids))
    states = encoded_states.float().clone().requires_grad_()
    scores = student.interaction(query_vectors, student.pool(states, mask.clone()), task)
    logit = scores.logits[0, 0]
    (gradient,) = cast("tuple[Tensor]", torch.autograd.grad(logit, states))
    weights: Float[Tensor, " tokens"] = (gradient * states).sum(-1)[0].detach()
    score = logit.item()
    dot = None if scores.dot is None else scores.dot[0, 0].item()
    return Attribution(
        score=score,
        dot=dot,
        interaction=None if dot is None else score - dot,
        words=_words(passage, spans, weights.tolist()),
        truncated=bool(tokenized.truncated),
        query_truncated=bool(encoded.truncated),
    )


def _words(text: str, spans: list[tuple[int, int]], weights: list[float]) -> tuple[WordWeight, ...]:
    """The words that were read, with the sum of their tokens' weights; a token over several words goes to the first."""
    read_to = max((end for _, end in spans), default=0)
    word_spans = words(text[: max(0, read_to)])
    sums = [0.0] * len(word_spans)
    index = 0
    for (start, end), weight in zip(spans, weights, strict=False):
        while index < len(word_spans) and word_spans[index][1] <= start:
            index += 1
        if index < len(word_spans) and word_spans[index][0] < end and end > start:
            sums[index] += weight
    return tuple(WordWeight(start, end, weight) for (start, end), weight in zip(word_spans, sums, strict=True))
