"""The gradient of a loss over all texts of a batch, in memory for some of them, by one process or several.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
A loss sees a text only through its vector, so the gradient has two halves: from the loss to the vectors, and from each
vector to the parameters. The first needs all vectors but no intermediate results of the encoder; the second can be done
for some texts at a time. Texts whose intermediate results were not kept are read a second time for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from d2llm.core.recipe import TrainingConfig
from d2llm.models.student import Student
from d2llm.ops.batching import token_budget_batches
from d2llm.pipeline.processes import ALONE, Processes

_SEEDS_A_STEP = 1 << 20  # more than a batch has parts, so that no two parts of a run share their dropout


def backpropagate(
    student: Student,
    ids: Sequence[Sequence[int]],
    loss_of: Callable[[Tensor], Tensor],
    *,
    training: TrainingConfig,
    seed: int,
    processes: Processes = ALONE,
) -> Tensor:
    """Add the gradient of a batch's loss to the student's parameters; returns the loss.

    The same, but for rounding, whatever the size of the parts, whichever of them are read twice, and however many
    processes share them: dropout depends on the seed and the part alone.

    Args:
        student: encoder and head; in training mode if dropout is wanted.
        ids: token ids of each text of the batch.
        loss_of: the loss, a scalar, of the vectors [texts, dim] in the order of ``ids``; it may use the head.
        training: ``part_tokens``, ``gradient_caching`` and ``graph_tokens``.
        seed: of the dropout of this step.
        processes: each encodes its share of the texts and computes the whole loss; all end with the same gradient.
    """
    lengths = [len(row) for row in ids]
    limits = {"max_tokens": training.part_tokens, "enough_tokens": training.part_tokens // 4}
    parts = token_budget_batches(lengths, max_items=len(ids), **limits)
    encoder = [p for name, p in student.named_parameters() if p.requires_grad and not name.startswith("interaction.")]
    head = [p for p in student.interaction.parameters() if p.requires_grad]
    own = range(processes.rank, len(parts), processes.count)
    kept = _kept([parts[number] for number in own], ids, training)

    def encode(number: int, *, with_graph: bool) -> Tensor:
        torch.manual_seed(seed * _SEEDS_A_STEP + number + 1)
        with torch.set_grad_enabled(with_graph):
            return student(*student.backbone.pad([ids[index] for index in parts[number]]))

    encoded = [encode(number, with_graph=bool(encoder) and place < kept) for place, number in enumerate(own)]
    vectors = torch.zeros(len(ids), student.vector_dim, device=student.backbone.device)
    for number, of_part in zip(own, encoded, strict=True):
        vectors[parts[number]] = of_part.detach()
    processes.add_up(vectors)
    vectors.requires_grad_(bool(encoder))
    torch.manual_seed(seed * _SEEDS_A_STEP)
    loss = loss_of(vectors)
    loss.backward()
    if not processes.is_first:
        for parameter in head:  # all computed the same loss: its gradient for the head counts once
            parameter.grad = None
    gradient = vectors.grad
    if gradient is not None:
        for place, number in enumerate(own):
            of_part = encoded[place] if place < kept else encode(number, with_graph=True)
            encoded[place] = of_part.detach()  # its graph is no longer needed
            of_part.backward(gradient[parts[number]])
    processes.add_up_gradients([*encoder, *head])
    return loss.detach()


def _kept(parts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]], training: TrainingConfig) -> int:
    """How many of the parts keep what the backward pass needs until it comes: those that fit ``graph_tokens``."""
    if training.gradient_caching != "auto":
        return len(parts) if training.gradient_caching == "off" else 0
    sizes = [len(part) * max(len(ids[index]) for index in part) for part in parts]
    return sum(total <= training.graph_tokens for total in accumulate(sizes))
