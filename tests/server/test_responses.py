"""Answers: large ones are made and serialized beside the event loop, and what the machine lacks is said."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.core.errors import DataFormatError, StorageError
from d2llm.server.errors import problem_for_client
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


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (errno.EMFILE, 503, "too many files open"),
        (errno.ENFILE, 503, "too many files open"),
        (errno.ENOSPC, 507, "disk is full"),
        (errno.EFBIG, 507, "disk is full"),
        (errno.EIO, 500, "internal error"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_what_the_machine_lacks_is_said(code: int, status: int, words: str, is_wrapped: bool):
    """Also where a file that could not be opened was taken for damaged; no path is shown."""
    error: Exception = OSError(code, os.strerror(code), "/secret/manifest.json")
    if is_wrapped:
        error, error.__cause__ = DataFormatError("x", "cannot be read"), error
    problem = problem_for_client(error)
    assert (problem.status, "secret" in problem.message) == (status, False)
    assert words in problem.message


def test_what_the_store_says_is_kept():
    error = StorageError("the index cannot be written: no space left")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    problem = problem_for_client(error)
    assert (problem.status, problem.message) == (507, str(error))
