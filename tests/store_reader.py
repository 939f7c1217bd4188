"""A process that opens a store and runs the command on each input line; each answer is a line of JSON.

Argument: optionally the id of the user to switch to once all libraries are loaded.
Commands: ``open FOLDER``, ``open`` (switches to the latest version), ``read``, ``search WORD``, ``write``.
"""

from __future__ import annotations

import json
import mmap  # noqa: F401  # the other user may not be able to import what is read late
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss  # noqa: F401
import numpy as np

from d2llm.core.errors import D2LLMError
from d2llm.core.types import Passage
from d2llm.store.index_store import IndexStore
from d2llm.store.view import PassageView
from tiny_store import DIM, live_rows, put


def read(view: PassageView) -> dict[str, Any]:
    """id -> text and vector of all passages."""
    rows = live_rows(view)
    passages, vectors = view.passages(rows), view.vectors(rows)
    return {passage.id: [passage.text, vector.tolist()] for passage, vector in zip(passages, vectors, strict=True)}


def search(view: PassageView, word: str) -> list[list[str]]:
    """Ids found by a vector scan and by word search."""
    query = np.ones(DIM, np.float32)
    return [view.ids(result.rows) for result in (view.scan(query, 5), view.match(word, 5))]


def write(store: IndexStore) -> list[str]:
    """The result or error of each kind of write."""
    calls: list[Callable[[], object]] = [
        lambda: put(store, [Passage("new", "text")]),
        lambda: store.delete(["p1"]),
        lambda: store.compact(dense=True),
        lambda: store.snapshot("b"),
        lambda: store.restore("a"),
        lambda: store.drop_snapshot("a"),
        store.update_word_files,
    ]
    results: list[str] = []
    for call in calls:
        try:
            call()
            results.append("done")
        except D2LLMError as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def answer(store: IndexStore, view: PassageView, what: str, word: str) -> object:
    """Run the command of one line."""
    if what == "read":
        return read(view)
    if what == "search":
        return search(view, word)
    return write(store) if what == "write" else len(view)


def main() -> None:
    """Process commands until the input ends."""
    if len(sys.argv) > 1:
        os.setgroups([])
        os.setgid(int(sys.argv[1]))
        os.setuid(int(sys.argv[1]))
    store: IndexStore | None = None
    view: PassageView | None = None
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, _, word = line.strip().partition(" ")
        if what == "open":
            store = IndexStore.open(Path(word)) if word else store
            assert store is not None
            view = PassageView(store)
        assert store is not None
        assert view is not None
        print(json.dumps(answer(store, view, what, word)), flush=True)


if __name__ == "__main__":
    main()
