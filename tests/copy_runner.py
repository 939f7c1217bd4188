"""A runner whose workers share nothing with this process: work, shards and results are pickled, as on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

try:
    from ray import cloudpickle as pickle  # which sends methods by value
except ImportError:
    import pickle


class CopyRunner:
    """Does shards in this process, with copies of everything; ``num_shards`` and ``num_loads`` count them."""

    is_local = False

    def __init__(self) -> None:
        self.num_shards = self.num_loads = 0
        self.devices: set[str | None] = set()
        self.gpus: list[int] = []

    def connected(self) -> AbstractContextManager[CopyRunner]:
        return nullcontext(self)

    @contextmanager
    def workers(self, load: Callable[[], Any], *, device: str | None = None, gpus: int = 1) -> Generator[_CopyWorkers]:
        self.gpus.append(gpus)
        self.devices.add(device)
        yield _CopyWorkers(self, pickle.dumps(load))


class _CopyWorkers:
    def __init__(self, runner: CopyRunner, load: bytes) -> None:
        self._runner = runner
        self._load = load
        self._work: Any = None

    def map(self, shards: Iterable[Any], advance: Callable[[int], None]) -> Iterator[Any]:
        for shard in shards:
            if self._work is None:
                self._work = pickle.loads(self._load)()
                self._runner.num_loads += 1
            self._runner.num_shards += 1
            result = self._work(pickle.loads(pickle.dumps(shard)), lambda _: None)
            advance(len(shard))
            yield pickle.loads(pickle.dumps(result))
