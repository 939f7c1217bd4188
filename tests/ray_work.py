"""Work for Ray workers in tests. Workers import it by name, as they could not import a test module."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from d2llm.core.errors import DataFormatError, InputError


def load_squares(folder: str) -> Callable[[list[int], Callable[[int], None]], dict[str, Any]]:
    """Work that squares numbers, and what it loads: the number of loads is that of the files in ``folder``."""
    (Path(folder) / f"{socket.gethostname()}-{os.getpid()}").touch()
    return partial(squares, folder)


def squares(folder: str, numbers: list[int], advance: Callable[[int], None]) -> dict[str, Any]:
    """The squares of a shard, and which process made them. The file ``kill-N`` ends the first worker that reads N.

    ``poison-N`` ends all of them, ``bad-N`` is an error of d2llm, ``bug-N`` another error, and ``slow-N`` waits until
    the file is gone.
    """
    for number in numbers:
        if (Path(folder) / f"kill-{number}").exists():
            (Path(folder) / f"kill-{number}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (Path(folder) / f"poison-{number}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (Path(folder) / f"bad-{number}").exists():
            raise DataFormatError("corpus.jsonl", "is damaged", line=number)
        if (Path(folder) / f"bug-{number}").exists():
            raise ZeroDivisionError(number)
        while (Path(folder) / f"slow-{number}").exists():
            time.sleep(0.01)
    advance(len(numbers))
    import ray

    return {
        "squares": [number**2 for number in numbers],
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def load_and_die(marker: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
    """What ``load`` gives, but the first worker with a second shard writes its id to ``marker`` and kills itself."""
    work, num_shards = load(*arguments, **options), 0

    def work_or_die(shard: Any, advance: Callable[[int], None]) -> Any:
        nonlocal num_shards
        num_shards += 1
        if num_shards == 2 and not Path(marker).exists():
            Path(marker).write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return work(shard, advance)

    return work_or_die


def load_slowly(load: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
    """What ``load`` gives, with a short break before each shard."""
    work = load(*arguments, **options)

    def work_slowly(shard: Any, advance: Callable[[int], None]) -> Any:
        time.sleep(0.2)
        return work(shard, advance)

    return work_slowly


def fail_to_load() -> None:
    """A load that ends the worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_to_load() -> None:
    """A load that is refused."""
    raise InputError("there is no such model here")
