"""Queries whose tokens count are encoded in batches with those of other clients, and each gets what is its own."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm import Student
from d2llm.core.errors import ModelError
from d2llm.models.token_vectors import TokenProjection
from d2llm.server.errors import NotReadyError, OverloadedError
from d2llm.server.model_service import Encoded, ModelService
from tiny_server import write_tiny_student
from waiting import PATIENCE, soon

QUERIES = ("the cat by the sea", "bread and salt", "a train in the snow", "winter at noon", "sun " * 90, "star")
BAD = "a dog that cannot be read"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    student = Student.load(write_tiny_student(tmp_path_factory.mktemp("queries")), device="cpu", dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rarity = [0.0] * 4 + [1.0] * (len(student.backbone.tokenizer) - 4)
        student.token_projection = TokenProjection(student.backbone.dim, 8, rarity)
    return student


class Recorded:
    """A student's ``encode_token_rows`` that records its calls; the first waits until ``open`` is set."""

    def __init__(self, student: Student) -> None:
        self._encode, self._student = student.encode_token_rows, student
        self.calls: list[list[list[int]]] = []
        self.open = threading.Event()

    def __call__(self, ids: Sequence[Sequence[int]], kind: Any, starts: Sequence[int]) -> Any:
        self.calls.append([*map(list, ids)])
        assert self.open.wait(PATIENCE)
        vectors, rows = self._encode(ids, kind, starts)
        (bad,) = self.ids_of([BAD])
        if bad in self.calls[-1]:
            vectors[self.calls[-1].index(bad)] = np.nan
        return vectors, rows

    def ids_of(self, texts: Sequence[str], instruction: str | None = None) -> list[list[int]]:
        """The token ids of queries."""
        return self._student.tokenize(texts, "query", instruction=instruction).ids


@pytest.fixture
def recorded(student: Student, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded(student)
    monkeypatch.setattr(student, "encode_token_rows", recorded)
    return recorded


@pytest.fixture
def one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch at a time, so that what waits is the next."""
    monkeypatch.setattr("d2llm.server.model_service.torch", SimpleNamespace(get_num_threads=lambda: 0))


def expected(student: Student, query: str, instruction: str | None = None) -> Any:
    unrecorded = copy.copy(student)
    unrecorded.__dict__.pop("encode_token_rows", None)
    read = unrecorded.encode_with_tokens([query], "query", instruction=instruction)
    assert read.tokens is not None
    return read


def check(student: Student, encoded: Encoded, query: str, instruction: str | None = None) -> None:
    alone = expected(student, query, instruction)
    np.testing.assert_allclose(encoded.vectors, alone.vectors, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoded.tokens[0], alone.tokens.vectors, rtol=1e-4, atol=1e-5)
    assert encoded.num_tokens == alone.lengths
    assert encoded.truncated == alone.truncated


async def waiting(models: ModelService, recorded: Recorded, queries: Sequence[str]) -> list[Any]:
    """Tasks of these queries, which wait while another one is read."""
    models.start()
    first = asyncio.create_task(models.encode(["rain"], "query", with_tokens=True))
    await soon(lambda: recorded.calls)
    tasks = [asyncio.create_task(models.encode([query], "query", with_tokens=True)) for query in queries]
    await soon(lambda: models.num_queued == len(queries))
    return [first, *tasks]


@pytest.mark.usefixtures("one_lane")
def test_queries_that_wait_are_read_together(student, recorded):
    async def main():
        models = ModelService(student, "tiny", batch_tokens=4_096)
        tasks = await waiting(models, recorded, QUERIES)
        recorded.open.set()
        _, *encoded = await asyncio.gather(*tasks)
        assert [sorted(ids) for ids in recorded.calls] == [
            recorded.ids_of(["rain"]),
            sorted(recorded.ids_of(QUERIES)),
        ]
        for query, one in zip(QUERIES, encoded, strict=True):
            check(student, one, query)
        assert [bool(one.truncated) for one in encoded] == [query.startswith("sun") for query in QUERIES]
        await models.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("one_lane")
def test_instructions_and_plain_texts_share_the_queue(student, recorded):
    async def main():
        models = ModelService(student, "tiny")
        tasks = await waiting(models, recorded, QUERIES[:2])
        told = [
            asyncio.create_task(models.encode([query], "query", with_tokens=True, instruction="find a book: "))
            for query in QUERIES[:2]
        ]
        plain = asyncio.create_task(models.encode(["a ship at noon"], "passage"))
        await soon(lambda: models.num_queued == 5)
        recorded.open.set()
        await asyncio.gather(*tasks)
        for query, task in zip(QUERIES, told, strict=False):
            check(student, await task, query, "find a book: ")
        vectors = student.encode_passages(["a ship at noon"]).vectors
        np.testing.assert_allclose((await plain).vectors, vectors, rtol=1e-4, atol=1e-5)
        both = [*recorded.ids_of(QUERIES[:2]), *recorded.ids_of(QUERIES[:2], "find a book: ")]
        assert [sorted(ids) for ids in recorded.calls] == [recorded.ids_of(["rain"]), sorted(both)]
        await models.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("one_lane")
def test_a_query_that_cannot_be_read_fails_alone(student, recorded):
    async def main():
        models = ModelService(student, "tiny")
        tasks = await waiting(models, recorded, [QUERIES[0], BAD, QUERIES[1]])
        recorded.open.set()
        _, one, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(bad, ModelError)
        check(student, one, QUERIES[0])
        check(student, other, QUERIES[1])
        assert len(recorded.calls) == 2  # the others were not read again
        await models.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("one_lane")
def test_a_client_that_leaves_takes_its_query_along(student, recorded):
    async def main():
        models = ModelService(student, "tiny")
        _, gone, stays = tasks = await waiting(models, recorded, QUERIES[:2])
        gone.cancel()
        await soon(lambda: models.num_queued == 1)
        recorded.open.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        check(student, await stays, QUERIES[1])
        assert recorded.calls == [recorded.ids_of(["rain"]), recorded.ids_of([QUERIES[1]])]
        await models.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("one_lane")
def test_a_full_queue_refuses_and_a_stopping_one_finishes(student, recorded):
    async def main():
        models = ModelService(student, "tiny", queue_texts=2)
        tasks = await waiting(models, recorded, QUERIES[:2])
        with pytest.raises(OverloadedError):
            await models.encode([QUERIES[2]], "query", with_tokens=True)
        stopped = asyncio.create_task(models.stop(PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError):
            await models.encode([QUERIES[2]], "query", with_tokens=True)
        recorded.open.set()
        for query, encoded in zip(["rain", *QUERIES], await asyncio.gather(*tasks), strict=False):
            check(student, encoded, query)
        await stopped

    asyncio.run(main())
