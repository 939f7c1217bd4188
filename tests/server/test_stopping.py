"""Stopping a server during a write."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm import Passage, Student
from d2llm.server.index_service import IndexService, new_readings
from d2llm.server.model_service import ModelService
from d2llm.server.served_version import ServedVersion
from d2llm.server.student_pool import StudentPool
from tiny_server import write_tiny_index


def test_a_long_write_does_not_delay_the_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tiny_index(tmp_path, 5)
    student = Student.load(tmp_path / "student-0", dtype="float32")
    encode, calls = student.encode_tokens, 0

    def slow(ids: Sequence[Sequence[int]]) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(0.1)
        return encode(ids)

    monkeypatch.setattr(student, "encode_tokens", slow)

    async def main() -> None:
        models = ModelService(student, "tiny", batch_tokens=16)
        index = IndexService("index", ServedVersion(folder, StudentPool(lambda _: models)), new_readings(1))
        models.start()
        index.start()
        passages = [Passage(f"new{n}", f"the cat number {n} sat on the mat and slept") for n in range(500)]
        writing = asyncio.create_task(index.upsert(passages))
        while not calls:
            await asyncio.sleep(0.01)
        writing.cancel()  # as uvicorn does when the time is up
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        await index.stop(0.5)
        await models.stop(0.5)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 45  # encoding 500 texts one by one takes 50 s
    assert calls < 200
