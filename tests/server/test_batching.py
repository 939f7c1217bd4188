"""The server's batch queue: fairness, limits, cancelled groups, failing items and shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2llm.server.batching import Batcher, Slots
from d2llm.server.errors import NotReadyError, OverloadedError
from waiting import PATIENCE, soon


def doubled(items):
    return [2 * item for item in items]


def batcher(run=doubled, **options) -> Batcher:
    queue = Batcher(run, **{"name": "test", "max_queued": 1_000, "max_batch": 8} | options)
    queue.start()
    return queue


class Gate:
    """A batch function that blocks until it is opened and records its batches."""

    def __init__(self):
        self.open = threading.Event()
        self.batches = []

    def __call__(self, items):
        self.batches.append(list(items))
        assert self.open.wait(PATIENCE)
        return doubled(items)


def test_every_group_gets_its_own_results_in_order():
    async def main():
        queue = batcher()
        groups = [list(range(start, start + 7)) for start in range(0, 70, 7)]
        batches = await asyncio.gather(*(queue.submit(group) for group in groups))
        assert [batch.results for batch in batches] == [doubled(group) for group in groups]
        await queue.stop()

    asyncio.run(main())


def test_items_that_wait_during_a_batch_form_the_next_batch():
    async def main():
        gate = Gate()
        queue = batcher(gate)
        first = asyncio.create_task(queue.submit([1]))
        await soon(lambda: gate.batches)
        others = [asyncio.create_task(queue.submit([n])) for n in (2, 3, 4)]
        await soon(lambda: queue.num_queued == 3)
        gate.open.set()
        await asyncio.gather(first, *others)
        assert gate.batches == [[1], [2, 3, 4]]
        await queue.stop()

    asyncio.run(main())


def test_a_small_group_does_not_wait_behind_a_large_one():
    async def main():
        finished = []

        async def submit(name, items):
            await queue.submit(items)
            finished.append(name)

        queue = batcher(lambda items: (time.sleep(0.001), doubled(items))[1], max_batch=16)
        await asyncio.gather(submit("large", list(range(500))), submit("small", [1]))
        assert finished == ["small", "large"]
        await queue.stop()

    asyncio.run(main())


def test_a_batch_is_limited_by_cost_but_has_at_least_one_item():
    async def main():
        gate = Gate()
        gate.open.set()
        queue = batcher(gate, max_batch=10, cost=float)
        await queue.submit([4, 4, 4, 30, 1])
        assert gate.batches == [[4, 4], [4, 1], [30]]
        await queue.stop()

    asyncio.run(main())


def test_a_batch_groups_items_of_similar_cost():
    async def main():
        gate = Gate()
        queue = batcher(gate, max_batch=20, cost=float)
        tasks = [asyncio.create_task(queue.submit([1]))]
        await soon(lambda: gate.batches)
        tasks += [asyncio.create_task(queue.submit([cost])) for cost in (5, 20, 1, 4, 2, 5, 6, 1)]
        await soon(lambda: queue.num_queued == 8)
        gate.open.set()
        await asyncio.gather(*tasks)
        assert gate.batches[1:] == [[5, 5, 4], [20], [1, 1, 2], [6]]
        await queue.stop()

    asyncio.run(main())


def test_the_oldest_item_is_always_in_the_next_batch():
    async def main():
        gate = Gate()
        gate.open.set()
        queue = batcher(gate, max_batch=4, cost=float)
        unlike = asyncio.create_task(queue.submit([4]))
        alike = [asyncio.create_task(queue.submit([1] * 40)) for _ in range(4)]
        await asyncio.gather(unlike, *alike)
        assert [4] in gate.batches[:2]
        await queue.stop()

    asyncio.run(main())


def test_batches_run_in_parallel_and_a_single_one_in_its_thread():
    async def main():
        threads, both = [], threading.Barrier(2)

        def run(items):
            threads.append(threading.current_thread().name)
            if items != [0]:
                both.wait(PATIENCE)  # fails unless two batches run at the same time
            return doubled(items)

        with ThreadPoolExecutor(2, thread_name_prefix="lane") as lanes:
            queue = batcher(run, max_batch=1, lanes=lanes, num_lanes=2)
            assert (await queue.submit([0])).results == [0]
            assert threads == ["test_0"]
            assert (await queue.submit(list(range(1, 9)))).results == doubled(range(1, 9))
            assert all(name.startswith("lane") for name in threads[1:])
            assert (await queue.in_lane(lambda: threading.current_thread().name)).startswith("lane")
            assert queue.num_queued == 0
            await asyncio.wait_for(queue.stop(), PATIENCE)

    asyncio.run(main())


def test_a_full_queue_refuses_a_whole_group_with_retry_after():
    async def main():
        gate = Gate()
        queue = batcher(gate, max_queued=5, max_batch=1)
        admitted = [asyncio.create_task(queue.submit([n])) for n in range(5)]
        await soon(lambda: gate.batches and queue.num_queued == 4)  # one is running, four are waiting
        with pytest.raises(OverloadedError) as error:
            await queue.submit([1, 2])
        assert error.value.problem.status == 429
        assert error.value.problem.retry_after >= 1
        assert queue.num_queued == 4
        unbounded = asyncio.create_task(queue.submit([7, 8], bounded=False))
        gate.open.set()
        assert [batch.results for batch in await asyncio.gather(*admitted)] == [[0], [2], [4], [6], [8]]
        assert (await unbounded).results == [14, 16]
        await queue.stop()

    asyncio.run(main())


def test_a_cancelled_group_frees_its_place():
    async def main():
        gate = Gate()
        queue = batcher(gate, max_batch=1)
        running = asyncio.create_task(queue.submit([1]))
        cancelled = asyncio.create_task(queue.submit([2, 3, 4]))
        await soon(lambda: gate.batches and queue.num_queued == 3)
        cancelled.cancel()
        await soon(lambda: queue.num_queued == 0)
        gate.open.set()
        await running
        await queue.stop()
        assert gate.batches == [[1]]

    asyncio.run(main())


def test_a_bad_item_fails_alone():
    def inverse(items):
        return [1 / item for item in items]

    async def main():
        gate = threading.Event()
        batches: list[list[int]] = []
        queue = batcher(lambda items: (batches.append(items), gate.wait(PATIENCE), inverse(items))[2], max_batch=100)
        tasks = [asyncio.create_task(queue.submit([1]))]
        await soon(lambda: batches)
        tasks += [asyncio.create_task(queue.submit([n])) for n in (2, 0, 4, 5)]
        await soon(lambda: queue.num_queued == 4)  # these four form one batch, including the bad item
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[2], ZeroDivisionError)
        assert [result.results for n, result in enumerate(results) if n != 2] == [[1], [0.5], [0.25], [0.2]]
        assert queue.num_queued == 0
        await queue.stop()

    asyncio.run(main())


def test_errors_around_a_batch_do_not_stop_the_queue():
    async def main():
        failing = [True]

        def run(items):
            return [] if failing[0] else doubled(items)

        with ThreadPoolExecutor(1) as lanes:
            queue = batcher(run, lanes=lanes)
            with pytest.raises(ValueError, match="0 results for 1 items"):
                await queue.submit([1])
            failing[0] = False
            assert (await queue.submit([1])).results == [2]
        queue._thread.shutdown()  # the worker thread accepts no more work
        with pytest.raises(RuntimeError, match="after shutdown"):
            await asyncio.wait_for(queue.submit([1]), PATIENCE)
        with pytest.raises(RuntimeError, match="after shutdown"):
            await asyncio.wait_for(queue.submit([1]), PATIENCE)
        await asyncio.wait_for(queue.stop(), PATIENCE)

    asyncio.run(main())


def test_the_rest_of_a_group_with_a_bad_item_is_skipped():
    async def main():
        processed = []

        def run(items):
            processed.extend(items)
            if 0 in items:
                raise ValueError("zero")
            return items

        queue = batcher(run, max_batch=1)
        with pytest.raises(ValueError, match="zero"):
            await queue.submit([0, *range(1, 200)])
        await queue.stop()
        assert len(processed) < 50

    asyncio.run(main())


def test_stopping_finishes_admitted_work_and_refuses_more():
    async def main():
        queue = batcher(lambda items: (time.sleep(0.01), doubled(items))[1], max_batch=1)
        tasks = [asyncio.create_task(queue.submit([n])) for n in range(5)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(queue.stop())
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match="stopping"):
            await queue.submit([9])
        await stopping
        assert [task.result().results for task in tasks] == [[0], [2], [4], [6], [8]]

    asyncio.run(main())


def test_stopping_abandons_work_that_takes_too_long():
    async def main():
        gate = Gate()
        queue = batcher(gate, max_batch=1)
        tasks = [asyncio.create_task(queue.submit([n])) for n in range(3)]
        await soon(lambda: gate.batches)
        await queue.stop(timeout=0.05)
        gate.open.set()
        for task in tasks[1:]:
            with pytest.raises(NotReadyError, match="stopped before"):
                await task
        tasks[0].cancel()

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_an_idle_queue_keeps_nothing_of_its_last_batch(fails: bool):
    class Item:
        pass

    def run(items):
        if fails:
            raise ValueError("a bad item")
        return [1 for _ in items]

    async def main():
        queue = batcher(run)
        item = Item()
        kept = weakref.ref(item)
        answers = await asyncio.gather(queue.submit([item]), return_exceptions=True)
        assert isinstance(answers[0], ValueError) == fails
        del item, answers

        def is_gone() -> bool:
            gc.collect()
            return kept() is None

        await soon(is_gone)
        await queue.stop()

    asyncio.run(main())


def test_times_and_batch_sizes_are_reported():
    async def main():
        batches = []
        queue = batcher(
            lambda items: (time.sleep(0.02), doubled(items))[1], observe_batch=lambda *batch: batches.append(batch)
        )
        first, second = asyncio.create_task(queue.submit([1])), asyncio.create_task(queue.submit([2] * 20))
        await asyncio.gather(first, second)
        assert first.result().worked >= 0.02
        assert second.result().queued >= 0
        assert sum(size for size, _ in batches) == 21
        assert all(seconds >= 0.02 for _, seconds in batches)
        await queue.stop()

    asyncio.run(main())


def test_places_are_limited_and_always_freed():
    slots = Slots(2, retry_after=3)
    with slots, slots:
        with pytest.raises(OverloadedError) as error, slots:
            pass
        assert error.value.problem.retry_after == 3
    with pytest.raises(ValueError, match="inside"), slots:
        raise ValueError("inside")
    with slots, slots:
        pass
