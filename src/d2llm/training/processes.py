"""Several processes that train one student together, started by ``torchrun`` or ``accelerate launch``.

This uses plain `torch.distributed`. `accelerate` works by wrapping model, optimizer and data, which does not fit here:
each process encodes its share of a batch, and vectors and gradients are summed, twice per step (``gradient_cache``).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

Value = TypeVar("Value")
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Processes:
    """The number of processes and the rank of this one; by default there is only one."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that evaluates and writes."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all processes; the shape must be the same in each."""
        if self.count > 1:
            distributed.all_reduce(values)

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum each parameter's gradient over all processes; None stays None if no process has a gradient."""
        if self.count == 1:
            return
        listed = list(parameters)
        flags = torch.tensor([float(p.grad is not None) for p in listed], device=listed[0].device)
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in listed]
        joined = torch.cat([flags, *gradients])  # one message, because one for each of hundreds of tensors is slow
        distributed.all_reduce(joined)
        flags, *sums = joined.split([len(listed), *(p.numel() for p in listed)])
        for parameter, flag, total in zip(listed, flags.tolist(), sums, strict=True):
            parameter.grad = total.view_as(parameter) if flag else None

    def from_first(self, value: Value) -> Value:
        """The first process's ``value``; the other processes wait for it."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]


ALONE = Processes()


@contextmanager
def joined_processes() -> Generator[Processes]:
    """The processes that a launcher started together with this one; only this one if there was no launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # gloo for CPU tensors, the vendor's library for GPU tensors. While the first process mines or measures, which can
    # take hours, the others wait for it; by default they would give up after half an hour.
    distributed.init_process_group(timeout=_PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device for this process: if none is named, a launcher started it and there are GPUs, its own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if device is None and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
