"""One ``Index`` in several threads, and in processes that are forked or get it pickled."""

from __future__ import annotations

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch

from d2llm import Index, Passage
from d2llm.core.errors import InputError, ModelError
from d2llm.models.engines import engines, lean
from fake_models import FakeStudent

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def index(tmp_path) -> Index:
    index = Index.create(tmp_path / "index", FakeStudent())
    index.upsert([Passage("a", "a text"), Passage("b", "another")])
    return index


@pytest.mark.parametrize("again", [lambda index: pickle.loads(pickle.dumps(index)), copy.copy, copy.deepcopy])
def test_a_copy_is_opened_again(index: Index, again):
    other = again(index)
    index.close()
    assert [passage.id for passage in other.get(["b"])] == ["b"]
    assert len(other.search("text")) == 2


def exit_code_of_fork(work) -> int:
    """What a forked process exits with: what ``work`` returns, or 1 after an error."""
    process = os.fork()
    if process == 0:
        try:
            os._exit(work())
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def refusal(use, kind: type[Exception]) -> int:
    """0 if it is refused because of a fork."""
    with pytest.raises(kind, match="was forked"):
        use()
    return 0


@needs_fork
@pytest.mark.parametrize("use", [lambda index: index.search("text"), lambda index: index.get("a"), len, Index.refresh])
def test_an_index_from_before_a_fork_is_refused(index: Index, use):
    use(index)
    assert exit_code_of_fork(lambda: refusal(lambda: use(index), InputError)) == 0
    use(index)


@needs_fork
def test_an_engine_from_before_a_fork_is_refused(monkeypatch):
    monkeypatch.setattr(engines, "_graph", lambda *_: None)
    monkeypatch.setitem(engines._RUNTIMES, "onnx", lambda *_: lambda *given: engines.ReadTexts._make(given))
    engine: Any = engines._open(cast("Any", None), "onnx", torch.float32)
    ids = np.zeros((1, 1), np.int64)
    assert engine.run(ids, ids).vectors is ids
    assert exit_code_of_fork(lambda: refusal(lambda: engine.run(ids, ids), ModelError)) == 0


@needs_fork
def test_torch_uses_one_core_in_a_forked_process():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert exit_code_of_fork(lambda: 10 + torch.get_num_threads()) == 11
    finally:
        torch.set_num_threads(before)


def test_of_several_threads_one_loads_the_student(index: Index, monkeypatch):
    loaded = []

    def load(*_, **__):
        loaded.append(1)
        return FakeStudent()

    monkeypatch.setattr(lean, "load_to_search", load)
    other = Index.open(index.folder, "student")
    with ThreadPoolExecutor(16) as threads:
        rankings = list(threads.map(lambda _: other.search("text"), range(32)))
    assert len(loaded) == 1
    assert all(len(ranking) == 2 for ranking in rankings)


def test_a_folder_is_opened_by_open():
    with pytest.raises(InputError, match=r"Index\.open"):
        Index("folder")  # pyright: ignore[reportArgumentType]
