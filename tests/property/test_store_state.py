"""After any sequence of changes, a store holds the same as a plain dictionary.

``D2LLM_TEST_TIMES=10`` tries ten times as many sequences.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.ops.bm25_words import terms
from d2llm.store.bm25 import WordIndex
from d2llm.store.index_manifest import VectorCopies
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import stats, verify
from d2llm.store.view import PassageView
from d2llm.store.word_segment import WordSegment
from tiny_store import DIM, added_words, check_contents, exact_products, new_store, put, vectors_of

WORDS = ("apple", "pear", "quince", "中文", "文本")
IDS = st.one_of(st.sampled_from([f"p{n}" for n in range(12)]), st.text(min_size=1, max_size=4))
PASSAGES = st.builds(
    Passage,
    id=IDS,
    text=st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join),
    title=st.sampled_from(["", "", "a title", "apple"]),
    document_id=st.sampled_from(["", "d1"]),
    position=st.integers(0, 3),
    metadata=st.fixed_dictionaries(
        {}, optional={"year": st.none() | st.integers(-3, 3), "language": st.sampled_from(["de", "it's"])}
    ),
)
BLOCKS = st.lists(PASSAGES, max_size=8, unique_by=lambda passage: passage.id)
Model = dict[str, Passage]


def _bare(passage: Passage) -> Passage:
    """The passage as a store returns it: without the metadata fields that are None."""
    return replace(passage, metadata={name: value for name, value in passage.metadata.items() if value is not None})


class StoreMachine(RuleBasedStateMachine):
    vector_format = "bfloat16"
    vector_copies: VectorCopies = 2
    document_expansion: str | None = None
    views = Bundle("views")
    names = Bundle("names")

    @initialize()
    def create(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="store-"))
        self.store = new_store(
            self.folder / "index",
            self.vector_format,
            vector_copies=self.vector_copies,
            document_expansion=self.document_expansion,
        )
        self.model: Model = {}
        self.snapshots: dict[str, Model] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # Changes

    @rule(passages=BLOCKS)
    def upsert(self, passages: list[Passage]) -> None:
        before = self.store.table().version
        changed = any(self.model.get(passage.id) != _bare(passage) for passage in passages)
        version = put(self.store, passages)
        assert version == before + 1 if changed else version == before
        self.model = self.model | {passage.id: _bare(passage) for passage in passages}

    @rule(ids=st.lists(IDS, max_size=6))
    def delete(self, ids: list[str]) -> None:
        assert self.store.delete(ids) == len(set(ids) & self.model.keys())
        self.model = {key: value for key, value in self.model.items() if key not in ids}

    @rule()
    def delete_all(self) -> None:
        assert self.store.delete(list(self.model)) == len(self.model)
        self.model = {}

    @rule(dense=st.sampled_from([None, True, False]))
    def compact(self, dense: bool | None) -> None:
        self.store.compact(dense=dense)

    @rule()
    def update_word_files(self) -> None:
        self.store.update_word_files()

    @rule()
    def reopen(self) -> None:
        self.store = IndexStore.open(self.store.folder)

    @rule(how=st.sampled_from(["missing", "list missing", "cut", "flipped"]))
    def lose_vectors(self, how: str) -> None:
        for path in self.store.folder.glob("vectors-*.bin"):
            content = path.read_bytes()
            (path.with_suffix(".json") if how == "list missing" else path).unlink()
            if how == "cut":
                path.write_bytes(content[: len(content) // 2])
            elif how == "flipped":
                path.write_bytes(bytes(byte ^ (index == 20) for index, byte in enumerate(content)))

    # Snapshots

    @rule(target=names, name=st.sampled_from(["a", "b", "ü.1"]))
    def snapshot(self, name: str) -> Any:
        if name in self.snapshots:
            with pytest.raises(InputError, match="already"):
                self.store.snapshot(name)
            return multiple()
        self.store.snapshot(name)
        self.snapshots[name] = self.model
        return name

    @rule(name=names)
    def restore(self, name: str) -> None:
        assert self.store.restore(name) == len(self.snapshots[name])
        self.model = self.snapshots[name]

    @rule(name=consumes(names))
    def drop(self, name: str) -> None:
        self.store.drop_snapshot(name)
        del self.snapshots[name]

    @rule(name=names)
    def read_snapshot(self, name: str) -> None:
        snapshot = IndexStore.open(self.store.snapshot_folder(name))
        check_contents(PassageView(snapshot), self.snapshots[name])

    # Reading

    @rule(target=views)
    def pin(self) -> tuple[PassageView, Model]:
        return PassageView(self.store), self.model

    @rule(pinned=views)
    def read_pinned(self, pinned: tuple[PassageView, Model]) -> None:
        check_contents(*pinned)

    @rule(pinned=views)
    def open_at_version(self, pinned: tuple[PassageView, Model]) -> None:
        view, model = pinned
        check_contents(PassageView(self.store, view.version), model)

    @rule(seed=st.integers(0, 99), top_k=st.integers(1, 12), year=st.none() | st.integers(-3, 3))
    def scan(self, seed: int, top_k: int, year: int | None) -> None:
        query = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
        view = PassageView(self.store)
        allowed = view.select(None if year is None else f"year >= {year}")
        result = view.scan(query, top_k, allowed)
        chosen = self._chosen(year)
        scores = exact_products(chosen, self.vector_format, query)
        best = sorted(range(len(chosen)), key=lambda index: (-scores[index], chosen[index].id))[:top_k]
        assert view.ids(result.rows) == [chosen[index].id for index in best]  # equal texts: ordered by id
        np.testing.assert_array_equal(result.scores, scores[best])
        assert view.passages(result.rows) == [self.model[passage_id] for passage_id in view.ids(result.rows)]

    @rule(word=st.sampled_from(WORDS), top_k=st.integers(1, 6), year=st.none() | st.integers(-3, 3))
    def match(self, word: str, top_k: int, year: int | None) -> None:
        view = PassageView(self.store)
        result = view.match(word, top_k, None if year is None else f"year >= {year}")
        matching = {p.id for p in self._chosen(year) if not {*terms(word)}.isdisjoint(terms(p.full_text))}
        ids = view.ids(result.rows)
        assert set(ids) <= matching
        assert len(ids) == min(top_k, len(matching))
        order = sorted(zip((-result.scores).tolist(), ids, strict=True))
        assert [passage_id for _, passage_id in order] == ids
        reference = WordIndex.from_texts(passage.full_text for passage in self.model.values())
        scores = dict(zip(self.model, reference.scores(reference.query(word)), strict=True))
        np.testing.assert_allclose(result.scores, [scores[passage_id] for passage_id in ids], rtol=1e-5)
        everything = view.match(word, 1000, None if year is None else f"year >= {year}")
        assert view.ids(everything.rows)[: len(ids)] == ids

    @rule(ids=st.lists(IDS, max_size=5))
    def get(self, ids: list[str]) -> None:
        expected = [self.model[key] for key in dict.fromkeys(ids) if key in self.model]
        assert PassageView(self.store).get(ids) == expected

    def _chosen(self, year: int | None) -> list[Passage]:
        return [p for p in self.model.values() if year is None or ("year" in p.metadata and p.metadata["year"] >= year)]

    @rule()
    def inspect(self) -> None:
        report, facts = verify(self.store, repair=True), stats(self.store)
        assert verify(self.store).problems == []
        assert report.num_passages == facts.num_passages == len(self.model)
        assert facts.snapshots == sorted(self.snapshots)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert self.store.snapshots() == sorted(self.snapshots)
        check_contents(PassageView(self.store), self.model)


class OneCopyMachine(StoreMachine):
    """Lost vectors cannot be read but are encoded again; versions from before the repair may stay without theirs."""

    vector_copies = 1
    lost_before = 0

    @rule(how=st.sampled_from(["missing", "list missing", "cut", "flipped"]))
    def lose_vectors(self, how: str) -> None:
        super().lose_vectors(how)
        lost = bool(list(self.store.vectors.problems(self.store.table())))
        assert bool(verify(self.store).problems) == lost
        if lost and self.model:
            with pytest.raises(DataFormatError, match="verify --repair"):
                check_contents(PassageView(self.store), self.model)
            with pytest.raises(DataFormatError, match="verify --repair"):
                self.store.compact(dense=True)
        self.lost_before = self.store.table().version
        verify(self.store, repair=True, encode=vectors_of)
        assert verify(self.store).problems == []

    @rule(pinned=StoreMachine.views)
    def open_at_version(self, pinned: tuple[PassageView, Model]) -> None:
        try:
            super().open_at_version(pinned)
        except DataFormatError as error:
            if pinned[0].version >= self.lost_before or "open the index again" not in str(error):
                raise


class AddedWordsMachine(StoreMachine):
    """Passages have words beside those of their texts, which are lost with no file and no version."""

    document_expansion = "words"

    @rule(damage=st.booleans())
    def lose_words(self, damage: bool) -> None:
        for path in self.store.folder.glob("words-*.bin"):
            if damage:
                path.write_bytes(path.read_bytes()[:-1])
            else:
                path.unlink()
                path.with_suffix(".json").unlink()

    @rule(word=st.sampled_from(WORDS))
    def score_words(self, word: str) -> None:
        view = PassageView(self.store)
        segment = WordSegment.from_texts(passage.full_text for passage in self.model.values())
        reference = WordIndex([segment.with_added([added_words(passage) for passage in self.model.values()])])
        text = f"{word} melons"
        rows = view.rows(list(self.model))
        scores, expected = view.words.scores(view.words.query(text)), reference.scores(reference.query(text))
        np.testing.assert_array_equal(scores[rows], expected)

    def match(self, word: str, top_k: int, year: int | None) -> None:
        """Scores that no added word counts in are tested by the other machines."""


class Int8Machine(StoreMachine):
    vector_format = "int8"


class BinaryMachine(StoreMachine):
    vector_format = "binary"


_TIMES = int(os.environ.get("D2LLM_TEST_TIMES", "1"))
_BUDGET = settings(stateful_step_count=20, suppress_health_check=list(HealthCheck), derandomize=True)
TestBfloat16 = StoreMachine.TestCase
TestBfloat16.settings = settings(_BUDGET, max_examples=5 * _TIMES)
TestOneCopy = OneCopyMachine.TestCase
TestOneCopy.settings = settings(_BUDGET, max_examples=4 * _TIMES)
TestAddedWords = AddedWordsMachine.TestCase
TestAddedWords.settings = settings(_BUDGET, max_examples=4 * _TIMES)
TestInt8 = Int8Machine.TestCase
TestInt8.settings = settings(_BUDGET, max_examples=2 * _TIMES)
TestBinary = BinaryMachine.TestCase
TestBinary.settings = settings(_BUDGET, max_examples=2 * _TIMES)
