"""A context for an answer: what it holds, in which order, how long it is, and what it leaves out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import InputError, ModelNotFoundError
from d2llm.core.types import Passage, Query, RankedPassage, Ranking
from d2llm.models.probabilities import ProbabilityCalibration, TaskCalibration
from d2llm.retrieval.context import answering_sentences, build_context, context_settings, named_tokenizer
from d2llm.retrieval.results import merge_neighbours
from d2llm.retrieval.settings import SearchSettings
from examples import examples
from indexed_student import PASSAGES, QUERIES, make_indexed
from tiny_models import tiny_tokenizer

TEXTS = ["The cat sleeps in the sun.", "The dog runs.", "Ships sail.", "Snow falls on the high hills.", "Bread rises."]


def word_ends(text):
    """A tokenizer for which every word and every punctuation mark is a token."""
    return [match.end() for match in re.finditer(r"\w+|[^\w\s]", text)]


def ranking_of(passages, neighbours=0):
    """A ranking of passages in this order; the neighbours of each are those at the positions beside it."""
    results = []
    for rank, passage in enumerate(passages, start=1):
        others = [p for p in [*MANUAL, *OTHERS] if p.document_id == passage.document_id and p.id != passage.id]
        near = [p for p in others if passage.document_id and abs(p.position - passage.position) <= neighbours]
        before = tuple(p for p in near if p.position < passage.position)
        after = tuple(p for p in near if p.position > passage.position)
        results.append(RankedPassage(rank, passage, 10.0 - rank, before=before, after=after))
    return Ranking(Query("1", "what?"), tuple(results), len(results))


MANUAL = [
    Passage(
        f"manual.pdf#{n}",
        text,
        "Manual > Use" if n < 4 else "Manual > Care",
        "manual.pdf",
        n,
        {"heading": "Use" if n < 4 else "Care", "page": n // 2 + 1, "path": "manual.pdf"},
    )
    for n, text in enumerate(TEXTS, start=1)
]
OTHERS = [Passage(f"a#{n}", f"{text} {n}", "Notes", "a", 2 * n) for n, text in enumerate(TEXTS)]
SINGLES = [Passage(f"p{n}", text) for n, text in enumerate(TEXTS)]


def context_of(passages, max_tokens, neighbours=0, **options):
    return build_context(ranking_of(passages, neighbours), word_ends, max_tokens, **options)


def test_sources_have_numbered_headers_with_title_pages_and_path():
    context = context_of([MANUAL[4], SINGLES[0], MANUAL[0]], 100, neighbours=1)
    assert context.text == (
        "[1] Manual > Care, page 3, manual.pdf\nSnow falls on the high hills.\nBread rises.\n\n"
        "[2] p0\nThe cat sleeps in the sun.\n\n"
        "[3] Manual > Use, pages 1-2, manual.pdf\nThe cat sleeps in the sun.\nThe dog runs."
    )
    last = context.sources[2]
    assert (last.number, last.title, last.pages, last.path) == (3, "Manual > Use", (1, 2), "manual.pdf")
    assert (last.document_id, last.passage_ids) == ("manual.pdf", ("manual.pdf#1", "manual.pdf#2"))
    assert (last.ranks, last.score, last.metadata["page"]) == ((3,), 7.0, 1)
    assert context.num_tokens == len(word_ends(context.text)) <= 100
    assert (context.left_out, context.num_neighbours_left_out, context.truncated) == ((), 0, False)


def test_a_source_over_two_sections_shows_both_titles():
    context = context_of([MANUAL[3]], 100, neighbours=1)
    assert context.text == (
        "[1] Manual > Use, pages 2-3, manual.pdf\nShips sail.\n\n"
        "Manual > Care\nSnow falls on the high hills.\nBread rises."
    )


@pytest.mark.parametrize(
    ("passage", "header"),
    [
        (Passage("p", "x", "Tea"), "[1] Tea"),
        (Passage("p", "x", "Tea", metadata={"heading": "Green > Steeping"}), "[1] Tea > Green > Steeping"),
        (Passage("p", "x", "a.md", metadata={"path": "a.md", "page": 7}), "[1] a.md, page 7"),
        (Passage("p", "x", metadata={"path": "docs/a.md"}), "[1] docs/a.md"),
        (Passage("a#1", "x", document_id="a", position=1), "[1] a"),
        (Passage("p", "x", "two\nlines"), "[1] two lines"),
    ],
)
def test_headers_have_what_is_known(passage, header):
    (source,) = context_of([passage], 100).sources
    assert source.header == header


def test_sources_of_a_document_can_be_together():
    passages = [MANUAL[4], SINGLES[1], MANUAL[0]]
    by_rank, by_document = (context_of(passages, 100, order=order).sources for order in ("rank", "document"))
    assert [source.passage_ids[0] for source in by_rank] == ["manual.pdf#5", "p1", "manual.pdf#1"]
    assert [source.passage_ids[0] for source in by_document] == ["manual.pdf#1", "manual.pdf#5", "p1"]
    assert [source.number for source in by_document] == [1, 2, 3]


def test_a_result_that_does_not_fit_is_left_out_and_a_shorter_one_may_follow():
    # A header "[1] p0" has 4 tokens; the texts have 7, 4, 3, 7 and 3.
    context = context_of(SINGLES, 19)
    assert [source.passage_ids for source in context.sources] == [("p0",), ("p1",)]
    assert context.num_tokens == 19
    assert context.left_out == ("p2", "p3", "p4")
    shorter = context_of([SINGLES[0], SINGLES[3], SINGLES[2]], 18)
    assert [source.passage_ids for source in shorter.sources] == [("p0",), ("p2",)]
    assert shorter.left_out == ("p3",)


def test_neighbours_are_left_out_before_results():
    # The header, "[1] Manual > Use, page 2, manual.pdf", has 13 tokens; passages 1 to 3 have 7, 4 and 3.
    (source,) = (whole := context_of([MANUAL[1]], 40, neighbours=1)).sources
    assert source.passage_ids == ("manual.pdf#1", "manual.pdf#2", "manual.pdf#3")
    assert whole.num_neighbours_left_out == 0
    (source,) = (short := context_of([MANUAL[1]], whole.num_tokens - 1, neighbours=1)).sources
    assert source.passage_ids == ("manual.pdf#2",)
    assert (short.num_neighbours_left_out, short.left_out, short.truncated) == (2, (), False)


@pytest.mark.parametrize("separator", [" ", "\n"])
def test_of_a_text_that_is_far_too_long_the_beginning_is_read(separator):
    long, read = Passage("p", separator.join(["word"] * 50_000)), []
    context = build_context(ranking_of([long]), lambda text: read.append(len(text)) or word_ends(text), 100)
    assert (context.num_tokens, context.truncated) == (100, True)
    assert sum(read) < 20_000


def test_a_best_result_longer_than_the_limit_keeps_its_first_tokens():
    context = context_of([SINGLES[0], SINGLES[2]], 8)
    assert context.text == "[1] p0\nThe cat sleeps in"
    assert (context.num_tokens, context.truncated, context.left_out) == (8, True, ("p2",))
    nothing = context_of([SINGLES[0]], 4)  # the header leaves no room
    assert (nothing.text, nothing.sources, nothing.num_tokens) == ("", (), 0)
    assert (nothing.left_out, nothing.truncated) == (("p0",), False)


@settings(max_examples=examples(40))
@given(
    st.lists(st.sampled_from([*MANUAL, *SINGLES]), min_size=1, max_size=6, unique_by=lambda passage: passage.id),
    st.integers(1, 90),
    st.integers(0, 2),
    st.sampled_from(["rank", "document"]),
)
def test_a_context_is_never_too_long_and_accounts_for_every_passage(passages, max_tokens, neighbours, order):
    ranking = ranking_of(passages, neighbours)
    context = build_context(ranking, word_ends, max_tokens, order=order)
    assert context.num_tokens == len(word_ends(context.text)) <= max_tokens
    included = [name for source in context.sources for name in source.passage_ids]
    assert len(set(included)) == len(included)
    assert set(included).isdisjoint(context.left_out)
    assert {p.id for p in passages} <= {*included, *context.left_out}
    all_neighbours = {p.id for hit in ranking.passages for p in (*hit.before, *hit.after)} - {p.id for p in passages}
    assert context.num_neighbours_left_out == len(all_neighbours - set(included))
    texts = {passage.id: passage.text for passage in [*MANUAL, *SINGLES]}
    if not context.truncated:
        assert all(texts[name] in source.text for source in context.sources for name in source.passage_ids)


def filled_by_trial(ranking, max_tokens, **options):
    """The text with every result and neighbour that fits, each tried by making the context of all that were chosen."""

    def whole(results):
        return build_context(replace(ranking, passages=tuple(results)), word_ends, 10_000, **options)

    chosen = []
    for result in ranking.passages:
        at = result.passage.position
        fitting = None
        for distance in sorted({abs(p.position - at) for p in (*result.before, *result.after)} | {0}):
            before = tuple(p for p in result.before if at - p.position <= distance)
            after = tuple(p for p in result.after if p.position - at <= distance)
            candidate = replace(result, before=before, after=after)
            if whole([*chosen, candidate]).num_tokens > max_tokens:
                break
            fitting = candidate
        chosen += [] if fitting is None else [fitting]
    return whole(chosen).text


@settings(max_examples=examples(60))
@given(
    st.permutations([*MANUAL, *SINGLES, *OTHERS]).flatmap(
        lambda passages: st.integers(2, len(passages)).map(lambda n: passages[:n])
    ),
    st.integers(25, 150),
    st.integers(0, 2),
    st.sampled_from(["rank", "document"]),
    st.booleans(),
)
def test_a_context_holds_what_fits_in_the_order_of_ranks(passages, max_tokens, neighbours, order, overlapping):
    ranking = ranking_of(passages, neighbours)
    options = {"order": order, "overlapping": overlapping}
    context = build_context(ranking, word_ends, max_tokens, **options)
    assert context.text == filled_by_trial(ranking, max_tokens, **options)


@pytest.mark.parametrize("documents", [1, 20, 300])
def test_a_long_ranking_takes_little_work(monkeypatch, documents):
    positions = [divmod(n, documents) for n in range(300)]
    passages = [Passage(f"{d}#{n}", f"Ship {n}.", document_id=f"{d}", position=2 * n) for n, d in positions]
    num_merged = 0

    def counted(results, **options):
        nonlocal num_merged
        num_merged += len(results)
        return merge_neighbours(results, **options)

    monkeypatch.setattr("d2llm.retrieval.context.merge_neighbours", counted)
    context = context_of(passages, 1_000)
    assert 0 < len(context.left_out) < 300
    assert num_merged <= 2 * 300


def test_invalid_requests_are_rejected(tmp_path):
    with pytest.raises(InputError, match="max_tokens is 0"):
        context_of(SINGLES, 0)
    with pytest.raises(InputError, match="group is 'best'"):
        context_settings(SearchSettings(group="best"))
    with pytest.raises(ModelNotFoundError, match="tokenizer"):
        named_tokenizer(str(tmp_path))


def test_near_duplicates_are_left_out_unless_the_settings_say_otherwise():
    assert context_settings(SearchSettings(top_k=3)) == SearchSettings(top_k=3, near_duplicates=0.95)
    assert context_settings(SearchSettings(near_duplicates=1.0)).near_duplicates == 1.0


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return make_indexed(tmp_path_factory.mktemp("context"))


class TestIndex:
    def test_a_context_holds_the_results_of_the_search(self, indexed):
        context = indexed.index.context(QUERIES[0], top_k=3, near_duplicates=1.0)
        results = [name for name, _ in indexed.found(QUERIES[0], top_k=3, near_duplicates=1.0)]
        assert sorted(name for source in context.sources for name in source.passage_ids) == sorted(results)
        assert [hit.passage.id for hit in context.ranking.passages] == results
        by_id = {passage.id: passage for passage in PASSAGES}
        assert all(by_id[name].text in context.text for name in results)

    def test_tokens_are_those_of_the_student_or_of_a_named_tokenizer(self, indexed, tmp_path):
        context = indexed.index.context(QUERIES[0], max_tokens=60)
        tokenizer = indexed.student.backbone.tokenizer
        assert context.num_tokens == len(tokenizer(context.text, add_special_tokens=False)["input_ids"]) <= 60
        assert context.left_out
        named = tiny_tokenizer()
        named.add_tokens(["ove", "hip", "oun", "ain", "the"])
        named.save_pretrained(tmp_path)
        other = indexed.index.context(QUERIES[0], max_tokens=60, tokenizer=str(tmp_path))
        assert other.num_tokens == len(named(other.text, add_special_tokens=False)["input_ids"]) <= 60
        assert other.num_tokens != len(tokenizer(other.text, add_special_tokens=False)["input_ids"])

    def test_neighbours_come_with_the_results(self, indexed):
        context = indexed.index.context("rain", max_tokens=500, top_k=1, neighbours=1, filter="id = 'p5'")
        (source,) = context.sources
        assert source.passage_ids == ("p4", "p5", "p6")
        assert source.text.startswith(PASSAGES[4].text)


class Reader:
    """Scores a sentence by how many words it shares with the query."""

    calibration = ProbabilityCalibration(
        tasks={
            "asymmetric": TaskCalibration(
                slope=2.0, offset=-3.0, num_queries={}, num_pairs=0, error_before=0.0, error_after=0.0
            )
        }
    )

    def predict(self, pairs, *, task, with_features):
        assert (task, with_features) == ("asymmetric", False)
        return np.array([len({*query.split()} & {*sentence.rstrip(".").split()}) for query, sentence in pairs])


@pytest.mark.parametrize(
    ("least", "texts"),
    [
        (0.9, []),  # 2 common words: 1 / (1 + exp(3 - 4)) = .73
        (0.7, ["The dog and a cat."]),
        (0.2, ["The dog and a cat. No cat here.", "My dog."]),  # 1: .27
        (None, ["The dog and a cat. Rain falls. No cat here.", "Nothing.", "My dog. Snow."]),
    ],
)
def test_answering_keeps_the_sentences_that_answer_and_may_be_empty(least, texts):
    written = ["The dog and a cat. Rain falls. No cat here.", "Nothing.", "My dog. Snow."]
    passages = [Passage(f"d#{n}", text, "A title", "d", n) for n, text in enumerate(written)]
    found = [RankedPassage(n, passage, 5.0 - n, before=passages[:n]) for n, passage in enumerate(passages, start=1)]
    ranking = Ranking(Query("1", "dog cat"), tuple(found), 3)
    answering = answering_sentences(ranking, Reader(), "asymmetric", least)
    assert [result.passage.text for result in answering] == texts
    assert [result.rank for result in answering] == ([1, 2, 3] if least is None else [1, 3])[: len(texts)]
    assert answering is ranking or not any(result.before for result in answering)
    assert bool(build_context(answering, word_ends, 100).text) == bool(texts)
