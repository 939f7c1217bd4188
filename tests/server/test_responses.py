"""Large answers are made and serialized beside the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.server.response_schemas import response_of


@pytest.mark.parametrize(("num_items", "elsewhere"), [(1, False), (64, False), (65, True), (2_000, True)])
def test_a_response_of_many_items_is_made_in_another_thread(num_items: int, elsewhere: bool):
    threads: set[threading.Thread] = set()

    class Vector:
        def tolist(self) -> list[float]:
            threads.add(threading.current_thread())
            return [1.5]

    def make() -> Any:
        threads.add(threading.current_thread())
        return [Vector() for _ in range(num_items)]

    response = asyncio.run(response_of(make, num_items, {"X-Warning": "w"}))
    assert json.loads(bytes(response.body)) == [[1.5]] * num_items
    assert response.headers["X-Warning"] == "w"
    assert (threading.current_thread() not in threads) == elsewhere


def test_others_work_while_vectors_are_serialized():
    vectors = list(np.random.default_rng(0).normal(size=(4_000, 384)).astype(np.float32))

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        response = asyncio.create_task(response_of(lambda: vectors, len(vectors)))
        began = before = loop.time()
        longest = 0.0
        while not response.done():
            await asyncio.sleep(0)
            longest, before = max(longest, loop.time() - before), loop.time()
        await response
        return longest, loop.time() - began

    pauses = [asyncio.run(main()) for _ in range(3)]
    assert min(longest / whole for longest, whole in pauses) < 0.5
