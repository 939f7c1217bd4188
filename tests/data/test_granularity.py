"""The granularity set: its judgements are what its texts say."""

from __future__ import annotations

import re

import pytest

from d2llm.core.errors import InputError
from d2llm.data.granularity import make_granularity

MADE = make_granularity(64, seed=1)


def of_kind(kind: str) -> dict[str, set[str]]:
    texts = {query.id: query.text for query in MADE.queries}
    return {texts[query_id]: {*judged} for query_id, judged in MADE.qrels.items() if MADE.granularity[query_id] == kind}


def test_things_and_their_colours_are_relevant_where_they_are_named() -> None:
    for kind, pattern in (("entity", r"There is a \w+ {} "), ("detail", r"There is a {} ")):
        asked = of_kind(kind)
        for query, judged in asked.items():
            named = re.compile(pattern.format(query.removeprefix("the ")))
            assert judged == {passage.id for passage in MADE.passages if named.search(passage.text)}
        assert sum(map(len, asked.values())) == 3 * 64  # each passage has three different things


def test_scenes_are_relevant_to_all_passages_that_begin_alike_and_share_no_word_with_them() -> None:
    firsts = {passage.id: passage.text.split(" There is ")[0] for passage in MADE.passages}
    scenes = of_kind("scene")
    assert len(scenes) == 16
    for query, judged in scenes.items():
        beginnings = {firsts[passage_id] for passage_id in judged}
        assert len(beginnings) == 1
        assert judged == {passage_id for passage_id, first in firsts.items() if first in beginnings}
        words = {*query.split()} - {"a", "the", "to", "at", "for", "on", "day"}
        assert not words & {*re.findall(r"\w+", beginnings.pop().lower())}


def test_the_seed_determines_the_set() -> None:
    assert make_granularity(64, seed=1) == MADE != make_granularity(64, seed=2)
    with pytest.raises(InputError, match="num_passages is 19, but must be at least 20"):
        make_granularity(19)
