"""What objects say they are: one short line, without long texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm import Index, IndexSpec, Passage, Query, Ranking, Recipe, Run, SearchSettings
from d2llm.core.types import (
    Excerpt,
    LateChunk,
    QueryExpansion,
    RankedDocument,
    RankedPassage,
    Section,
    SectionedPassage,
    WholeText,
)
from d2llm.recipe import TeacherConfig
from d2llm.recipe.recipe import load_recipe
from d2llm.retrieval.context import AnswerContext
from e2e.command_line import write_data
from fake_models import FakeStudent

LONG = "a line\nand " * 1_000
PASSAGE = Passage(LONG, LONG, LONG, LONG, metadata={str(number): LONG for number in range(100)})
RESULT = RankedPassage(1, PASSAGE, 1.5, before=(PASSAGE,) * 9, document=RankedDocument(LONG, 1.0, 1, ((PASSAGE, 1.0),)))
RANKING = Ranking(Query(LONG, LONG), (RESULT,) * 100, 100, expansion=QueryExpansion("multi", (LONG,) * 9, 0.1))


@pytest.mark.parametrize(
    "value",
    [
        Query(LONG, LONG),
        PASSAGE,
        RESULT,
        RESULT.document,
        RANKING,
        RANKING.expansion,
        Section(LONG, (LONG,) * 9),
        WholeText(LONG, LONG),
        LateChunk(LONG, LONG, whole=WholeText(LONG)),
        SectionedPassage(LONG, LONG, sections=(Section(LONG),)),
        Excerpt((RESULT,) * 9, (PASSAGE,) * 9, LONG),
        AnswerContext(LONG, (), 1, 2, (LONG,) * 9, 0, False, RANKING),
        SearchSettings(filter="a = 1 and " * 1_000, sources=("bm25",)),
        IndexSpec(metadata={f"field{number}": "text" for number in range(1_000)}),
        load_recipe("d2llm"),
        load_recipe("d2llm").student,
        TeacherConfig(model="m" * 10_000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_one_short_line(value: object):
    for text in (repr(value), str(value)):
        assert text.startswith(type(value).__name__ + "(")
        assert text.endswith(")")
        assert len(text) < 1_000
        assert text.isprintable()


def test_what_is_not_as_usual_is_shown():
    assert repr(Passage("tea", "Green tea.", title="Tea")) == "Passage(id='tea', text='Green tea.', title='Tea')"
    assert repr(Query("q", "why?")) == "Query(id='q', text='why?')"
    assert repr(SearchSettings(top_k=3)) == "SearchSettings(top_k=3)"
    assert repr(SearchSettings()) == "SearchSettings()"
    assert repr(IndexSpec(vector_format="int8")) == "IndexSpec(vector_format='int8')"
    assert repr(Recipe(name="mine", seed=3)) == "Recipe(name='mine', seed=3)"
    found = tuple(RankedPassage(rank, Passage(f"p{rank}", "text"), 2 / rank) for rank in (1, 2, 3, 4))
    assert repr(found[1]) == "RankedPassage(rank=2, passage=Passage(id='p2', text='text'), score=1.0)"
    assert (
        repr(Ranking(Query("q", "why?"), found, 9))
        == "Ranking('why?', 4 passages: 'p1' 2.00, 'p2' 1.00, 'p3' 0.67, ...)"
    )
    assert repr(Ranking(Query("q", "why?"), found[:1], 9)) == "Ranking('why?', 1 passage: 'p1' 2.00)"
    assert repr(Ranking(Query("q", "why?"), (), 9)) == "Ranking('why?', 0 passages)"


def test_a_ranking_is_a_sequence_of_its_passages():
    found = tuple(RankedPassage(rank, Passage(f"p{rank}", "text"), 2 / rank) for rank in (1, 2))
    ranking = Ranking(Query("q", "why?"), found, 9)
    assert list(ranking) == list(found)
    assert (len(ranking), ranking[0], ranking[-1]) == (2, found[0], found[1])


def test_indexes_and_runs_say_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    index = Index.create("docs.index", FakeStudent())
    index.upsert([Passage(str(number), "text") for number in range(1_200)])
    assert repr(index) == "Index(docs.index, 1,200 passages, student fake-student)"
    same = Index.create("same.index", FakeStudent(), task="symmetric")
    assert repr(same) == "Index(same.index, 0 passages, student fake-student, task symmetric)"
    index.close()
    assert repr(index) == "Index(docs.index, closed)"
    assert (
        repr(
            Run(
                Recipe.model_validate({"name": "mine", "data": [{"path": str(write_data(tmp_path / "data"))}]}),
                "runs/mine",
            )
        )
        == "Run(runs/mine, recipe mine, 1 data set)"
    )
