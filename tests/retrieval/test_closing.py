"""An index is closed at the end of a ``with`` block; what is done with it after that is an error that says so."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from d2llm import Index, Passage
from d2llm.core.errors import InputError
from d2llm.retrieval.open_index import OpenIndex
from fake_models import FakeStudent, FakeTeacher

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "add": ([Passage("b", "a text")],),
    "upsert": ([Passage("b", "a text")],),
    "upsert_documents": ([Passage("b", "a text")],),
    "delete": ("a",),
    "delete_documents": ("a",),
    "snapshot": ("name",),
    "restore": ("name",),
    "get": ("a",),
    "get_document": ("a",),
    "missing": ("a",),
    "search": ("a",),
    "around": ([],),
    "context": ("a",),
    "measure_error": (FakeTeacher(), "a"),
    "scoring_corpus": (FakeStudent(),),
}
USES: dict[str, Callable[[Index], Any]] = {
    **{
        name: lambda index, name=name: getattr(index, name)(*ARGUMENTS.get(name, ()))
        for name, member in {**vars(OpenIndex), **vars(Index)}.items()
        if inspect.isfunction(member) and not name.startswith("_") and name != "close"
    },
    **{
        name: lambda index, name=name: getattr(index, name)
        for name, member in {**vars(OpenIndex), **vars(Index)}.items()
        if isinstance(member, property | cached_property) and not name.startswith("_") and name != "folder"
    },
    "len": len,
    "with": lambda index: index.__enter__(),
}


@pytest.fixture(scope="module", params=[None, 2], ids=["one", "sharded"])
def closed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("closed") / "index"
    with Index.create(folder, FakeStudent(), num_shards=request.param) as index:
        index.upsert([Passage("a", "a text")])
        assert len(index.search("text")) == 1
    return index


@pytest.mark.parametrize("use", USES)
def test_a_closed_index_says_so(closed: Index, use: str):
    with pytest.raises(InputError, match=r"index: this Index was closed; open it again with Index\.open"):
        USES[use](closed)


def test_the_walk_has_every_method():
    assert {"search", "upsert", "stats", "verify", "compact", "student", "view", "chunking", "spec"} <= USES.keys()


def test_closing_again_does_nothing_and_another_object_is_open(closed: Index):
    closed.close()
    assert closed.folder.is_dir()
    with Index.open(closed.folder, FakeStudent()) as again:
        assert [passage.id for passage in again.get("a")] == ["a"]


def test_an_error_in_the_block_is_not_hidden(tmp_path: Path):
    with pytest.raises(KeyError), Index.create(tmp_path / "index", FakeStudent()):
        raise KeyError("mine")


@pytest.mark.parametrize("num_shards", [None, 2])
@pytest.mark.parametrize("close", [True, False])
def test_what_nobody_uses_leaves_memory_without_a_garbage_collection(num_shards: int | None, close: bool, tmp_path):
    """And with it the files that it has open, whose space on the disk is not free before."""
    gc.collect()
    gc.disable()
    try:
        index = Index.create(tmp_path / "index", FakeStudent(), num_shards=num_shards)
        index.upsert([Passage("a", "a text"), Passage("b", "another")])
        assert len(index.search("text", exact=True)) == 2
        left = [weakref.ref(one) for one in (index, index.view, *index.storage.stores)]
        if close:
            index.close()
        del index
        assert not any(one() for one in left)
    finally:
        gc.enable()
