"""A bounded queue before one worker thread: what waits while a batch runs becomes the next batch.

No timer holds a lone request back. A request is a group of items that is admitted whole or not at all; groups take
turns, so that a small one does not wait behind a large one. A group whose client goes away leaves the queue. A batch
that fails is split until the bad item fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from d2llm.apps.server.errors import NotReadyError, OverloadedError

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Value = TypeVar("_Value")

_FORGETTING = 0.2  # of the measured cost of an item at each batch
_ITEMS_A_TURN = 16


class Places:
    """So many may be inside at a time; others are refused. ``with`` it around work that has no queue of its own."""

    def __init__(self, number: int, retry_after: float = 1.0) -> None:
        self._free = number
        self._retry_after = retry_after

    def __enter__(self) -> None:
        if not self._free:
            raise OverloadedError(self._retry_after)
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1


@dataclass(frozen=True, slots=True)
class Done(Generic[_Result]):
    """A group's results, in order; seconds until its first item was taken, and from then to its last result."""

    results: list[_Result]
    queued: float
    worked: float


@dataclass(eq=False, slots=True)
class _Group(Generic[_Item, _Result]):
    """A request's items: ``results`` fills up while ``next`` moves through ``items``."""

    items: Sequence[_Item]
    future: asyncio.Future[Done[_Result]]
    came: float
    results: dict[int, _Result] = field(default_factory=dict[int, _Result])
    next: int = 0
    began: float | None = None

    @property
    def num_left(self) -> int:
        return len(self.items) - self.next


class Batcher(Generic[_Item, _Result]):
    """Runs items in batches; all methods but ``run``'s are called in the event loop's thread."""

    def __init__(
        self,
        run: Callable[[Sequence[_Item]], Sequence[_Result | Exception]],
        *,
        name: str,
        max_queued: int,
        max_batch: float,
        cost: Callable[[_Item], float] = lambda _: 1.0,
        wait_seconds: float = 0.0,
        observe_batch: Callable[[int, float], None] = lambda _size, _seconds: None,
    ) -> None:
        """Start no thread yet: ``start`` does.

        Args:
            run: items -> results, or errors, in their order; called in the worker thread. What it raises becomes the
                error of the items that it cannot do alone.
            name: of the thread.
            max_queued: items that may wait; a group beyond that is refused.
            max_batch: costs of a batch's items together, unless its first item alone is more.
            cost: of an item, for ``max_batch``.
            wait_seconds: how long to wait for more when there is something to do; 0 takes what is there.
            observe_batch: is told each batch's size and seconds.
        """
        self._run = run
        self._name = name
        self._max_queued = max_queued
        self._max_batch = max_batch
        self._cost = cost
        self._wait_seconds = wait_seconds
        self._observe_batch = observe_batch
        self._groups: deque[_Group[_Item, _Result]] = deque()
        self._num_queued = 0
        self._item_seconds = 0.0
        self._something = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def num_queued(self) -> int:
        """Items that wait."""
        return self._num_queued

    def start(self) -> None:
        """Begin to work."""
        self._worker = asyncio.get_running_loop().create_task(self._work(), name=self._name)

    async def stop(self, timeout: float | None = None) -> None:
        """Take nothing more, finish what was admitted and end; after ``timeout`` seconds give up the rest."""
        self._closed = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            _log.warning("%s: %d items were given up", self._name, self._num_queued)
        if self._worker is not None:
            self._worker.cancel()
        while self._groups:
            group = self._groups.popleft()
            if not group.future.done():
                group.future.set_exception(NotReadyError("the server stopped before it came to this request"))
        self._num_queued = 0
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def submit(self, items: Sequence[_Item], *, bounded: bool = True) -> Done[_Result]:
        """The results of a group of items.

        Args:
            items: at least one.
            bounded: refuse the group where the queue is full; work of the server's own is not refused.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: the server is stopping.
        """
        if self._closed:
            raise NotReadyError("the server is stopping")
        if bounded and self._num_queued and self._num_queued + len(items) > self._max_queued:
            raise OverloadedError(retry_after=max(1.0, self._num_queued * self._item_seconds))
        future: asyncio.Future[Done[_Result]] = asyncio.get_running_loop().create_future()
        group = _Group[_Item, _Result](items, future, time.perf_counter())
        self._groups.append(group)
        self._num_queued += len(items)
        self._idle.clear()
        self._something.set()
        try:
            return await future
        finally:
            self._forget(group)

    async def between_batches(self, work: Callable[[], _Value]) -> _Value:
        """Run something else in the worker thread, for what must not run beside a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _forget(self, group: _Group[_Item, _Result]) -> None:
        """Free the place of a group that nobody waits for any more."""
        if group in self._groups:
            self._groups.remove(group)
            self._num_queued -= group.num_left

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._groups:
                self._something.clear()
                self._idle.set()
                await self._something.wait()
            if self._wait_seconds:
                await asyncio.sleep(self._wait_seconds)
            taken = self._take()
            if not taken:
                continue
            begin = time.perf_counter()
            results = await loop.run_in_executor(self._thread, self._run_apart, [item for _, _, item in taken])
            seconds = time.perf_counter() - begin
            self._observe_batch(len(taken), seconds)
            latest = seconds / len(taken)
            self._item_seconds += _FORGETTING * (latest - self._item_seconds) if self._item_seconds else latest
            for (group, place, _), result in zip(taken, results, strict=True):
                _deliver(group, place, result)

    def _take(self) -> list[tuple[_Group[_Item, _Result], int, _Item]]:
        """The next batch: a few items of each group in turn, as long as they fit."""
        taken: list[tuple[_Group[_Item, _Result], int, _Item]] = []
        room, now = self._max_batch, time.perf_counter()
        while self._groups:
            group = self._groups[0]
            group.began = group.began or now
            for place in range(group.next, min(group.next + _ITEMS_A_TURN, len(group.items))):
                item = group.items[place]
                room -= self._cost(item)
                if room < 0 and taken:
                    return taken
                taken.append((group, place, item))
                group.next += 1
                self._num_queued -= 1
            self._groups.popleft()
            if group.num_left:
                self._groups.append(group)
        return taken

    def _run_apart(self, items: Sequence[_Item]) -> list[_Result | Exception]:
        """Run a batch; where it fails, its halves, so that only the items that cannot be done have an error."""
        try:
            return [*self._run(items)]
        except Exception as error:  # noqa: BLE001 - it becomes the answer to whoever asked
            if len(items) == 1:
                return [error]
        middle = len(items) // 2
        return self._run_apart(items[:middle]) + self._run_apart(items[middle:])


def _deliver(group: _Group[_Item, _Result], place: int, result: _Result | Exception) -> None:
    if group.future.done():
        return
    if isinstance(result, Exception):
        group.future.set_exception(result)
        return
    group.results[place] = result
    if len(group.results) == len(group.items):
        assert group.began is not None
        results = [group.results[at] for at in range(len(group.items))]
        group.future.set_result(Done(results, group.began - group.came, time.perf_counter() - group.began))
