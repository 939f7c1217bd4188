"""Several processes that train one student together, as ``torchrun`` or ``accelerate launch`` starts them.

Plain `torch.distributed`: what `accelerate` would add, it adds by wrapping model, optimizer and data; here a process
encodes its share of a batch, and what is exchanged is vectors and gradients, two sums a step (``gradient_cache``).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Processes:
    """How many processes there are, and which of them this is; by default it is alone."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that evaluates and writes."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> None:
        """Put into ``values``, of the same shape everywhere, the sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(values)

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients; one without a gradient in every process stays without."""
        if self.count == 1:
            return
        listed = list(parameters)
        flags = torch.tensor([float(p.grad is not None) for p in listed], device=listed[0].device)
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in listed]
        joined = torch.cat([flags, *gradients])  # one message: a sum for each of hundreds of tensors would be slow
        distributed.all_reduce(joined)
        flags, *sums = joined.split([len(listed), *(p.numel() for p in listed)])
        for parameter, flag, total in zip(listed, flags.tolist(), sums, strict=True):
            parameter.grad = total.view_as(parameter) if flag else None

    def from_first(self, value: Value) -> Value:
        """What the first process has as ``value``; the others wait for it."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]


ALONE = Processes()


@contextmanager
def joined_processes() -> Generator[Processes]:
    """The processes that a launcher started together with this one, or this one alone where none did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    distributed.init_process_group()  # gloo for tensors of the CPU, the vendor's library for those of a GPU
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device for this process: its own GPU, if none is named and each process has one."""
    local = os.environ.get("LOCAL_RANK")
    if device is None and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
