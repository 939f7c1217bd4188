"""The gradient of a loss over all texts of a batch, in memory for some of them, by one process or several.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
A loss sees a text only through its vector, so the gradient has two halves: from the loss to the vectors, and from each
vector to the parameters. The first needs all vectors but no intermediate results of the encoder; the second can be done
for some texts at a time. Texts whose intermediate results were not kept are read a second time for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from d2llm.core.recipe import TrainingConfig
from d2llm.models.device import free_memory, tokens_at_a_time
from d2llm.models.student import Student
from d2llm.ops.batching import token_budget_batches
from d2llm.training.processes import ALONE, Processes
from d2llm.training.training_run import remarks

_SEEDS_A_STEP = 1 << 20  # more than a batch has parts, so that no two parts of a run share their dropout
_SHARE = 3  # of the free memory a third: the rest is for a part read again, gradients, dev, and other programs
ALLOCATED = {"cpu": 1.7}
"""Bytes taken for each byte of intermediate results: what is freed between them leaves holes (docs/LOG.md)."""
_GIB = 1 << 30
_UNKNOWN = 1 << 30  # room where the system does not say how much is free


def graph_room(student: Student, training: TrainingConfig) -> int:
    """Bytes for the intermediate results that are kept from the forward to the backward pass; logged if chosen here.

    ``training.graph_gib``, or a third of what is free now. Processes of one machine share its memory, but each has a
    GPU to itself.
    """
    if training.gradient_caching != "auto":
        return 0
    if training.graph_gib is not None:
        return int(training.graph_gib * _GIB)
    device = student.backbone.device
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = free_memory(device)
    room = _UNKNOWN if free is None else free // _SHARE // sharing
    measured = "how much is free cannot be read here" if free is None else f"{free / _GIB:.1f} GiB are free"
    remarks.info(
        "memory: %s; up to %.1f GiB of it hold intermediate results (training.graph_gib sets another number; it "
        "changes speed, not the result)",
        measured,
        room / _GIB,
    )
    return room


def backpropagate(
    student: Student,
    ids: Sequence[Sequence[int]],
    loss_of: Callable[[Tensor], Tensor],
    *,
    training: TrainingConfig,
    room: int,
    seed: int,
    processes: Processes = ALONE,
) -> Tensor:
    """Add the gradient of a batch's loss to the student's parameters; returns the loss.

    The same, but for rounding, whatever the size of the parts and however many processes share them, and the same to
    the bit whichever of them are read twice: dropout depends on the seed and the part alone.

    Args:
        student: encoder and head; in training mode if dropout is wanted.
        ids: token ids of each text of the batch.
        loss_of: the loss, a scalar, of the vectors [texts, dim] in the order of ``ids``; it may use the head.
        training: ``part_tokens`` and ``gradient_caching``.
        room: bytes of intermediate results that ``auto`` keeps, of one part at least.
        seed: of the dropout of this step.
        processes: each encodes its share of the texts and computes the whole loss; all end with the same gradient.
    """
    lengths = [len(row) for row in ids]
    part_tokens = training.part_tokens or tokens_at_a_time(student.backbone.device)
    limits = {"max_tokens": part_tokens, "enough_tokens": part_tokens // 4}
    parts = token_budget_batches(lengths, max_items=len(ids), **limits)
    encoder = [p for name, p in student.named_parameters() if p.requires_grad and not name.startswith("interaction.")]
    head = [p for p in student.interaction.parameters() if p.requires_grad]
    own = range(processes.rank, len(parts), processes.count)

    def encode(number: int, *, with_graph: bool) -> Tensor:
        torch.manual_seed(seed * _SEEDS_A_STEP + number + 1)
        with torch.set_grad_enabled(with_graph and bool(encoder)):
            return student(*student.backbone.pad([ids[index] for index in parts[number]]))

    kept = len(own) if training.gradient_caching == "off" else 0
    encoded: list[Tensor] = []
    for place, number in enumerate(own):
        if place == 0 and training.gradient_caching == "auto":
            # The longest texts come first, and of longer texts a token takes more: what is measured here is the most.
            with _held_by_graph(student) as held:
                encoded.append(encode(number, with_graph=True))
            taken = held() * ALLOCATED.get(student.backbone.device.type, 1.0)
            kept = _num_kept([parts[number] for number in own], lengths, taken, room)
        else:
            encoded.append(encode(number, with_graph=place < kept))
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


@contextmanager
def _held_by_graph(student: Student) -> Generator[Callable[[], int]]:
    """Gives a function for the bytes that the backward pass through what is computed inside needs, weights apart."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*student.parameters(), *student.buffers())}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _num_kept(parts: Sequence[Sequence[int]], lengths: Sequence[int], first_bytes: float, room: int) -> int:
    """How many of the parts fit into ``room`` if a token of each takes as much as one of the first; one at least.

    The first costs nothing: a part that is read again takes its place.
    """
    sizes = [len(part) * max(lengths[index] for index in part) for part in parts]
    return max(1, sum(total * first_bytes <= room * sizes[0] for total in accumulate(sizes)))
