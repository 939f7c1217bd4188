"""Queries to try: which headings and sentences of an index are shown as examples."""

from __future__ import annotations

import pytest

from d2llm import Index, Passage
from d2llm.server.served_version import example_queries
from tiny_server import write_tiny_index

LONG = "word " * 200


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    return Index.open(write_tiny_index(folder, 1)).student


def examples(folder, student, passages):
    index = Index.create(folder / "index", student)
    index.upsert(passages)
    assert example_queries(index.view) == example_queries(Index.open(folder / "index", student).view)
    return example_queries(index.view)


def test_headings_are_taken_from_all_over_the_index(tmp_path, student):
    titles = [f"Manual > Part {n} > How to mend part {n}" for n in range(30)]
    passages = [Passage(f"p{n:02}", LONG, title=title) for n, title in enumerate(titles)]
    assert examples(tmp_path, student, passages) == [f"How to mend part {n}" for n in (0, 10, 20)]


def test_a_heading_of_several_passages_a_path_and_a_single_word_are_no_queries(tmp_path, student):
    titles = ["See also below", "See also below", "src/a_b/c_d.py:12", "Overview", "", "", ""]
    texts = [*[LONG] * 4, "Salt melts ice on roads. It rusts cars.", "x = [1, 2]; y = {3: 4}", "###"]
    passages = [Passage(f"p{n}", text, title=title) for n, (title, text) in enumerate(zip(titles, texts, strict=True))]
    assert examples(tmp_path, student, passages) == ["Salt melts ice on roads."]


def test_markers_of_lists_and_half_sentences_are_left_out(tmp_path, student):
    texts = ["* The manual has been converted\n  to another format.", "- Salt melts ice on roads.\n- Sand does not."]
    passages = [Passage("a", LONG, title="Manual > 5.3. How to mend it"), *map(Passage, "bcd", [texts[0], *texts])]
    assert examples(tmp_path, student, passages) == ["How to mend it", "Salt melts ice on roads."]


def test_chinese_headings_and_questions(tmp_path, student):
    passages = [Passage("a", LONG, title="香港人口"), Passage("b", "Who wrote this? Nobody knows."), Passage("c", LONG)]
    assert examples(tmp_path, student, passages) == ["香港人口", "Who wrote this?"]


def test_an_empty_index_has_none(tmp_path, student):
    assert examples(tmp_path, student, []) == []
