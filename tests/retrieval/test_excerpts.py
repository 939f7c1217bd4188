"""Results with the passages around them, merged where they touch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.core.types import Passage, RankedPassage
from d2llm.retrieval.index import Index
from d2llm.retrieval.results import merge_neighbours
from examples import examples
from fake_models import FakeStudent

DOCUMENT = [Passage(f"d#{n}", f"part {n}", document_id="d", position=n) for n in range(1, 13)]
OTHER = [Passage(f"e#{n}", f"other {n}", document_id="e", position=n) for n in range(1, 4)]
SINGLE = Passage("single", "no document")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("excerpts") / "i", FakeStudent())
    index.upsert([*DOCUMENT, *OTHER, SINGLE])
    return index


def ranked(*passages):
    return [RankedPassage(rank, passage, 10.0 - rank) for rank, passage in enumerate(passages, start=1)]


def shapes(excerpts):
    return [([p.id for p in e.passages], [result.rank for result in e.results]) for e in excerpts]


def test_neighbouring_windows_are_merged(index):
    results = ranked(DOCUMENT[7], OTHER[0], DOCUMENT[0], SINGLE, DOCUMENT[4])
    # Around positions 8 and 5 there are 7 to 9 and 4 to 6: they follow each other. 1 to 2 does not touch them.
    assert shapes(index.around(results)) == [
        ([f"d#{n}" for n in range(4, 10)], [1, 5]),
        (["e#1", "e#2"], [2]),
        (["d#1", "d#2"], [3]),
        (["single"], [4]),
    ]
    merged = index.around(results)[0]
    assert merged.text == "\n".join(f"part {n}" for n in range(4, 10))
    assert [result.score for result in merged.results] == [9.0, 5.0]


def test_without_distance_only_neighbouring_results_are_merged(index):
    results = ranked(DOCUMENT[7], DOCUMENT[5], DOCUMENT[6], DOCUMENT[0])
    assert shapes(index.around(results, 0)) == [(["d#6", "d#7", "d#8"], [1, 2, 3]), (["d#1"], [4])]
    with pytest.raises(InputError, match="distance is -1"):
        index.around(results, -1)


def test_a_window_bridges_missing_positions(index):
    # Positions 2 and 3 are missing: what was fetched around position 4 still belongs together.
    result = RankedPassage(1, DOCUMENT[3], 1.0, before=(DOCUMENT[0],), after=(DOCUMENT[4],))
    assert shapes(merge_neighbours([result])) == [(["d#1", "d#4", "d#5"], [1])]


def test_results_of_one_search_can_be_merged(index):
    ranking = index.search(DOCUMENT[3].text, top_k=14, neighbours=2)
    excerpts = merge_neighbours(ranking.passages)
    names = [passage.id for excerpt in excerpts for passage in excerpt.passages]
    assert sorted(names) == sorted(passage.id for passage in [*DOCUMENT, *OTHER, SINGLE])


@settings(max_examples=examples(40))
@given(st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True), st.integers(0, 3))
def test_every_passage_is_in_one_excerpt(chosen, distance):
    results = [
        RankedPassage(
            rank,
            DOCUMENT[at],
            1.0,
            before=tuple(DOCUMENT[max(0, at - distance) : at]),
            after=tuple(DOCUMENT[at + 1 : at + 1 + distance]),
        )
        for rank, at in enumerate(chosen, start=1)
    ]
    excerpts = merge_neighbours(results)
    positions = [[p.position for p in excerpt.passages] for excerpt in excerpts]
    expected = {n + 1 for at in chosen for n in range(max(0, at - distance), min(12, at + distance + 1))}
    assert sorted(n for part in positions for n in part) == sorted(expected)
    assert all(part == list(range(part[0], part[-1] + 1)) for part in positions)
    ends = {part[-1] + 1 for part in positions}
    assert not ends & {part[0] for part in positions}  # none could be merged further
    assert [excerpt.results[0].rank for excerpt in excerpts] == sorted(e.results[0].rank for e in excerpts)


def joined(*texts, overlapping=True, titles=("", "", "")):
    passages = [
        Passage(f"d#{n}", text, title, "d", n) for n, (text, title) in enumerate(zip(texts, titles, strict=False))
    ]
    (excerpt,) = merge_neighbours(ranked(*passages), overlapping=overlapping)
    return excerpt.text


def test_repeated_text_is_kept_once_if_passages_overlap():
    texts = ("The cat sleeps. The dog runs.", "The dog runs. The fish swims.", "The fish swims.")
    assert joined(*texts) == "The cat sleeps. The dog runs.\nThe fish swims."
    assert joined(*texts, overlapping=False) == "\n".join(texts)
    assert joined("the end is a b c", "a b c begins") == "the end is a b c\na b c begins"  # too short to be certain


def test_a_new_title_stands_before_its_text():
    assert joined("one", "two", "three", titles=("A", "A > B", "A > B")) == "one\n\nA > B\ntwo\nthree"
    assert joined("one", "two", titles=("A", "")) == "one\n\ntwo"
