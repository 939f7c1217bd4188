"""Scoring a pool of passages: the order of the pairs, what is scored, stored and reused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import ModelError
from d2llm.data.labels import LabelStore
from d2llm.evaluation import pool_scores
from d2llm.evaluation.pool_scores import interleaved, score_pool
from d2llm.models.teachers.pair_teacher import load_teacher, recorded_teacher
from d2llm.recipe.recipe import named_teacher
from fake_models import FakeTeacher, Interruption
from list_endpoint import judged_lists, list_teacher

QUERIES = {"q1": "cat dog", "q2": "fish", "q3": "red bird"}
PASSAGES = {"a": "cat", "b": "dog cat", "c": "red fish", "d": "bird"}
POOL = {"q1": ["b", "a"], "q2": ["c"], "q3": ["d", "c", "a"]}
KEY = {"teacher": "fake-teacher", "prompt": "fake-prompt-asymmetric", "dataset": "tiny"}
SCORES = {"q1": {"b": 2, "a": 1}, "q2": {"c": 1}, "q3": {"d": 1, "c": 1, "a": 0}}


def score_tiny(teacher, folder, *, pool=POOL, known=None, task="asymmetric"):
    return score_pool(teacher, pool, QUERIES, PASSAGES, task, dataset="tiny", store=folder, known=known, title="asking")


@pytest.mark.parametrize(
    ("rankings", "depth", "expected"),
    [
        ([["a", "b", "c"], ["d", "e"]], 9, ["a", "d", "b", "e", "c"]),
        ([["a", "b", "c"], ["b", "a", "d"]], 3, ["a", "b", "c"]),
        ([["a"], ["a", "b", "c"]], 2, ["a", "b"]),
        ([[], ["x"]], 1, ["x"]),
        ([[], []], 3, []),
    ],
)
def test_interleaving_alternates_without_duplicates(rankings, depth, expected):
    assert interleaved(rankings, depth) == expected


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=3), st.integers(1, 8))
def test_a_deeper_interleaving_extends_a_shallower_one(rankings, depth):
    deeper = interleaved(rankings, depth + 1)
    assert interleaved(rankings, depth) == deeper[:depth]
    assert set(interleaved(rankings, 100)) == {item for ranking in rankings for item in ranking}


def test_every_pair_is_judged_once_and_stored(tmp_path):
    teacher = FakeTeacher()
    scores = score_tiny(teacher, tmp_path / "store")
    assert scores.scores == SCORES
    assert [list(scores) for scores in scores.scores.values()] == list(POOL.values())  # in the pool's order
    assert teacher.pairs == [(QUERIES[query], PASSAGES[passage]) for query, ids in POOL.items() for passage in ids]
    assert (scores.num_new, scores.num_truncated) == (6, 0)
    stored = LabelStore.open_for_reading(tmp_path / "store", **KEY)
    assert {query: stored.log_odds(query) for query in POOL} == SCORES
    assert stored.gram("q1") is None


def test_nothing_is_judged_again(tmp_path):
    score_tiny(FakeTeacher(), tmp_path / "store")
    second = FakeTeacher()
    scores = score_tiny(second, tmp_path / "store")
    assert (scores.scores, scores.num_new, second.pairs) == (SCORES, 0, [])
    third = FakeTeacher()
    scores = score_tiny(third, tmp_path / "store", pool=POOL | {"q2": ["a", "c"]})
    assert third.pairs == [("fish", "cat")]
    assert scores.scores["q2"] == {"a": 0, "c": 1}


def test_another_judge_or_task_is_judged_separately(tmp_path):
    score_tiny(FakeTeacher(), tmp_path / "store")
    other, task = FakeTeacher(fingerprint="other"), FakeTeacher()
    score_tiny(other, tmp_path / "store")
    score_tiny(task, tmp_path / "store", task="symmetric")
    assert len(other.pairs) == len(task.pairs) == 6


def test_known_labels_are_used_but_not_copied(tmp_path):
    score_tiny(FakeTeacher(), tmp_path / "known", pool={"q1": ["a", "b"], "q3": ["d"]})
    before = sorted(path.read_bytes() for path in (tmp_path / "known").rglob("*.*"))
    teacher = FakeTeacher()
    scores = score_tiny(teacher, tmp_path / "store", known=tmp_path / "known")
    assert teacher.pairs == [("fish", "red fish"), ("red bird", "red fish"), ("red bird", "cat")]
    assert scores.scores == SCORES
    assert sorted(path.read_bytes() for path in (tmp_path / "known").rglob("*.*")) == before
    stored = LabelStore(tmp_path / "store", **KEY)
    assert stored.num_pairs == 3


def test_own_judgements_take_precedence_over_known_labels(tmp_path):
    class Contrary(FakeTeacher):
        def score_pairs(self, pairs, task, **options):
            scores = super().score_pairs(pairs, task, **options)
            return replace(scores, log_odds=-scores.log_odds)

    score_tiny(Contrary(), tmp_path / "known")
    score_tiny(FakeTeacher(), tmp_path / "store")
    assert score_tiny(FakeTeacher(), tmp_path / "store", known=tmp_path / "known").scores == SCORES


def test_pairs_stored_before_an_interruption_are_reused(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 3)
    monkeypatch.setattr(pool_scores, "_SHARD_SECONDS", 0)
    with pytest.raises(Interruption):
        score_tiny(FakeTeacher(fail_after=4), tmp_path / "store")
    teacher = FakeTeacher()
    assert score_tiny(teacher, tmp_path / "store").scores == SCORES
    assert teacher.pairs == [("red bird", PASSAGES[passage]) for passage in "dca"]


def test_truncated_pairs_are_counted(tmp_path):
    passages = PASSAGES | {"c": "word " * 300}
    scores = score_pool(
        FakeTeacher(), POOL, QUERIES, passages, "asymmetric", dataset="tiny", store=tmp_path / "store", title="asking"
    )
    assert (scores.num_new, scores.num_truncated) == (6, 2)


def test_a_nan_score_is_refused(tmp_path):
    class Broken(FakeTeacher):
        def score_pairs(self, pairs, task, **options):
            scores = super().score_pairs(pairs, task, **options)
            return replace(scores, log_odds=scores.log_odds * float("nan"))

    with pytest.raises(ModelError, match="log-odds of query 'q1' and passage 'b' are nan"):
        score_tiny(Broken(), tmp_path / "store")


def test_an_empty_pool_judges_nothing(tmp_path):
    scores = score_tiny(FakeTeacher(), tmp_path / "store", pool={"q1": []})
    assert (scores.scores, scores.num_new) == ({"q1": {}}, 0)
    assert not (tmp_path / "store").exists()


def test_the_progress_bar_shows_pairs_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 110.0])
    monkeypatch.setattr(pool_scores, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    updates: list[tuple[int, str]] = []
    count = pool_scores.with_rate(lambda number, note="": updates.append((number, note)))
    count(10)
    count(40)
    assert updates == [(10, "5.0 pairs/s"), (40, "5.0 pairs/s")]


def test_lists_are_judged_again_as_a_whole_by_a_teacher_that_ranks_them(tmp_path):
    with list_teacher(tmp_path, "listwise") as (file, endpoint):
        teacher = load_teacher(named_teacher(str(file)))

        def shown(pool, folder, known=None):
            before = len(endpoint.requests)
            scores = score_tiny(teacher, tmp_path / folder, pool=pool, known=known and tmp_path / known).scores
            assert {name: {*values} for name, values in scores.items()} == {name: {*ids} for name, ids in pool.items()}
            return [sorted(judged_lists(request)[1]) for request in endpoint.requests[before:]]

        assert shown({"q1": ["a", "b"]}, "one") == [["cat", "dog cat"]]
        assert shown({"q1": ["a", "b"]}, "one") == []
        assert shown({"q1": ["a", "b", "d"]}, "one") == [["bird", "cat", "dog cat"]]
        assert shown({"q1": ["a", "b"]}, "two", known="one") == []
        assert shown({"q1": ["a", "c"]}, "two", known="one") == [["cat", "red fish"]]
        # Labels of two stores are of two lists.
        assert shown({"q1": ["b", "c"]}, "two", known="one") == [["dog cat", "red fish"]]


def test_passages_without_a_grade_are_named(tmp_path):
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"query": "cat dog", "passages": ["cat"], "grades": [90]}\n')
    teacher = load_teacher(recorded_teacher(named_teacher("graded:large"), lists))
    for _ in range(2):  # scored now, and read again
        result = score_tiny(teacher, tmp_path / "store")
        assert result.ungraded == {"q1": {"b"}, "q2": {"c"}, "q3": {"a", "c", "d"}}
    assert score_tiny(FakeTeacher(), tmp_path / "other").ungraded == {}
