"""Several processes that train one student together, started by ``torchrun`` or ``accelerate launch``.

This uses plain `torch.distributed`. `accelerate` works by wrapping model, optimizer and data, which does not fit here:
each process encodes its share of a batch, and vectors and gradients are summed, twice per step (``gradient_cache``).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

Value = TypeVar("Value")
_WORK, _WAIT = timedelta(minutes=30), timedelta(days=7)
"""How long to wait for the others in work that all do together, and for what the first process does alone."""
_NUMBERS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Processes:
    """The number of processes and the rank of this one; by default there is only one.

    ``waiting`` is the group of `torch.distributed` in which the others wait for the first process.
    """

    rank: int = 0
    count: int = 1
    waiting: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that measures and writes."""
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

    def share_rows(
        self,
        texts: Sequence[str],
        encode: Callable[[Sequence[str]], NDArray[np.float32]],
        dim: int,
        device: torch.device,
    ) -> NDArray[np.float32]:
        """The rows [texts, dim] that ``encode`` computes for texts; each process encodes its share, and all get all.

        ``device`` is where this process computes.
        """
        # Texts are often sorted by length or topic, so each process takes every n-th one.
        chosen = range(self.rank, len(texts), self.count)
        rows = np.zeros((len(texts), dim), dtype=np.float32)
        if chosen:
            rows[chosen] = encode([texts[index] for index in chosen])
        step = max(1, _NUMBERS_AT_ONCE // dim)
        for start in range(0, len(rows), step):
            together = torch.from_numpy(rows[start : start + step]).to(device)
            distributed.all_reduce(together)
            rows[start : start + step] = together.cpu().numpy()
        return rows

    def from_first(self, value: Value) -> Value:
        """The first process's ``value``; the other processes wait for it, for days if it has work to do alone."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, group=self.waiting)
        return box[0]


ALONE = Processes()


@contextmanager
def joined_processes() -> Generator[Processes]:
    """The processes that a launcher started together with this one; only this one if there was no launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # gloo for CPU tensors, the vendor's library for GPU tensors. A process that hangs in a step is noticed after half
    # an hour. The group stays open for a later run of these processes: in a second one, they could meet at the
    # addresses of the first, which the launcher's store still has. A group that the caller opened stays the caller's.
    if not distributed.is_initialized():
        distributed.init_process_group(timeout=_WORK)
        atexit.register(_leave)
    # While the first process mines, which can take hours, the others wait for it in a group of its own, which needs no
    # GPU.
    waiting: Any = distributed.new_group(backend="gloo", timeout=_WAIT)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), waiting)
    finally:
        distributed.destroy_process_group(waiting)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device for this process: if none is named, a launcher started it and there are GPUs, its own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if device is None and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return device
