"""A bounded queue in front of worker threads: items that wait while batches run form the next batches.

No timer delays a single request. A request is a group of items that is admitted as a whole or not at all; groups take
turns, so that a small one does not wait behind a large one. A batch consists of items of similar cost, including the
one that has waited longest. A group leaves the queue if its client disconnects. A batch that fails is split until the
bad item fails alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar, cast

from d2llm.server.errors import NotReadyError, OverloadedError

_Value = TypeVar("_Value")
_Item = TypeVar("_Item")
_CHECK_SECONDS = 0.1


class Stop:
    """Tells a thread to stop; it asks between the parts of its work."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """The work is to stop."""
        self._event.set()

    def check(self) -> None:
        """Go on, or stop.

        Raises:
            NotReadyError: the work is to stop.
        """
        if self._event.is_set():
            raise NotReadyError("this was stopped before it was finished; send it again")

    def between(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, with a check before each.

        Raises:
            NotReadyError: the work is to stop.
        """
        for item in items:
            self.check()
            yield item

    def result(self, work: Coroutine[Any, Any, _Value], loop: asyncio.AbstractEventLoop) -> _Value:
        """The result of work in the event loop, for which this thread waits.

        Raises:
            NotReadyError: the work is to stop.
        """
        future = asyncio.run_coroutine_threadsafe(work, loop)
        while not wait([future], _CHECK_SECONDS).done:
            if self._event.is_set():
                future.cancel()
                self.check()
        return future.result()


async def in_stoppable_thread(threads: Executor, work: Callable[[Stop], _Value], stop: Stop | None = None) -> _Value:
    """Run work in one of some threads, in this request's context; if the request is cancelled, it stops."""
    order, context = stop or Stop(), contextvars.copy_context()
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: context.run(work, order))
    except asyncio.CancelledError:
        order.set()
        raise


_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_NEW_WEIGHT = 0.2  # weight of each batch in the running mean of seconds per item
_ITEMS_A_TURN = 16
_BATCHES_IN_SIGHT = 16  # a batch picks items of similar cost from this many batches' worth of waiting items
_MIN_BATCH = 0.25  # as a fraction of the largest; smaller batches are inefficient


class Slots:
    """Limits concurrent work that has no queue: use as a context manager; raises OverloadedError if all are taken."""

    def __init__(self, num_slots: int, retry_after: float = 1.0) -> None:
        self._free = num_slots
        self._retry_after = retry_after

    def __enter__(self) -> None:
        if not self._free:
            raise OverloadedError(self._retry_after)
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1


@dataclass(frozen=True, slots=True)
class Done(Generic[_Result]):
    """A group's results, in order, with the seconds until its first item was taken and from then to its last result."""

    results: list[_Result]
    queued: float
    worked: float


@dataclass(eq=False, slots=True)
class _Group(Generic[_Item, _Result]):
    """A request's items, with ``results`` by position and ``waiting``, the positions of items not yet taken."""

    items: Sequence[_Item]
    future: asyncio.Future[Done[_Result]]
    came: float
    waiting: list[int]
    results: dict[int, _Result] = field(default_factory=dict[int, _Result])
    began: float | None = None


@dataclass(frozen=True, slots=True)
class _Queued(Generic[_Item, _Result]):
    """An item of a group."""

    group: _Group[_Item, _Result]
    position: int
    cost: float

    @property
    def item(self) -> _Item:
        return self.group.items[self.position]


class Batcher(Generic[_Item, _Result]):
    """Runs items in batches. Call all methods in the event loop's thread; only ``run`` is called in worker threads."""

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
        lanes: Executor | None = None,
        num_lanes: int = 1,
    ) -> None:
        """Set up the queue; ``start`` starts the workers.

        Args:
            run: items -> results or exceptions, in order; called in a worker thread. If it raises, the exception
                becomes the result of those items that also fail alone.
            name: name of the thread.
            max_queued: number of items that may wait; a group that would exceed it is refused.
            max_batch: limit of a batch's number of items times the highest cost among them; a single item may exceed
                it.
            cost: cost of an item, for ``max_batch``.
            wait_seconds: how long to wait for more items before each batch; 0 does not wait.
            observe_batch: called with each batch's size and seconds.
            lanes: threads for batches that run in parallel, in place of ``num_lanes`` of its own; a batch that runs
                alone uses a separate thread, where it may use all cores.
            num_lanes: number of batches that may run at a time.
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
        self._has_items = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._workers: list[asyncio.Task[None]] = []
        self._num_running = 0
        self._thread = ThreadPoolExecutor(1 if lanes else num_lanes, thread_name_prefix=name)
        self._lanes = lanes or self._thread
        self._num_lanes = num_lanes

    @property
    def num_queued(self) -> int:
        """Number of waiting items."""
        return self._num_queued

    def start(self) -> None:
        """Start a worker for each lane, unless they run; call it in the event loop."""
        if not self._workers:
            loop = asyncio.get_running_loop()
            self._workers = [loop.create_task(self._work(), name=self._name) for _ in range(self._num_lanes)]

    async def stop(self, timeout: float | None = None) -> None:
        """Accept no more items, finish the admitted ones and stop; after ``timeout`` seconds drop the rest."""
        self._closed = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            _log.warning("%s: dropped %d items", self._name, self._num_queued)
        for worker in self._workers:
            worker.cancel()
        while self._groups:
            group = self._groups.popleft()
            if not group.future.done():
                group.future.set_exception(NotReadyError("the server stopped before it processed this request"))
        self._num_queued = 0
        self._thread.shutdown(wait=False, cancel_futures=True)
        # Both lead back to this batcher or its owner, which would stay in memory until a garbage collection finds them.
        self._workers, self._run = [], _refuse

    async def submit(self, items: Sequence[_Item], *, bounded: bool = True) -> Done[_Result]:
        """The results of a group of items.

        Args:
            items: at least one.
            bounded: refuse the group if the queue is full; the server's internal work is not refused.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: the server is stopping.
        """
        if bounded:
            self.require_room(len(items))
        elif self._closed:
            raise NotReadyError("the server is stopping")
        future: asyncio.Future[Done[_Result]] = asyncio.get_running_loop().create_future()
        group = _Group[_Item, _Result](items, future, time.perf_counter(), [*range(len(items))])
        self._groups.append(group)
        self._num_queued += len(items)
        self._idle.clear()
        self._has_items.set()
        try:
            return await future
        finally:
            self._forget(group)

    def require_room(self, num_items: int) -> None:
        """Check that this many items may join the queue; an empty queue accepts any number.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: the server is stopping.
        """
        if self._closed:
            raise NotReadyError("the server is stopping")
        if self._num_queued and self._num_queued + num_items > self._max_queued:
            raise OverloadedError(retry_after=max(1.0, self._num_queued * self._item_seconds / self._num_lanes))

    async def in_lane(self, work: Callable[[], _Value]) -> _Value:
        """Run other work in one of the threads that run batches."""
        return await asyncio.get_running_loop().run_in_executor(self._lanes, work)

    def _forget(self, group: _Group[_Item, _Result]) -> None:
        """Remove a group that nobody waits for any more."""
        if group in self._groups:
            self._groups.remove(group)
            self._num_queued -= len(group.waiting)

    async def _work(self) -> None:
        """Loop of one lane: run batch after batch."""
        while True:
            while not self._groups:
                self._has_items.clear()
                if not self._num_running:
                    self._idle.set()
                await self._has_items.wait()
            if self._wait_seconds:
                await asyncio.sleep(self._wait_seconds)
            await self._run_next()

    async def _run_next(self) -> None:
        """Run the next batch. The loop itself would keep its items in memory until the one after."""
        taken = self._take()
        if not taken:
            return
        alone = not self._groups and not self._num_running
        self._num_running += 1
        begin = time.perf_counter()
        thread, items = self._thread if alone else self._lanes, [queued.item for queued in taken]
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(thread, self._run_apart, items)
        except Exception as error:  # noqa: BLE001 - no thread was available; one may be for the next batch
            results = [error] * len(taken)
        finally:
            self._num_running -= 1
        seconds = time.perf_counter() - begin
        self._observe_batch(len(taken), seconds)
        latest = seconds / len(taken)
        self._item_seconds += _NEW_WEIGHT * (latest - self._item_seconds) if self._item_seconds else latest
        for queued, result in zip(taken, results, strict=True):
            _deliver(queued.group, queued.position, result)

    def _take(self) -> list[_Queued[_Item, _Result]]:
        """The next batch: the item that has waited longest, and the items in sight with the most similar costs."""
        in_sight = self._in_sight()
        if not in_sight:
            return []
        first = in_sight[0].cost
        room = self._max_batch
        if self._num_lanes > 1:  # a short queue is shared among lanes: more uniform batches, faster answers
            fair = sum(queued.cost for queued in in_sight) / self._num_lanes
            room = max(_MIN_BATCH * room, min(fair, room))
        batch: list[_Queued[_Item, _Result]] = []
        most = 0.0
        for queued in sorted(in_sight, key=lambda queued: abs(queued.cost - first)):
            most = max(most, queued.cost)
            if batch and most * (len(batch) + 1) > room:
                break
            batch.append(queued)
        self._remove(batch)
        return batch

    def _remove(self, taken: Sequence[_Queued[_Item, _Result]]) -> None:
        """Remove these from the queue; a group with items left moves to the end."""
        numbers: dict[_Group[_Item, _Result], set[int]] = {}
        for queued in taken:
            numbers.setdefault(queued.group, set()).add(queued.position)
        now = time.perf_counter()
        for group, removed in numbers.items():
            group.began = group.began or now
            group.waiting = [position for position in group.waiting if position not in removed]
            self._groups.remove(group)
            if group.waiting:
                self._groups.append(group)
        self._num_queued -= len(taken)

    def _in_sight(self) -> list[_Queued[_Item, _Result]]:
        """A few items of each group, enough for several batches, longest-waiting first."""
        in_sight: list[_Queued[_Item, _Result]] = []
        room = self._max_batch * _BATCHES_IN_SIGHT
        for group in self._groups:
            for position in group.waiting[:_ITEMS_A_TURN]:
                queued = _Queued(group, position, self._cost(group.items[position]))
                room -= queued.cost
                in_sight.append(queued)
            if room < 0:
                break
        return in_sight

    def _run_apart(self, items: Sequence[_Item]) -> list[_Result | Exception]:
        """Run a batch; if it fails, run its halves, so that only items that fail alone get an error."""
        try:
            results = [*self._run(items)]
            if len(results) != len(items):
                raise ValueError(f"{self._name}: {len(results)} results for {len(items)} items")
            return results
        except Exception as error:  # noqa: BLE001 - it becomes the answer to the request
            if len(items) == 1:
                return [error]
        middle = len(items) // 2
        return self._run_apart(items[:middle]) + self._run_apart(items[middle:])


class CallQueue(Batcher[Callable[[], Any], Any]):
    """Runs calls one at a time."""

    def __init__(self, name: str, max_queued: int) -> None:
        super().__init__(
            lambda calls: [call() for call in calls], name=name, max_queued=max(1, max_queued), max_batch=1
        )

    async def run(self, call: Callable[[], _Value]) -> tuple[_Value, float]:
        """The result of a call, and the seconds that it waited.

        Raises:
            OverloadedError: too many wait.
        """
        done = cast("Done[_Value]", await self.submit([call]))
        return done.results[0], done.queued


def _refuse(_items: Sequence[Any]) -> NoReturn:
    """What runs items once a batcher has stopped."""
    raise NotReadyError("the server is stopping")


def _deliver(group: _Group[_Item, _Result], position: int, result: _Result | Exception) -> None:
    if group.future.done():
        return
    if isinstance(result, Exception):
        group.future.set_exception(result)
        return
    group.results[position] = result
    if len(group.results) == len(group.items):
        assert group.began is not None
        results = [group.results[at] for at in range(len(group.items))]
        group.future.set_result(Done(results, group.began - group.came, time.perf_counter() - group.began))
