"""The server's queue: turns, bounds, cancelled groups, bad items, stopping."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2llm.server.batching import Batcher, Places
from d2llm.server.errors import NotReadyError, OverloadedError
from waiting import PATIENCE, soon


def doubled(items):
    return [2 * item for item in items]


def batcher(run=doubled, **options) -> Batcher:
    made = Batcher(run, **{"name": "test", "max_queued": 1_000, "max_batch": 8} | options)
    made.start()
    return made


class Gate:
    """A run that waits until it is let through, and remembers its batches."""

    def __init__(self):
        self.open = threading.Event()
        self.batches = []

    def __call__(self, items):
        self.batches.append(list(items))
        assert self.open.wait(PATIENCE)
        return doubled(items)


def test_every_group_gets_its_own_results_in_order():
    async def main():
        work = batcher()
        groups = [list(range(start, start + 7)) for start in range(0, 70, 7)]
        done = await asyncio.gather(*(work.submit(group) for group in groups))
        assert [one.results for one in done] == [doubled(group) for group in groups]
        await work.stop()

    asyncio.run(main())


def test_what_waits_while_a_batch_runs_is_the_next_batch():
    async def main():
        gate = Gate()
        work = batcher(gate)
        first = asyncio.create_task(work.submit([1]))
        await soon(lambda: gate.batches)
        others = [asyncio.create_task(work.submit([n])) for n in (2, 3, 4)]
        await soon(lambda: work.num_queued == 3)
        gate.open.set()
        await asyncio.gather(first, *others)
        assert gate.batches == [[1], [2, 3, 4]]
        await work.stop()

    asyncio.run(main())


def test_a_small_group_does_not_wait_behind_a_large_one():
    async def main():
        finished = []

        async def ask(name, items):
            await work.submit(items)
            finished.append(name)

        work = batcher(lambda items: (time.sleep(0.001), doubled(items))[1], max_batch=16)
        await asyncio.gather(ask("large", list(range(500))), ask("small", [1]))
        assert finished == ["small", "large"]
        await work.stop()

    asyncio.run(main())


def test_a_batch_holds_what_its_costs_allow_and_one_item_at_least():
    async def main():
        gate = Gate()
        gate.open.set()
        work = batcher(gate, max_batch=10, cost=float)
        await work.submit([4, 4, 4, 30, 1])
        assert gate.batches == [[4, 4], [4, 1], [30]]
        await work.stop()

    asyncio.run(main())


def test_a_batch_holds_what_is_most_like_its_first():
    async def main():
        gate = Gate()
        work = batcher(gate, max_batch=20, cost=float)
        asked = [asyncio.create_task(work.submit([1]))]
        await soon(lambda: gate.batches)
        asked += [asyncio.create_task(work.submit([cost])) for cost in (5, 20, 1, 4, 2, 5, 6, 1)]
        await soon(lambda: work.num_queued == 8)
        gate.open.set()
        await asyncio.gather(*asked)
        assert gate.batches[1:] == [[5, 5, 4], [20], [1, 1, 2], [6]]
        await work.stop()

    asyncio.run(main())


def test_what_waits_longest_is_in_the_next_batch_whatever_comes():
    async def main():
        gate = Gate()
        gate.open.set()
        work = batcher(gate, max_batch=4, cost=float)
        unlike = asyncio.create_task(work.submit([4]))
        alike = [asyncio.create_task(work.submit([1] * 40)) for _ in range(4)]
        await asyncio.gather(unlike, *alike)
        assert [4] in gate.batches[:2]
        await work.stop()

    asyncio.run(main())


def test_batches_run_side_by_side_and_one_alone_in_its_own_thread():
    async def main():
        threads, both = [], threading.Barrier(2)

        def run(items):
            threads.append(threading.current_thread().name)
            if items != [0]:
                both.wait(PATIENCE)  # breaks unless two run at a time
            return doubled(items)

        with ThreadPoolExecutor(2, thread_name_prefix="lane") as lanes:
            work = batcher(run, max_batch=1, lanes=lanes, num_lanes=2)
            assert (await work.submit([0])).results == [0]
            assert threads == ["test_0"]
            assert (await work.submit(list(range(1, 9)))).results == doubled(range(1, 9))
            assert all(name.startswith("lane") for name in threads[1:])
            assert (await work.in_lane(lambda: threading.current_thread().name)).startswith("lane")
            assert work.num_queued == 0
            await asyncio.wait_for(work.stop(), PATIENCE)

    asyncio.run(main())


def test_a_full_queue_refuses_a_group_whole_and_says_when_to_come_again():
    async def main():
        gate = Gate()
        work = batcher(gate, max_queued=5, max_batch=1)
        admitted = [asyncio.create_task(work.submit([n])) for n in range(5)]
        await soon(lambda: gate.batches and work.num_queued == 4)  # one of them runs now, four wait
        with pytest.raises(OverloadedError) as refused:
            await work.submit([1, 2])
        assert refused.value.problem.status == 429
        assert refused.value.problem.retry_after >= 1
        assert work.num_queued == 4
        own = asyncio.create_task(work.submit([7, 8], bounded=False))
        gate.open.set()
        assert [done.results for done in await asyncio.gather(*admitted)] == [[0], [2], [4], [6], [8]]
        assert (await own).results == [14, 16]
        await work.stop()

    asyncio.run(main())


def test_a_group_that_nobody_waits_for_frees_its_place():
    async def main():
        gate = Gate()
        work = batcher(gate, max_batch=1)
        running = asyncio.create_task(work.submit([1]))
        gone = asyncio.create_task(work.submit([2, 3, 4]))
        await soon(lambda: gate.batches and work.num_queued == 3)
        gone.cancel()
        await soon(lambda: work.num_queued == 0)
        gate.open.set()
        await running
        await work.stop()
        assert gate.batches == [[1]]

    asyncio.run(main())


def test_a_bad_item_fails_alone():
    def inverse(items):
        return [1 / item for item in items]

    async def main():
        gate = threading.Event()
        batches: list[list[int]] = []
        work = batcher(lambda items: (batches.append(items), gate.wait(PATIENCE), inverse(items))[2], max_batch=100)
        asked = [asyncio.create_task(work.submit([1]))]
        await soon(lambda: batches)
        asked += [asyncio.create_task(work.submit([n])) for n in (2, 0, 4, 5)]
        await soon(lambda: work.num_queued == 4)  # which are one batch, the bad item among them
        gate.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[2], ZeroDivisionError)
        assert [answer.results for n, answer in enumerate(answers) if n != 2] == [[1], [0.5], [0.25], [0.2]]
        assert work.num_queued == 0
        await work.stop()

    asyncio.run(main())


def test_what_goes_wrong_around_a_batch_does_not_end_the_work():
    async def main():
        lost = [True]

        def run(items):
            return [] if lost[0] else doubled(items)

        with ThreadPoolExecutor(1) as lanes:
            work = batcher(run, lanes=lanes)
            with pytest.raises(ValueError, match="0 results for 1 items"):
                await work.submit([1])
            lost[0] = False
            assert (await work.submit([1])).results == [2]
        work._thread.shutdown()  # no thread takes anything any more
        with pytest.raises(RuntimeError, match="after shutdown"):
            await asyncio.wait_for(work.submit([1]), PATIENCE)
        with pytest.raises(RuntimeError, match="after shutdown"):
            await asyncio.wait_for(work.submit([1]), PATIENCE)
        await asyncio.wait_for(work.stop(), PATIENCE)

    asyncio.run(main())


def test_the_rest_of_a_group_with_a_bad_item_is_not_worked_on():
    async def main():
        seen = []

        def run(items):
            seen.extend(items)
            if 0 in items:
                raise ValueError("zero")
            return items

        work = batcher(run, max_batch=1)
        with pytest.raises(ValueError, match="zero"):
            await work.submit([0, *range(1, 200)])
        await work.stop()
        assert len(seen) < 50

    asyncio.run(main())


def test_stopping_finishes_what_was_admitted_and_takes_nothing_more():
    async def main():
        work = batcher(lambda items: (time.sleep(0.01), doubled(items))[1], max_batch=1)
        asked = [asyncio.create_task(work.submit([n])) for n in range(5)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(work.stop())
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError, match="stopping"):
            await work.submit([9])
        await stopping
        assert [one.result().results for one in asked] == [[0], [2], [4], [6], [8]]

    asyncio.run(main())


def test_stopping_gives_up_what_takes_too_long():
    async def main():
        gate = Gate()
        work = batcher(gate, max_batch=1)
        asked = [asyncio.create_task(work.submit([n])) for n in range(3)]
        await soon(lambda: gate.batches)
        await work.stop(timeout=0.05)
        gate.open.set()
        for waiting in asked[1:]:
            with pytest.raises(NotReadyError, match="stopped before"):
                await waiting
        asked[0].cancel()

    asyncio.run(main())


def test_times_and_batches_are_told():
    async def main():
        told = []
        work = batcher(
            lambda items: (time.sleep(0.02), doubled(items))[1], observe_batch=lambda *batch: told.append(batch)
        )
        first, second = asyncio.create_task(work.submit([1])), asyncio.create_task(work.submit([2] * 20))
        await asyncio.gather(first, second)
        assert first.result().worked >= 0.02
        assert second.result().queued >= 0
        assert sum(size for size, _ in told) == 21
        assert all(seconds >= 0.02 for _, seconds in told)
        await work.stop()

    asyncio.run(main())


def test_places_are_refused_when_they_are_taken_and_freed_whatever_happens():
    places = Places(2, retry_after=3)
    with places, places:
        with pytest.raises(OverloadedError) as refused, places:
            pass
        assert refused.value.problem.retry_after == 3
    with pytest.raises(ValueError, match="inside"), places:
        raise ValueError("inside")
    with places, places:
        pass
