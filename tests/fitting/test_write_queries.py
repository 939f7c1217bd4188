"""Having queries written: order, budget, and what a second call does."""

from __future__ import annotations

import pytest

from d2llm.core.errors import DataFormatError, InputError, ModelError
from d2llm.core.types import Passage
from d2llm.fitting import write_queries as module
from d2llm.fitting.write_queries import Draft, DraftStore, WritingBudget, in_rounds, passage_hash, write_queries
from d2llm.models.writers.writer import WrittenQueries
from d2llm.recipe import WriterConfig, WriterEndpointConfig

TEXT = "passage {} of the manual says how a device of that number is cleaned, repaired and stored in winter"
UNLIMITED = WritingBudget()
ONE_KIND = {"question": 1.0}


class CountingWriter:
    """Writes one query for each assignment, and remembers the assignments; fails at one of them if told to."""

    fingerprint = "counting"

    def __init__(self, fail_at=None):
        self.assignments = []
        self.fail_at = fail_at

    def write(self, assignments, *, advance=None):
        del advance
        if self.fail_at is not None and len(self.assignments) + len(assignments) > self.fail_at:
            raise ModelError("the endpoint is away")
        self.assignments += assignments
        return [WrittenQueries((f"{task.kind} about {task.passage[:12]}",), 100, 10) for task in assignments]


def passages(num_documents=4, each=3):
    return [
        Passage(f"d{document}#{part}", TEXT.format(f"{document}-{part}"), document_id=f"d{document}", position=part)
        for document in range(num_documents)
        for part in range(each)
    ]


@pytest.fixture
def store(tmp_path):
    return DraftStore(tmp_path, "counting")


def write(corpus, writer, store, budget=UNLIMITED, config=None, **options):
    return write_queries(corpus, writer, store, config=config or WriterConfig(), budget=budget, **options)


def test_every_document_is_reached_before_any_is_finished():
    ordered = in_rounds(passages(num_documents=5, each=4), seed=3)
    for turn in range(4):
        assert {passage.document_id for passage in ordered[5 * turn : 5 * turn + 5]} == {f"d{n}" for n in range(5)}
    assert len({passage.id for passage in ordered}) == 20


def test_each_passage_has_one_kind_first_and_all_in_the_end(store):
    writer = CountingWriter()
    report = write(passages(), writer, store, kinds={"question": 0.6, "keywords": 0.2, "statement": 0.2})
    first = writer.assignments[:12]
    assert len({task.passage for task in first}) == 12
    assert {(task.passage, task.kind) for task in writer.assignments} == {
        (passage.text, kind) for passage in passages() for kind in ("question", "keywords", "statement")
    }
    assert (report.num_answers, report.num_queries, report.ended_by) == (36, 36, None)
    assert (report.num_prompt_tokens, report.num_written_tokens) == (3600, 360)


def test_kinds_without_a_share_are_not_written(store):
    writer = CountingWriter()
    write(passages(), writer, store, kinds={"question": 1.0, "keywords": 0.0})
    assert {task.kind for task in writer.assignments} == {"question"}


def test_the_share_of_a_kind_is_how_often_it_comes_first(store):
    writer = CountingWriter()
    write(passages(200, 1), writer, store, kinds={"question": 0.8, "keywords": 0.2}, budget=WritingBudget(queries=200))
    fraction = sum(task.kind == "question" for task in writer.assignments[:200]) / 200
    assert 0.7 < fraction < 0.9


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (WritingBudget(queries=5), "5 queries"),
        (WritingBudget(tokens=1_000), "1,000 tokens"),
        (WritingBudget(money=0.002), "a cost of 0.002"),
        (WritingBudget(seconds=0), "0 minutes"),
    ],
)
def test_a_spent_budget_ends_the_writing(store, monkeypatch, budget, reason):
    monkeypatch.setattr(module, "_ASSIGNMENTS_AT_ONCE", 2)
    prices = {"price_per_million_prompt_tokens": 1.0, "price_per_million_written_tokens": 10.0}
    config = WriterConfig(kind="remote", remote=WriterEndpointConfig(url="http://127.0.0.1:1/v1", **prices))
    report = write(passages(), CountingWriter(), store, budget, config)
    assert report.ended_by == reason
    assert report.num_answers < 12
    assert report.cost == pytest.approx(0.0002 * report.num_answers)


def test_money_needs_prices(store):
    with pytest.raises(InputError, match="price_per_million_prompt_tokens"):
        write(passages(), CountingWriter(), store, WritingBudget(money=1.0))


def test_a_failure_loses_nothing_and_the_next_call_continues(store, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_ASSIGNMENTS_AT_ONCE", 4)
    with pytest.raises(ModelError, match="away"):
        write(passages(), CountingWriter(fail_at=8), store, kinds=ONE_KIND)
    second = CountingWriter()
    report = write(passages(), second, DraftStore(tmp_path, "counting"), kinds=ONE_KIND)
    assert (len(second.assignments), report.num_answers) == (4, 12)


def test_passages_with_the_same_text_share_an_answer(store):
    corpus = [Passage(f"p{n}", TEXT.format("same"), document_id=f"d{n}") for n in range(5)]
    writer = CountingWriter()
    assert write(corpus, writer, store, kinds=ONE_KIND).num_answers == len(writer.assignments) == 1


def test_queries_of_earlier_documents_do_not_count(store):
    write(passages(), CountingWriter(), store, kinds=ONE_KIND)
    others = [Passage(f"new{n}", TEXT.format(f"new-{n}")) for n in range(5)]
    writer = CountingWriter()
    report = write(others, writer, store, WritingBudget(queries=5), kinds=ONE_KIND)
    assert len(writer.assignments) == report.num_queries == report.num_answers == 5
    assert report.num_prompt_tokens == 100 * 17  # what was paid counts


def test_only_changed_passages_are_written_for_again(store):
    write(passages(), CountingWriter(), store, kinds=ONE_KIND)
    changed = [*passages()[:-1], Passage("d3#2", TEXT.format("new"), document_id="d3", position=2)]
    writer = CountingWriter()
    write(changed, writer, store, kinds=ONE_KIND)
    assert [task.passage for task in writer.assignments] == [TEXT.format("new")]
    assert (passage_hash(changed[-1]), "question") in store


def test_short_passages_are_counted_and_only_short_ones_an_error(store):
    report = write([*passages(), Passage("short", "Too short.")], CountingWriter(), store)
    assert report.num_short == 1
    with pytest.raises(InputError, match="none of the 1 passages has 80 characters"):
        write([Passage("short", "Too short.")], CountingWriter(), store)


def test_the_same_seed_gives_the_same_assignments(store, tmp_path):
    first, second, other = CountingWriter(), CountingWriter(), CountingWriter()
    write(passages(), first, store)
    write(passages(), second, DraftStore(tmp_path / "b", "counting"))
    write(passages(), other, DraftStore(tmp_path / "c", "counting"), seed=1)
    assert first.assignments == second.assignments != other.assignments


FIRST = Draft("a1", "question", ("What is it?", "为什么？"), 100, 12)
SECOND = Draft("a1", "keywords", (), 90, 3, problem="no query in 'Sorry'")


def test_drafts_survive_reopening(tmp_path):
    DraftStore(tmp_path, "writer").add([FIRST])
    store = DraftStore(tmp_path, "writer")
    store.add([SECOND])
    again = DraftStore(tmp_path, "writer")
    assert [again.get(each.key) for each in (FIRST, SECOND)] == [FIRST, SECOND]
    assert (len(again), again.num_tokens) == (2, (190, 15))
    assert ("a1", "statement") not in again


def test_writers_do_not_share_drafts(tmp_path):
    DraftStore(tmp_path, "one").add([FIRST])
    assert len(DraftStore(tmp_path, "other")) == 0


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_is_dropped_and_written_again(tmp_path, cut):
    store = DraftStore(tmp_path, "writer")
    store.add([FIRST, SECOND])
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    torn = DraftStore(tmp_path, "writer")
    assert (torn.get(FIRST.key), torn.get(SECOND.key)) == (FIRST, None)
    torn.add([SECOND])
    assert DraftStore(tmp_path, "writer").get(SECOND.key) == SECOND


def test_another_damaged_line_is_an_error_that_names_it(tmp_path):
    store = DraftStore(tmp_path, "writer")
    store.add([FIRST])
    store.path.write_bytes(b'{"kind": "question"}\n' + store.path.read_bytes())
    with pytest.raises(DataFormatError, match="jsonl:1: is not a written query"):
        DraftStore(tmp_path, "writer")


def test_the_hash_depends_on_title_and_text_but_not_on_the_id():
    assert passage_hash(Passage("1", "text", "title")) == passage_hash(Passage("2", "text", "title"))
    assert passage_hash(Passage("1", "text", "title")) != passage_hash(Passage("1", "text"))
