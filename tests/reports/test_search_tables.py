"""Rankings, explanations and judgements as printed on the command line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from d2llm.cli.session import Session
from d2llm.core.types import Excerpt, Explanation, Passage, Query, RankedPassage, Ranking
from d2llm.reports.search_tables import (
    context_remark,
    excerpt_list,
    explanation_table,
    pair_table,
    passage_lines,
    ranking_list,
)
from d2llm.retrieval.context import AnswerContext


@pytest.mark.parametrize("width", [20, 80])
def test_ids_are_never_wrapped(width):
    """So that it can be copied and found with grep at any terminal width."""
    ids = [f"{n}/a very long path/to a file/of which each part counts/file {n}.md#12" for n in range(4)]
    first, before, after, other = (Passage(passage_id, "some words " * 30, metadata={"year": 1}) for passage_id in ids)
    results = (RankedPassage(1, first, 2.5, before=(before,), after=(after,)), RankedPassage(2, other, 1.5))
    lines = printed(ranking_list(Ranking(Query("q", "what?"), results, 1)), width).splitlines()
    for passage_id in ids:
        assert sum(line.endswith(passage_id) for line in lines) == 1
    assert all(len(line) <= width for line in lines if "some words" in line)
    assert ids[0] in printed(passage_lines(first), width).splitlines()


def printed(result, width):
    """The text printed on the command line."""
    out = io.StringIO()
    session = Session()
    session.__dict__["_out"] = Console(file=out, width=width)
    session.show(result)
    return out.getvalue()


def test_ranking_and_judgement():
    passage = Passage("p[1]", "a long text " * 40)
    text = printed(ranking_list(Ranking(Query("q", "[b]what[/b]?"), (RankedPassage(1, passage, 2.5),), 1)), 100)
    assert "[b]what[/b]?" in text
    assert "p[1]" in text
    assert "2.500" in text
    assert "…" in text
    judged = printed(pair_table("why?", ["because", "no"], [0.0, -2.0]), 100)
    assert "0.5000" in judged
    assert "+0.000" in judged
    assert "0.1192" in judged  # 1 / (1 + e^2)
    assert "-2.000" in judged


def test_title_and_text_have_lines_of_their_own():
    results = (
        RankedPassage(1, Passage("p1", "the text\nof it", "A Title"), 2.5),
        RankedPassage(2, Passage("p2", "no title"), 1.5),
    )
    lines = printed(ranking_list(Ranking(Query("q", "what?"), results, 1)), 100).splitlines()
    assert [line.rstrip() for line in lines] == [
        "what?",
        "1  2.500  p1",
        "   A Title",
        "   the text of it",
        "2  1.500  p2",
        "   no title",
    ]


def test_unused_parts_of_an_explanation_are_dashes():
    full = Explanation(
        dot=0.5,
        interaction=-0.0001,
        source_ranks={"bm25": 2},
        source_scores={"bm25": 7.25},
        terms={"cat": 1, "dog": 3},
        lexical=0.125,
        windows=None,
        tokens=0.25,
    )
    bare = Explanation(None, None, None, None, None, {}, {}, {})
    results = [RankedPassage(n, Passage(f"p{n}", "text"), 1.0, explanation=why) for n, why in ((1, full), (2, bare))]
    assert explanation_table(Ranking(Query("q", "what?"), tuple(results), 2)).texts() == [
        ["1", "0.500", "+0.125", "–", "+0.250", "+0.000", "bm25 2 (7.250)", "dog 3, cat 1"],
        ["2", "–", "–", "–", "–", "–", "–", "–"],
    ]


def test_a_text_is_written_as_it_is():
    out, text = io.StringIO(), "[1] manual.pdf, page 3\n" + "a [b]long[/b] line " * 30 + "\n\tindented"
    session = Session()
    session.__dict__["_out"] = Console(file=out, width=40)
    session.write(text)
    assert out.getvalue() == text + "\n"


def test_the_remark_about_a_context_counts_what_is_left_out():
    context = AnswerContext("text", (), 210, 250, ("p4", "p7"), 3, True, Ranking(Query("q", "what?"), (), 0))
    assert context_remark(context) == (
        "context: 210 of at most 250 tokens, 0 sources; the best result alone is longer, and its end was cut off; "
        "2 results did not fit; 3 neighbours of results did not fit"
    )


def test_excerpts_show_results_and_neighbours_in_order():
    first, second, third = (Passage(f"d#{n}", f"text {n}", document_id="d", position=n) for n in (1, 2, 3))
    best, other = RankedPassage(1, third, 2.5), RankedPassage(2, first, 1.5)
    excerpt = Excerpt((best, other), (first, second, third), "")
    lines = printed(excerpt_list(Ranking(Query("q", "what?"), (best, other), 1), [excerpt]), 80).splitlines()
    assert [line.strip() for line in lines] == [
        *("what?", "d", "2  1.500  d#1", "text 1", "d#2", "text 2", "1  2.500  d#3", "text 3")
    ]
