from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.same_text import OwnCounts, SameText
from d2llm.evaluation.contenders import NAME_BM25, Contenders
from d2llm.recipe import MiningConfig
from d2llm.training.dev_sets import make_dev_set, make_teacher_dev_set
from d2llm.training.mining.mine import mine
from fake_models import FakeStudent, FakeTeacher
from tiny_data import make_source
from tiny_evaluations import everyone, figures, measure, run


def make_same_text(texts: dict[str, str]) -> SameText:
    return SameText(make_source(texts, {}, []).dataset.passages)


def repeats(first: str, second: str) -> bool:
    same_text = make_same_text({"first": first, "second": second})
    matches = (same_text.duplicates_of(["first"]), same_text.duplicates_of(["second"]))
    assert matches in [({"second"}, {"first"}), (set(), set())]  # the relation is symmetric
    return bool(matches[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The cat sat.", "the  CAT\nsat"),
        ("“Quoted”, she said", 'Quoted - she said!"'),
        ("ﬁne", "fine"),  # a ligature
        ("1２3", "123"),  # full-width digits
        ("cafe\u0301", "caf\u00e9"),  # decomposed and composed
        ("STRASSE", "straße"),
        ("你好，世界", "你好 世界。"),
    ],
)
def test_case_spaces_and_punctuation_do_not_matter(first: str, second: str) -> None:
    assert repeats(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the cat sat", "the cat sits"),
        ("one two", "onetwo"),
        ("one two", "two one"),
        ("कि", "की"),  # differ only in a vowel sign
        ("มี", "มา"),
        ("version 1", "version 2"),
    ],
)
def test_different_words_make_different_texts(first: str, second: str) -> None:
    assert not repeats(first, second)


def test_texts_without_letters_and_digits_match_no_other() -> None:
    same_text = make_same_text({"a": "", "b": " ", "c": "...", "d": "!?"})
    assert same_text.duplicates_of(["a", "b", "c"]) == set()


def test_repeats_of_several_passages_exclude_those_passages() -> None:
    same_text = make_same_text({"a": "one", "a2": "One", "a3": "ONE!", "b": "two", "b2": "two.", "c": "three"})
    assert same_text.duplicates_of(["a", "a3", "b"]) == {"a2", "b2"}
    assert same_text.duplicates_of(["c"]) == set()
    assert same_text.duplicates_of([]) == set()


QUORA = Path(__file__).parents[3] / "shared" / "data" / "quora"

QUESTIONS = {
    "1": "How do I learn French quickly?",
    "2": "What is the fastest way to learn French?",
    "3": "How do I bake bread?",
    "4": "Which bread is easy to bake?",
    "5": "How do I learn French slowly?",
    "6": "Why is the sky blue?",
}


def questions(queries: dict[str, str], qrels: dict[str, dict[str, int]], **passages: str) -> Dataset:
    corpus = {name: Passage(name, text) for name, text in (QUESTIONS | passages).items()}
    return Dataset(
        "questions",
        Path("questions"),
        corpus,
        {name: Query(name, text) for name, text in queries.items()},
        {"dev": qrels},
    )


def test_the_text_of_the_query_whatever_its_id():
    queries = {"q1": "how do i learn FRENCH quickly", "q3": QUESTIONS["3"]}
    dataset = questions(queries, {"q1": {"2": 1}, "q3": {"4": 1}}, again="How do I learn French, quickly?!")
    own = dataset.own_passages
    assert own.by_query == {"q1": {"1", "again"}, "q3": {"3"}}
    assert not own.by_id
    assert own.counts(["q1"]) == OwnCounts(1, 2, 0)
    assert own.counts(["q1", "q3", "unknown"]) == OwnCounts(2, 3, 0)
    assert own.of("unknown") == frozenset()


def test_the_text_in_another_normal_form_or_with_its_title():
    dataset = questions({"q": "Cafe\u0301 in Köln?"}, {"q": {"2": 1}}, x="café, in Ko\u0308ln")
    assert dataset.own_passages.of("q") == {"x"}
    titled = replace(dataset, passages={"t": Passage("t", "in Köln?", "Café"), "u": Passage("u", "in Köln", "Kino")})
    assert titled.own_passages.of("q") == {"t"}


def test_the_id_of_the_query_where_ids_are_of_one_set():
    """As in ArguAna, also if the passage is a longer version of the query's text."""
    queries = {"1": QUESTIONS["1"], "3": QUESTIONS["3"], "5": "an entirely rewritten question"}
    dataset = questions(queries, {"1": {"2": 1}, "3": {"4": 1}, "5": {"1": 1}})
    assert dataset.own_passages.by_id
    assert dataset.own_passages.by_query == {"1": {"1"}, "3": {"3"}, "5": {"5"}}
    longer = replace(dataset, passages={name: Passage(name, f"{text} Thank you.") for name, text in QUESTIONS.items()})
    assert longer.own_passages.by_query == {"1": {"1"}, "3": {"3"}, "5": {"5"}}


def test_ids_that_coincide_by_chance_leave_out_nothing():
    """Query 1 and passage 1 of two sets of numbers; passage 1 may be the right one, whether judged or not."""
    queries = {"1": "recipes for loaves", "2": "colour of the atmosphere", "6": "French for beginners"}
    dataset = questions(queries, {"1": {"3": 1}, "2": {"6": 1}, "6": {"2": 1}})
    assert dataset.own_passages.by_query == {}
    assert not dataset.own_passages.by_id
    # One of them has the text of its passage all the same: only that one is left out, by its text.
    same = replace(dataset, queries=dataset.queries | {"4": Query("4", QUESTIONS["4"])})
    assert same.own_passages.by_query == {"4": {"4"}}


def test_a_passage_that_is_judged_relevant_stays():
    dataset = questions({"1": QUESTIONS["1"]}, {"1": {"1": 1, "2": 1}}, again=QUESTIONS["1"])
    assert dataset.own_passages.by_query == {"1": {"again"}}
    assert dataset.own_passages.judged == {"1": {"1"}}
    assert dataset.own_passages.counts(["1"]) == OwnCounts(1, 1, 1)
    refused = questions({"1": QUESTIONS["1"]}, {"1": {"1": 0, "2": 1}})
    assert refused.own_passages.by_query == {"1": {"1"}}


def test_texts_without_words_are_no_query():
    dataset = questions({"q": "???"}, {"q": {"2": 1}}, x="!!!")
    assert dataset.own_passages.by_query == {}


ALL = {name: text for name, text in QUESTIONS.items() if name in "135"}
DUPLICATES = questions(ALL, {"1": {"2": 1}, "3": {"4": 1}, "5": {"1": 1}})


@pytest.mark.parametrize("sources", [["bm25"], ["bm25", "encoder"]])
def test_mining_never_takes_the_query_itself(sources):
    dataset = replace(DUPLICATES, qrels={"train": DUPLICATES.qrels["dev"]})
    config = MiningConfig(num_hard=5, num_easy=5, range_max=6, sources=sources, near_duplicate=1.0)
    result = mine(dataset, "train", config, encoder=None, student=FakeStudent() if len(sources) > 1 else None, seed=0)
    for entry in result.entries:
        assert entry.query_id not in {*entry.hard_negatives, *entry.easy_negatives}
    assert all(entry.hard_negatives for entry in result.entries)
    assert result.report["num_own_passages"] == 3
    assert result.report["num_own_passages_judged_relevant"] == 0


def test_mining_keeps_a_positive_with_the_text_of_its_query():
    dataset = questions({"q": QUESTIONS["1"]}, {"q": {"1": 1}})
    result = mine(
        replace(dataset, qrels={"train": dataset.qrels["dev"]}), "train", MiningConfig(), encoder=None, seed=0
    )
    assert result.entries[0].positives == ("1",)
    assert result.report["num_own_passages_judged_relevant"] == 1


@pytest.fixture(scope="module")
def report():
    runs = (run("run", {"1": ["1", "2", "3"], "3": ["3", "5", "4"], "5": ["5", "1", "2"]}),)
    return measure(
        replace(DUPLICATES, qrels={"test": DUPLICATES.qrels["dev"]}),
        everyone(runs=runs, cross_encoders={"cross": FakeTeacher(fingerprint="cross")}),
        stored_as=("int8",),
        exact=True,
    )


def test_no_system_ranks_the_query_itself(report):
    assert len(report.rows) > 12
    for name, rankings in report.details.rankings.items():
        assert all(query_id not in [each for each, _ in ranking] for query_id, ranking in rankings.items()), name
    assert report.num_own_passages == 3
    assert "3 passages were the query itself, of 3 queries, and left out" in report.notes
    assert report.to_json()["num_own_passages"] == 3


def test_the_measures_are_of_what_is_left(report):
    """By hand: the run's right passages are second of 1 and 5 with the query itself, and first without it."""
    assert figures(report.row("run"))["MRR@10"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert figures(report.row(NAME_BM25))["Recall@10"] == 1
    note = next(note for note in report.notes if "ranked passages with the query's own text" in note)
    assert note.startswith("run: 3 ")


def test_rankings_are_as_long_as_without_the_query_itself():
    passages = {f"p{n:03}": Passage(f"p{n:03}", f"common word{n}") for n in range(120)}
    queries = {"q": Query("q", "common word7")}
    dataset = Dataset("many", Path("many"), passages, queries, {"test": {"q": {"p003": 1}}})
    report = measure(dataset, Contenders(student=FakeStudent()))
    for rankings in report.details.rankings.values():
        assert len(rankings["q"]) == 100
        assert "p007" not in [each for each, _ in rankings["q"]]


def test_dev_sets_are_without_the_query_itself():
    from d2llm.data.plan import TrainingSource

    source = TrainingSource.__new__(TrainingSource)
    object.__setattr__(source, "pairs", None)
    object.__setattr__(source, "dataset", DUPLICATES)
    object.__setattr__(source, "task", "symmetric")
    object.__setattr__(source, "instruction", None)
    dev = make_dev_set(source, num_queries=3, num_passages=6, seed=0)
    assert all(query_id not in ids for query_id, ids in dev.candidates.items())
    assert all(len(ids) == 5 for ids in dev.candidates.values())
    judged = make_teacher_dev_set(
        DUPLICATES, "symmetric", list(DUPLICATES.queries.values()), student=FakeStudent(), depth=5, with_positives=False
    )
    assert all(query_id not in ids for query_id, ids in judged.candidates.items())
    assert all(len(ids) == 5 for ids in judged.candidates.values())


@pytest.mark.skipif(not QUORA.is_dir(), reason="needs shared/data/quora")
def test_quora():
    """This copy has no question twice, and ids of two sets; nine questions have the letters of their duplicate."""
    dataset = read_beir(QUORA, splits=["dev"])
    counts = dataset.own_passages.counts(dataset.positives("dev"))
    assert counts == OwnCounts(num_queries=0, num_left_out=0, num_judged=9)
    assert not dataset.own_passages.by_id
    assert str(counts) == "9 passages with a query's own text, judged relevant to it, kept"
