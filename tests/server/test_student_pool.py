"""Students shared by indexes: loaded once, stopped after the last index has left them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from d2llm.core.errors import ModelError
from d2llm.server.student_pool import StudentPool


class FakeStudent:
    def __init__(self, fingerprint: str, tokens: str | None = None, words: str | None = None) -> None:
        self.fingerprint = fingerprint
        self.token_fingerprint = tokens
        self.expansion_fingerprint = words
        self.is_retired = False

    async def retire(self) -> None:
        self.is_retired = True


def index_of(fingerprint: str, tokens: str | None = None, words: str | None = None) -> Any:
    """As much of an index as the pool reads."""
    names = {"student": fingerprint, "token_projection": tokens, "document_expansion": words}
    return SimpleNamespace(manifest=names)


def test_a_student_retires_when_the_last_index_leaves_it():
    pool = StudentPool(lambda store: FakeStudent(store.manifest["student"]))  # pyright: ignore[reportArgumentType]
    first, other, again = (pool.take(index_of(name)) for name in ("a", "b", "a"))
    assert first is again
    assert pool.students == (first, other)
    asyncio.run(pool.leave(first))
    assert not first.is_retired  # pyright: ignore[reportAttributeAccessIssue]
    asyncio.run(pool.leave(first))
    assert first.is_retired  # pyright: ignore[reportAttributeAccessIssue]
    assert pool.students == (other,)
    assert pool.take(index_of("a")) is not first


def test_a_new_projection_of_tokens_is_another_student():
    found = iter(["old", "new"])
    pool = StudentPool(lambda store: FakeStudent("a", next(found)))  # pyright: ignore[reportArgumentType]
    old, new = pool.take(index_of("a", "old")), pool.take(index_of("a", "new"))
    assert old is not new
    assert pool.take(index_of("a", "new")) is new
    assert pool.take(index_of("a")) is old  # an index without token embeddings takes either
    replaced = StudentPool(lambda _: FakeStudent("a", "new"))  # pyright: ignore[reportArgumentType]
    assert replaced.take(index_of("a", "new")) is replaced.take(index_of("a", "old"))  # whose index then refuses it
    assert len(replaced.students) == 1
    for student in (new, new, old):
        asyncio.run(pool.leave(student))
    assert pool.students == (old,)


def test_other_words_for_passages_are_another_student():
    found = iter([("projection", None), (None, "words")])
    pool = StudentPool(lambda store: FakeStudent("a", *next(found)))  # pyright: ignore[reportArgumentType]
    tokens, words = pool.take(index_of("a", "projection")), pool.take(index_of("a", None, "words"))
    assert tokens is not words
    assert pool.take(index_of("a", None, "words")) is words
    assert pool.take(index_of("a")) is tokens


def test_indexes_opened_at_once_load_their_student_once_and_do_not_wait_for_another():
    began, may_end, loads = threading.Event(), threading.Event(), []

    def load(store: Any) -> Any:
        loads.append(store.manifest["student"])
        if store.manifest["student"] == "slow":
            began.set()
            assert may_end.wait(60)
        return FakeStudent(store.manifest["student"])

    pool = StudentPool(load)
    ready = pool.take(index_of("ready"))
    with ThreadPoolExecutor(3) as threads:
        slow = [threads.submit(pool.take, index_of("slow")) for _ in range(3)]
        assert began.wait(60)
        assert pool.take(index_of("ready")) is ready
        may_end.set()
        assert len({id(future.result()) for future in slow}) == 1
    assert loads == ["ready", "slow"]


def test_a_student_that_cannot_be_loaded_is_tried_again():
    problems = [ModelError("no memory")]

    def load(store: Any) -> Any:
        if problems:
            raise problems.pop()
        return FakeStudent(store.manifest["student"])

    pool = StudentPool(load)
    with pytest.raises(ModelError, match="no memory"):
        pool.take(index_of("a"))
    assert pool.students == ()
    assert pool.take(index_of("a")).fingerprint == "a"
