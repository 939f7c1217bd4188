"""The limit set: a data set in which each query has a pair of persons as its answer, and each pair has one query."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.data import limit_set as module
from d2llm.data.beir import read_beir
from d2llm.data.limit_set import all_pairs, make_limit_set, max_persons, write_limit_set
from d2llm.ops.bm25_words import terms
from d2llm.store.bm25 import WordIndex, rank_passages


def likes(text: str) -> set[str]:
    return set(re.split(r", | and ", text.removesuffix(".").split(" likes ")[1]))


def thing(text: str) -> str:
    return text.removeprefix("Who likes ").removesuffix("?")


def test_all_pairs_by_hand():
    assert all_pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@given(num_persons=st.integers(5, 14), num_distractors=st.integers(0, 5), seed=st.integers(0, 50))
def test_answers_are_those_who_like_it_one_query_per_pair(num_persons, num_distractors, seed):
    limit_set = make_limit_set(num_persons, num_distractors=num_distractors, seed=seed)
    assert len(limit_set.passages) == num_persons + num_distractors
    judged = {query_id: set(grades) for split in limit_set.qrels.values() for query_id, grades in split.items()}
    liked = {passage.id: likes(passage.text) for passage in limit_set.passages}
    for query in limit_set.queries:
        assert judged[query.id] == {identifier for identifier, things in liked.items() if thing(query.text) in things}
    persons = [f"p{number}" for number in range(num_persons)]
    assert sorted(map(sorted, judged.values())) == sorted(map(sorted, combinations(persons, 2)))
    assert {len(things) for things in liked.values()} == {num_persons - 1}


def test_splits_are_disjoint_and_have_the_right_sizes():
    limit_set = make_limit_set(20)  # 190 queries
    splits = [set(limit_set.qrels[split]) for split in ("train", "dev", "test")]
    assert [len(split) for split in splits] == [114, 19, 57]
    assert len(set.union(*splits)) == 190
    texts = {query.id: query.text for query in limit_set.queries}
    assert len(set(texts.values())) == 190


def test_the_seed_determines_the_wall():
    assert make_limit_set(8, num_distractors=2, seed=3) == make_limit_set(8, num_distractors=2, seed=3)
    assert make_limit_set(8, seed=3) != make_limit_set(8, seed=4)


def test_every_word_has_its_own_stem():
    """So BM25 can answer everything: no thing shares a stem with another, or with a name."""
    things, names = module._THINGS, [*module._FIRST_NAMES, *module._LAST_NAMES]
    stems = [tuple(terms(word)) for word in (*things, *names)]
    assert all(len(stem) == 1 for stem in stems)
    assert len(set(stems)) == len(stems)


def test_bm25_finds_both_answers():
    limit_set = make_limit_set(12, num_distractors=20)
    index = WordIndex.from_texts(passage.full_text for passage in limit_set.passages)
    rankings = rank_passages(index, [p.id for p in limit_set.passages], [query.text for query in limit_set.queries], 2)
    judged = {query_id: set(grades) for split in limit_set.qrels.values() for query_id, grades in split.items()}
    assert all(
        {candidate.passage_id for candidate in candidates} == judged[query.id]
        for query, candidates in zip(limit_set.queries, rankings, strict=True)
    )


def test_written_as_a_beir_folder(tmp_path: Path):
    folder = tmp_path / "limit-set"
    limit_set = write_limit_set(folder, num_persons=9, num_distractors=4, seed=5)
    dataset = read_beir(folder)
    assert dataset.issues == ()
    assert tuple(dataset.passages.values()) == limit_set.passages
    assert tuple(dataset.queries.values()) == limit_set.queries
    assert dataset.qrels == limit_set.qrels
    write_limit_set(folder, num_persons=6)  # replaces its own folder
    assert len(read_beir(folder).passages) == 6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="did not make"):
        write_limit_set(tmp_path / "mine")


def test_the_size_is_limited_by_the_number_of_words():
    for num_distractors in (0, 1):
        most = max_persons(num_distractors)
        words = len(module._THINGS) - 100 * (num_distractors > 0)
        assert most * (most - 1) // 2 <= words < most * (most + 1) // 2
        limit_set = make_limit_set(most, num_distractors=num_distractors)
        assert len(limit_set.queries) == most * (most - 1) // 2
        with pytest.raises(InputError, match=f"num_persons is {most + 1}, but must be from 5 to {most}"):
            make_limit_set(most + 1, num_distractors=num_distractors)
    with pytest.raises(InputError, match="num_persons is 4"):
        make_limit_set(4)
    with pytest.raises(InputError, match="num_distractors is -1"):
        make_limit_set(5, num_distractors=-1)
    with pytest.raises(InputError, match="num_distractors is 1600, but must be from 0 to 1595"):
        make_limit_set(5, num_distractors=1600)
