"""The gradient of a loss over all texts of a batch, in the memory that a part of them needs, on one or more processes.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
A loss depends on a text only through its vector, so the backward pass has two halves: from the loss to the vectors, and
from each vector to the parameters. The first needs all vectors but no activations of the encoder; the second can be
done for a few texts at a time. Texts whose activations were not kept are encoded a second time for it.
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
from d2llm.training.checkpoints import remarks
from d2llm.training.processes import ALONE, Processes

_SEEDS_PER_STEP = 1 << 20  # more than the parts of a batch, so that no two parts of a run share their dropout
_SHARE = 3  # use a third of the free memory; the rest is for recomputed parts, gradients, dev, and other programs
ALLOCATED = {"cpu": 1.7}
"""Bytes allocated per byte of activations: memory freed in between is fragmented (docs/LOG.md)."""
_GIB = 1 << 30
_UNKNOWN = 1 << 30  # used if the system does not report the free memory


def graph_room(student: Student, training: TrainingConfig) -> int:
    """Bytes available for the activations that are kept from the forward to the backward pass.

    This is ``training.graph_gib``, or else a third of the memory that is free now, which is logged. Processes on one
    machine share its memory, but each has its own GPU.
    """
    if training.gradient_caching != "auto":
        return 0
    if training.graph_gib is not None:
        return int(training.graph_gib * _GIB)
    device = student.backbone.device
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = free_memory(device)
    room = _UNKNOWN if free is None else free // _SHARE // sharing
    measured = "the free memory is unknown on this system" if free is None else f"{free / _GIB:.1f} GiB are free"
    remarks.info(
        "memory: %s; up to %.1f GiB of it are used for activations (training.graph_gib sets another limit; it "
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

    Up to rounding, the gradient does not depend on the size of the parts or the number of processes: each encodes its
    share of the texts and computes the whole loss, and all end with the same gradient. It is bit-identical whichever
    parts are recomputed, because dropout depends only on the seed and the part.

    ``loss_of`` computes the scalar loss of the vectors [texts, dim] in the order of the token ``ids``, and may use the
    head. ``room`` is the bytes of activations that gradient caching of "auto" keeps, at least those of one part.
    """
    lengths = [len(row) for row in ids]
    part_tokens = training.part_tokens or tokens_at_a_time(student.backbone.device)
    limits = {"max_tokens": part_tokens, "enough_tokens": part_tokens // 4}
    parts = token_budget_batches(lengths, max_items=len(ids), **limits)
    encoder = [p for name, p in student.named_parameters() if p.requires_grad and not name.startswith("interaction.")]
    head = [p for p in student.interaction.parameters() if p.requires_grad]
    own = range(processes.rank, len(parts), processes.count)

    def encode(number: int, *, with_graph: bool) -> Tensor:
        torch.manual_seed(seed * _SEEDS_PER_STEP + number + 1)
        with torch.set_grad_enabled(with_graph and bool(encoder)):
            return student(*student.backbone.pad([ids[index] for index in parts[number]]))

    kept = len(own) if training.gradient_caching == "off" else 0
    encoded: list[Tensor] = []
    for place, number in enumerate(own):
        if place == 0 and training.gradient_caching == "auto":
            # The longest texts come first and need the most bytes per token, so this is an upper bound for all parts.
            with _graph_bytes(student) as num_bytes:
                encoded.append(encode(number, with_graph=True))
            allocated = num_bytes() * ALLOCATED.get(student.backbone.device.type, 1.0)
            kept = _num_kept([parts[number] for number in own], lengths, allocated, room)
        else:
            encoded.append(encode(number, with_graph=place < kept))
    vectors = torch.zeros(len(ids), student.vector_dim, device=student.backbone.device)
    for number, part_vectors in zip(own, encoded, strict=True):
        vectors[parts[number]] = part_vectors.detach()
    processes.add_up(vectors)
    vectors.requires_grad_(bool(encoder))
    torch.manual_seed(seed * _SEEDS_PER_STEP)
    loss = loss_of(vectors)
    loss.backward()
    if not processes.is_first:
        for parameter in head:  # all processes computed the same loss, so count the head's gradient once
            parameter.grad = None
    gradient = vectors.grad
    if gradient is not None:
        for place, number in enumerate(own):
            part_vectors = encoded[place] if place < kept else encode(number, with_graph=True)
            encoded[place] = part_vectors.detach()  # its graph is no longer needed
            part_vectors.backward(gradient[parts[number]])
    processes.add_up_gradients([*encoder, *head])
    return loss.detach()


@contextmanager
def _graph_bytes(student: Student) -> Generator[Callable[[], int]]:
    """Yield a function that returns the bytes, besides the weights, that autograd saved for backward in the block."""
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
    """How many of the parts fit into ``room``, at least one, if a token needs as many bytes as in the first part.

    Keeping the first part costs nothing, because a recomputed part would need its memory anyway.
    """
    sizes = [len(part) * max(lengths[index] for index in part) for part in parts]
    return max(1, sum(total * first_bytes <= room * sizes[0] for total in accumulate(sizes)))
