"""PassageStore: a file-backed mapping returns the passages it was given."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.types import Passage
from d2llm.data import beir
from d2llm.data.beir import PassageStore

TEXT = st.text(st.characters(), max_size=20)  # including lone surrogates
PASSAGES = st.dictionaries(TEXT, st.tuples(TEXT, TEXT), max_size=12)


@given(PASSAGES, st.integers(1, 200))
def test_store_equals_the_mapping_it_was_made_from(contents, read_at_once):
    passages = {key: Passage(key, text, title) for key, (text, title) in contents.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beir, "_READ_AT_ONCE", read_at_once)
        store = PassageStore(passages.values())
        assert len(store) == len(passages)
        assert list(store) == list(passages)
        assert list(store.values()) == list(passages.values())
        assert list(store.values()) == list(passages.values())  # can be iterated twice
        assert dict(store) == passages
        assert all(store[key] == passage for key, passage in passages.items())


def test_unknown_ids_are_absent():
    store = PassageStore([Passage("a", "text")])
    assert "a" in store
    assert "b" not in store
    assert 1 not in store
    with pytest.raises(KeyError, match="b"):
        _ = store["b"]


def test_ids_with_equal_hashes_are_distinguished(monkeypatch):
    monkeypatch.setattr(beir, "_key", lambda _: 7)
    store = PassageStore(Passage(name, name.upper()) for name in "abc")
    assert [store[name].text for name in "bca"] == ["B", "C", "A"]
    assert "d" not in store
    assert not store.has_repeats
    assert PassageStore(Passage(name, name) for name in "abcb").has_repeats


def test_repeated_ids_are_detected():
    assert not PassageStore(Passage(name, "same") for name in "abc").has_repeats
    assert not PassageStore([]).has_repeats
    twice = PassageStore(Passage(name, str(n)) for n, name in enumerate("abcb"))
    assert twice.has_repeats
    assert twice["b"].text == "1"


def test_threads_can_read_concurrently():
    store = PassageStore(Passage(f"p{n}", f"text {n} " * (n % 50)) for n in range(500))
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: store[f"p{n % 500}"].text, range(4000)))
    assert texts == [f"text {n % 500} " * (n % 500 % 50) for n in range(4000)]


def test_the_file_has_no_name_and_cannot_be_pickled(tmp_path):
    store = PassageStore([Passage("a", "text")], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        pickle.dumps(store)
