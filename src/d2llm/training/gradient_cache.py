"""The gradient of a loss over all texts of a batch, in the memory that a part of them needs, on one or more processes.

``backpropagate`` is for a student's vectors, ``backpropagate_parts`` for whatever a model computes for single texts.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
A loss depends on a text only through its vector (or a pair's score), so the backward pass has two halves: from the loss
to the vectors, and from each vector to the parameters. The first needs all vectors but no activations of the encoder;
the second can be done for a few texts at a time. Texts whose activations were not kept are encoded again for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from d2llm.core.progress import remarks
from d2llm.models.device import free_memory, tokens_to_train
from d2llm.models.student import Student
from d2llm.ops.batching import token_budget_batches
from d2llm.recipe import TeacherTuningConfig, TrainingConfig
from d2llm.training.processes import ALONE, Processes

_SEEDS_PER_STEP = 1 << 20  # more than the parts of a batch, so that no two parts of a run share their dropout
_NUM_SEEDS = 1 << 63  # that torch takes
_MEMORY_DIVISOR = 3  # use a third of the free memory; the rest is for recomputed parts, gradients, dev, others
ALLOCATED = {"cpu": 1.7}
"""Bytes allocated per byte of activations: memory freed in between is fragmented (docs/log)."""
_GIB = 1 << 30
_UNKNOWN = 1 << 30  # used if the system does not report the free memory


def graph_room(settings: TrainingConfig | TeacherTuningConfig, device: torch.device) -> float:
    """Bytes available for the activations that are kept from the forward to the backward pass.

    This is ``graph_gib`` of the settings, or else a third of the memory that is free now, which is logged. Processes on
    one machine share its memory, but each has its own GPU. 0 with gradient caching "on", infinity with "off".
    """
    if isinstance(settings, TrainingConfig) and settings.gradient_caching != "auto":
        return 0 if settings.gradient_caching == "on" else math.inf
    if settings.graph_gib is not None:
        return settings.graph_gib * _GIB
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = free_memory(device)
    room = _UNKNOWN if free is None else free // _MEMORY_DIVISOR // sharing
    measured = "the free memory is unknown on this system" if free is None else f"{free / _GIB:.1f} GiB are free"
    section = "training" if isinstance(settings, TrainingConfig) else "teacher_tuning"
    remarks.info(
        "memory: %s; up to %.1f GiB of it are used for activations (%s.graph_gib sets another limit; it changes speed, "
        "not the result)",
        measured,
        room / _GIB,
        section,
    )
    return room


def backpropagate(
    student: Student,
    ids: Sequence[Sequence[int]],
    loss_of: Callable[[Tensor, Sequence[Tensor]], Tensor],
    *,
    token_positions: Sequence[Sequence[int]] = (),
    depths: Sequence[int] = (),
    part_tokens: int | None = None,
    checkpointed: bool = False,
    room: float,
    seed: int,
    processes: Processes = ALONE,
) -> Tensor:
    """Add the gradient of a batch's loss to the student's parameters; returns the loss.

    ``loss_of`` computes the scalar loss of the vectors [texts, dim] in the order of the token ``ids``, and of the
    vectors [tokens, token_dim] of each text's tokens; it may use the head. ``token_positions`` are those of the tokens
    that get vectors, by the student's ``token_projection``; none if it is empty. With ``depths``, the vectors after so
    many layers follow those of all layers: [texts, (1 + depths) * dim]. ``part_tokens`` (``TrainingConfig``) is larger
    by default if the layers are ``checkpointed``. ``room`` and the rest: see ``backpropagate_parts``.
    """
    lengths = [len(row) for row in ids]
    counts = [len(row) for row in token_positions] or [0] * len(ids)
    projection = student.token_projection
    dim, token_dim = student.vector_dim * (1 + len(depths)), 0 if projection is None else projection.dim

    def encode(part: Sequence[int]) -> Tensor:
        token_ids, mask = student.backbone.pad([ids[index] for index in part])
        if not depths and (projection is None or not any(counts)):
            return student(token_ids, mask)
        (*nested, states), mask = student.backbone.states_at(token_ids, mask, depths)
        vectors = torch.cat([student.pool(state, mask) for state in (states, *nested)], dim=1)
        if projection is None or not any(counts):
            return vectors
        tokens = vectors.new_zeros(len(part), max(counts), token_dim)
        for row, index in enumerate(part):
            tokens[row, : counts[index]] = projection(states[row, list(token_positions[index])])
        return torch.cat([vectors, tokens.flatten(1)], dim=1)

    def loss_of_parts(encoded: Tensor) -> Tensor:
        rows = zip(encoded[:, dim:], counts, strict=True)
        return loss_of(encoded[:, :dim], [row[: count * token_dim].view(count, token_dim) for row, count in rows])

    backbone = student.backbone
    part_tokens = part_tokens or tokens_to_train(backbone.device, backbone.state_size, checkpointed=checkpointed)
    limits = {"max_tokens": part_tokens, "enough_tokens": part_tokens // 4}
    return backpropagate_parts(
        student,
        encode,
        token_budget_batches(lengths, max_items=len(ids), **limits),
        lengths,
        loss_of_parts,
        shape=(dim + max(counts) * token_dim,),
        head=[parameter for parameter in student.interaction.parameters() if parameter.requires_grad],
        room=room,
        seed=seed,
        processes=processes,
    )


def backpropagate_parts(
    model: nn.Module,
    encode: Callable[[Sequence[int]], Tensor],
    micro_batches: Sequence[Sequence[int]],
    lengths: Sequence[int],
    loss_of: Callable[[Tensor], Tensor],
    *,
    shape: tuple[int, ...] = (),
    head: Sequence[nn.Parameter] = (),
    room: float,
    seed: int,
    processes: Processes = ALONE,
) -> Tensor:
    """Add the gradient of a loss of all texts to a model's parameters, part by part; returns the loss.

    Up to rounding, the gradient does not depend on the size of the parts or the number of processes: each encodes its
    share of the texts and computes the whole loss, and all end with the same gradient. It is bit-identical whichever
    parts are recomputed, because dropout depends only on the seed and the part.

    Args:
        model: the model whose parameters get the gradient.
        encode: from the numbers of some texts to what the model computes for them, [texts, *shape].
        micro_batches: the numbers of the texts that are encoded together, those of the longest texts first.
        lengths: each text's number of tokens.
        loss_of: from what was computed for all texts, in their order, to the scalar loss.
        shape: of what is computed for one text.
        head: parameters that ``loss_of`` uses, rather than ``encode``.
        room: bytes of activations to keep (``graph_room``); those of one part are always kept.
        seed: of the dropout.
        processes: the processes that share the work.
    """
    of_head = {id(parameter) for parameter in head}
    encoder = [p for p in model.parameters() if p.requires_grad and id(p) not in of_head]
    indices = range(processes.rank, len(micro_batches), processes.count)
    device = next(model.parameters()).device

    def compute(index: int, *, with_graph: bool) -> Tensor:
        torch.manual_seed((seed * _SEEDS_PER_STEP + index + 1) % _NUM_SEEDS)
        with torch.set_grad_enabled(with_graph and bool(encoder)):
            return encode(micro_batches[index])

    with torch.autocast(device.type, enabled=False):  # until it ends, the parts share weights in the products' format
        kept = len(indices) if room == math.inf else 1
        outputs: list[Tensor] = []
        for position, index in enumerate(indices):
            if position == 0 and 0 < room < math.inf and len(indices) > 1:
                # The longest texts come first and need the most bytes per token: an upper bound for all parts.
                with graph_bytes(model) as num_bytes:
                    outputs.append(compute(index, with_graph=True))
                allocated = num_bytes() * ALLOCATED.get(device.type, 1.0)
                kept = _num_kept([micro_batches[index] for index in indices], lengths, allocated, room)
            else:
                outputs.append(compute(index, with_graph=position < kept))
        together = torch.zeros(len(lengths), *shape, device=device)
        for index, output in zip(indices, outputs, strict=True):
            together[micro_batches[index]] = output.detach().float()
        processes.add_up(together)
        together.requires_grad_(bool(encoder))
        torch.manual_seed(seed * _SEEDS_PER_STEP % _NUM_SEEDS)
        loss = loss_of(together)
        loss.backward()
        if not processes.is_first:
            for parameter in head:  # all processes computed the same loss, so count the head's gradient once
                parameter.grad = None
        gradient = together.grad
        if gradient is not None:
            for position, index in enumerate(indices):
                output = outputs[position] if position < kept else compute(index, with_graph=True)
                outputs[position] = output.detach()  # its graph is no longer needed
                output.backward(gradient[micro_batches[index]].to(output.dtype))
    processes.add_up_gradients([*encoder, *head])
    return loss.detach()


@contextmanager
def graph_bytes(model: nn.Module) -> Generator[Callable[[], int]]:
    """Yield a function that returns the bytes, besides the weights, that autograd saved for backward in the block."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _num_kept(micro_batches: Sequence[Sequence[int]], lengths: Sequence[int], first_bytes: float, room: float) -> int:
    """How many of the parts fit into ``room``, at least one, if a token needs as many bytes as in the first part.

    Keeping the first part costs nothing, because a recomputed part would need its memory anyway.
    """
    sizes = [len(part) * max(lengths[index] for index in part) for part in micro_batches]
    return max(1, sum(total * first_bytes <= room * sizes[0] for total in accumulate(sizes)))
