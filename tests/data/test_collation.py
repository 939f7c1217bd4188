"""Batches for distillation: every mask worked out by hand on a small plan."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from d2llm.data.collation import (
    DistillationBatch,
    Draw,
    LabelledSource,
    batches_per_epoch,
    collate,
    collate_lists,
    epoch_batches,
    in_batch_pairs,
)
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry, TrainingSource
from tiny_data import make_plan, make_source

# qa has two positives; qb's positive b1 has a twin with the same words, which qc draws.
PASSAGES = {
    "a1": "apple one",
    "a2": "apple two",
    "b1": "Banana, bread!",
    "c1": "cherry pie",
    "c1-twin": "cherry  PIE.",
    "h1": "hard one",
    "h2": "hard two",
    "h3": "hard three",
    "e1": "easy one",
    "b1-twin": "banana bread",
}
QA = PlanEntry("qa", ("a1", "a2"), ("h1", "h2"), ("e1",))
QB = PlanEntry("qb", ("b1",), ("h3", "a2"), ("c1-twin",))
QC = PlanEntry("qc", ("c1",), ("b1-twin", "h1"), ())
DRAWS = [
    Draw(QA, ["a1"], ["h2", "h1"], ["e1"]),
    Draw(QB, ["b1"], ["a2"], ["c1-twin"]),
    Draw(QC, ["c1"], ["b1-twin", "h1"], []),
]
COLUMNS = ("a1", "h2", "h1", "e1", "b1", "a2", "c1-twin", "c1", "b1-twin")
LOG_ODDS = {
    "qa": {"a1": 3.0, "a2": 2.0, "h1": -1.0, "h2": 0.5, "e1": -6.0},
    "qb": {"b1": 4.0, "h3": -2.0, "a2": -3.0, "c1-twin": -5.0, "h1": -2.5},  # h1: label from an earlier plan
    "qc": {"c1": 5.0, "b1-twin": -1.5, "h1": -4.0},
}
# The order of the stored Gram matrix: positives, then hard negatives of the plan.
GRAM_A = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.4], [0.1, 0.3, 1, 0.5], [0.2, 0.4, 0.5, 1]], np.float32)
NONE = -np.inf


def source(entries: tuple[PlanEntry, ...] = (QA, QB, QC)) -> TrainingSource:
    return make_source(PASSAGES, {"qa": "apples", "qb": "bananas", "qc": "cherries"}, entries)


def store(folder: Path, *, without: tuple[str, ...] = (), with_grams: bool = True) -> LabelStore:
    labels = LabelStore(folder, teacher="T", prompt="P", dataset="D")
    grams = {"qa": GRAM_A, "qb": np.eye(3, dtype=np.float32), "qc": np.full((3, 3), 0.5, np.float32)}
    labels.write(
        [
            QueryLabels(q, tuple(odds), np.array(list(odds.values()), np.float32), grams[q] if with_grams else None)
            for q, odds in LOG_ODDS.items()
            if q not in without
        ]
    )
    return labels


def batch_of(folder: Path, **options: object) -> DistillationBatch:
    return collate(LabelledSource.join(source(), store(folder, **options), keep_unlabelled=True), DRAWS)


def marked(mask: np.ndarray) -> list[set[str]]:
    return [{COLUMNS[column] for column in np.flatnonzero(row)} for row in mask]


def test_word_scores_stand_where_their_passages_do(tmp_path: Path) -> None:
    def score_words(query: str, passage_ids: Sequence[str]) -> np.ndarray:
        return np.array([len(query) + COLUMNS.index(passage_id) / 10 for passage_id in passage_ids], np.float32)

    labelled = LabelledSource.join(source(), store(tmp_path), keep_unlabelled=True)
    labelled = dataclasses.replace(labelled, score_words=score_words)
    batch = collate(labelled, DRAWS)
    lengths = np.array([[len("apples")], [len("bananas")], [len("cherries")]])
    np.testing.assert_allclose(batch.word_scores, lengths + np.arange(9)[None] / 10, rtol=1e-6)
    lists = collate_lists(labelled, DRAWS)
    assert lists.word_scores is not None
    for row, draw in enumerate(DRAWS):
        expected = [lengths[row, 0] + COLUMNS.index(passage_id) / 10 for passage_id in draw.passage_ids]
        np.testing.assert_allclose(lists.word_scores[row, : len(expected)], expected, rtol=1e-6)
        assert not lists.word_scores[row, len(expected) :].any()


def test_a_batch_holds_each_drawn_passage_once_in_the_order_drawn(tmp_path: Path) -> None:
    batch = batch_of(tmp_path)
    assert batch.query_ids == ("qa", "qb", "qc")
    assert batch.passage_ids == COLUMNS
    assert batch.positive.shape == batch.hard.shape == batch.easy.shape == batch.teacher_log_odds.shape == (3, 9)


def test_masks_by_hand(tmp_path: Path) -> None:
    batch = batch_of(tmp_path)
    assert marked(batch.positive) == [{"a1"}, {"b1"}, {"c1"}]
    assert marked(batch.hard) == [{"h1", "h2"}, {"a2"}, {"b1-twin", "h1"}]
    assert marked(batch.easy) == [
        {"e1", "b1", "c1", "c1-twin", "b1-twin"},  # not a2, its other positive, which qb draws
        {"a1", "h1", "h2", "e1", "c1", "c1-twin"},  # not b1-twin, which has the same text as b1
        {"a1", "a2", "h2", "e1", "b1"},  # not c1-twin
    ]


def test_masks_do_not_overlap(tmp_path: Path) -> None:
    batch = batch_of(tmp_path)
    assert (batch.positive.astype(int) + batch.hard + batch.easy).max() == 1


def test_labels_apply_to_passages_drawn_by_other_queries_too(tmp_path: Path) -> None:
    odds = dict(zip(COLUMNS, batch_of(tmp_path).teacher_log_odds.T.tolist(), strict=True))
    assert odds == {
        "a1": [3.0, NONE, NONE],
        "h2": [0.5, NONE, NONE],
        "h1": [-1.0, -2.5, -4.0],  # qb did not draw h1 but has a label for it
        "e1": [-6.0, NONE, NONE],
        "b1": [NONE, 4.0, NONE],
        "a2": [2.0, -3.0, NONE],  # drawn by qb; a positive of qa
        "c1-twin": [NONE, -5.0, NONE],
        "c1": [NONE, NONE, 5.0],
        "b1-twin": [NONE, NONE, -1.5],
    }


def test_gram_follows_the_drawn_order(tmp_path: Path) -> None:
    batch = batch_of(tmp_path)
    own_ids = [[COLUMNS[column] if column >= 0 else None for column in row] for row in batch.gram_columns]
    assert own_ids == [["a1", "h2", "h1"], ["b1", "a2", None], ["c1", "b1-twin", "h1"]]
    # Stored for qa: a1, a2, h1, h2. Drawn: a1, h2, h1.
    np.testing.assert_array_equal(batch.gram[0], np.array([[1, 0.2, 0.1], [0.2, 1, 0.5], [0.1, 0.5, 1]], np.float32))
    # Stored for qb: b1, h3, a2.
    np.testing.assert_array_equal(batch.gram[1], np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32))


def test_without_stored_grams_no_feature_is_imitated(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, with_grams=False)
    assert (batch.gram_columns == -1).all()
    assert np.isfinite(batch.teacher_log_odds[:, :3]).any()


def test_gram_of_an_earlier_plan_is_used_for_what_it_covers(tmp_path: Path) -> None:
    labels = store(tmp_path)
    labels.write([QueryLabels("qa", ("h1", "a1", "x"), np.zeros(3, np.float32), GRAM_A[:3, :3])])
    batch = collate(LabelledSource.join(source(), labels), DRAWS)
    assert [COLUMNS[column] for column in batch.gram_columns[0] if column >= 0] == ["a1", "h1"]
    np.testing.assert_array_equal(batch.gram[0, :2, :2], np.array([[1, 0.9], [0.9, 1]], np.float32))


def test_unlabelled_queries_are_left_out_and_counted(tmp_path: Path) -> None:
    joined = LabelledSource.join(source(), store(tmp_path, without=("qb",)))
    assert [entry.query_id for entry in joined.entries] == ["qa", "qc"]
    assert joined.num_unlabelled == 1


def test_a_query_that_lacks_one_label_counts_as_unlabelled(tmp_path: Path) -> None:
    longer = dataclasses.replace(QA, easy_negatives=("e1", "h3"))
    joined = LabelledSource.join(source((longer, QB)), store(tmp_path))
    assert [entry.query_id for entry in joined.entries] == ["qb"]
    assert joined.num_unlabelled == 1


def test_own_labels_replace_missing_teacher_labels(tmp_path: Path) -> None:
    labelled = LabelledSource.join(source(), store(tmp_path, without=("qb",)), keep_unlabelled=True)
    assert [entry.query_id for entry in labelled.entries] == ["qa", "qb", "qc"]
    assert labelled.num_unlabelled == 1
    batch = collate(labelled, DRAWS)
    by_id = dict(zip(COLUMNS, batch.teacher_log_odds[1].tolist(), strict=True))
    assert by_id.pop("b1") == 20.0  # P(yes) = 1 - 2e-9
    assert by_id.pop("a2") == -20.0
    assert set(by_id.values()) == {NONE}
    assert (batch.gram_columns[1] == -1).all()
    assert marked(batch.easy)[1] == {"a1", "h1", "h2", "e1", "c1", "c1-twin"}
    np.testing.assert_array_equal(batch.teacher_log_odds[0], batch_of(tmp_path / "all").teacher_log_odds[0])


def test_a_query_without_hard_negatives_makes_a_batch(tmp_path: Path) -> None:
    batch = collate(LabelledSource.join(source(), store(tmp_path)), [Draw(QA, ["a1"], [], ["e1"])])
    assert batch.passage_ids == ("a1", "e1")
    assert not batch.hard.any()
    np.testing.assert_array_equal(batch.gram_columns, [[0]])


def test_the_teacher_judges_every_pair_of_a_batch_that_plays_a_role(tmp_path: Path) -> None:
    labelled = LabelledSource.join(source(), store(tmp_path, without=("qb",)), keep_unlabelled=True)
    pairs = in_batch_pairs([(labelled, DRAWS[:2]), (labelled, DRAWS[2:]), (labelled, [DRAWS[0], DRAWS[2]])])
    # not qb, which learns from the data set's judgements; not a2 for qa, its other positive, drawn by qb; not c1-twin
    assert {query: set(ids) for query, ids in pairs["tiny"].items()} == {
        "qa": {"a1", "h1", "h2", "e1", "b1", "c1-twin", "c1", "b1-twin"},
        "qc": {"c1", "b1-twin", "h1", "a1", "h2", "e1"},
    }
    batch = collate(labelled, [DRAWS[0], DRAWS[2]])
    with_role = batch.positive | batch.hard | batch.easy
    for row, query_id in enumerate(batch.query_ids):
        assert {batch.passage_ids[column] for column in np.flatnonzero(with_role[row])} <= set(pairs["tiny"][query_id])


def test_labelled_pairs_are_never_judged_with_other_pairs(tmp_path: Path) -> None:
    entry = dataclasses.replace(QA, easy_negatives=(), targets=(1.0, 1.0, 0.0, 0.5))
    labelled = LabelledSource.join(source((entry,)), store(tmp_path))
    assert in_batch_pairs([(labelled, [Draw(entry, ["a1", "a2"], ["h1", "h2"], [])])]) == {}


def test_what_the_train_split_judges_relevant_is_never_negative(tmp_path: Path) -> None:
    """Also where a plan, such as one of a part of the lists, has only some of the positives."""
    few = dataclasses.replace(QA, positives=("a1",))
    judged = {"train": {"qa": {"a1": 1, "b1": 2, "h3": 0}}}
    training = make_source(PASSAGES, {"qa": "apples", "qb": "bananas", "qc": "cherries"}, (few, QB, QC), qrels=judged)
    labelled = LabelledSource.join(training, store(tmp_path))
    assert labelled.never_negative(few) == {"a1", "b1", "b1-twin"}
    batch = collate(labelled, [dataclasses.replace(DRAWS[0], entry=few), *DRAWS[1:]])
    assert marked(batch.positive)[0] == {"a1"}
    assert marked(batch.easy)[0] == {"e1", "a2", "c1", "c1-twin"}  # neither b1, nor its twin


def test_a_query_is_no_negative_of_its_own(tmp_path: Path) -> None:
    """Where queries are passages too, as in sets of duplicate questions."""
    own = {"train": {"a1": {"a2": 1}}}
    entry = PlanEntry("a1", ("a2",), ("h1",), ())
    training = make_source(PASSAGES, {"a1": PASSAGES["a1"]}, (entry,), qrels=own)
    labels = LabelStore(tmp_path, teacher="T", prompt="P", dataset="D")
    labels.write([QueryLabels("a1", ("a2", "h1"), np.zeros(2, np.float32))])
    labelled = LabelledSource.join(training, labels)
    assert labelled.never_negative(entry) == {"a1", "a2"}


# --- draws ------------------------------------------------------------------------------------------------------------

MANY = tuple(
    PlanEntry(f"q{n:02}", (f"p{n:02}", f"r{n:02}"), tuple(f"h{n:02}-{k}" for k in range(6)), ("e0", "e1", "e2"))
    for n in range(20)
)


@pytest.fixture
def many(tmp_path: Path) -> LabelledSource:
    return labelled_many(tmp_path, MANY)


def labelled_many(folder: Path, entries: tuple[PlanEntry, ...], name: str = "many") -> LabelledSource:
    passages = {passage_id: passage_id for entry in entries for passage_id in entry.passage_ids}
    training_source = make_source(passages, {entry.query_id: "text" for entry in entries}, entries, name=name)
    labels = LabelStore(folder, teacher="T", prompt="P", dataset="D")
    labels.write([QueryLabels(e.query_id, e.passage_ids, np.zeros(len(e.passage_ids), np.float32)) for e in entries])
    return LabelledSource.join(training_source, labels)


def draws_of(*sources: LabelledSource, epoch: int = 0, seed: int = 0) -> list[Draw]:
    batches = epoch_batches(sources, epoch=epoch, batch_queries=8, num_hard=3, num_easy=2, seed=seed)
    return [draw for _, draws in batches for draw in draws]


def by_query(draws: list[Draw]) -> dict[str, Draw]:
    return {draw.entry.query_id: draw for draw in draws}


def test_every_query_is_drawn_once_per_epoch(many: LabelledSource, tmp_path: Path) -> None:
    other = labelled_many(tmp_path / "other", MANY[:5], "other")
    batches = epoch_batches([many, other], epoch=3, batch_queries=8, num_hard=3, num_easy=2, seed=1)
    # each batch has one data set, and a set's batches have similar sizes: 20 = 7 + 7 + 6, and 5
    assert sorted((labelled.source.dataset.name, len(draws)) for labelled, draws in batches) == [
        ("many", 6),
        ("many", 7),
        ("many", 7),
        ("other", 5),
    ]
    counts = Counter(
        (labelled.source.dataset.name, draw.entry.query_id) for labelled, draws in batches for draw in draws
    )
    assert set(counts.values()) == {1}
    assert len(counts) == 25


def test_a_draw_takes_one_positive_and_some_negatives_of_its_own(many: LabelledSource) -> None:
    for draw in draws_of(many):
        assert draw.positives[0] in draw.entry.positives
        assert len(set(draw.hard)) == 3
        assert set(draw.hard) <= set(draw.entry.hard_negatives)
        assert len(set(draw.easy)) == 2
        assert set(draw.easy) <= set(draw.entry.easy_negatives)


def test_several_positives_are_drawn_where_a_query_has_so_many(tmp_path: Path) -> None:
    entries = tuple(PlanEntry(f"q{n}", tuple(f"p{n}-{k}" for k in range(n)), (f"h{n}",), ("e",)) for n in range(1, 6))
    labelled = labelled_many(tmp_path, entries)

    def drawn(epoch: int, num_positives: int) -> dict[str, list[str]]:
        batches = epoch_batches(
            [labelled], epoch=epoch, batch_queries=8, num_positives=num_positives, num_hard=1, num_easy=1, seed=0
        )
        return {draw.entry.query_id: draw.positives for _, draws in batches for draw in draws}

    three = drawn(0, 3)
    assert {name: len(set(positives)) for name, positives in three.items()} == {
        "q1": 1, "q2": 2, "q3": 3, "q4": 3, "q5": 3
    }  # fmt: skip
    assert all(set(three[entry.query_id]) <= set(entry.positives) for entry in entries)
    assert {passage_id for epoch in range(20) for passage_id in drawn(epoch, 3)["q5"]} == set(entries[4].positives)
    assert {len(positives) for positives in drawn(0, 1).values()} == {1}
    draws = next(draws for _, draws in epoch_batches(
        [labelled], epoch=0, batch_queries=8, num_positives=3, num_hard=1, num_easy=1, seed=0
    ))  # fmt: skip
    batch = collate(labelled, draws)
    assert batch.positive.sum(axis=1).tolist() == [len(draw.positives) for draw in draws]
    assert not (batch.positive & batch.easy).any()


def test_preferred_positives_alone_are_drawn(tmp_path: Path) -> None:
    entry = PlanEntry("q", ("p0", "p1", "p2"), ("h",), (), preferred=("p1",))
    labelled = labelled_many(tmp_path, (entry,))
    [(_, [draw])] = epoch_batches([labelled], epoch=0, batch_queries=8, num_positives=3, num_hard=1, num_easy=1, seed=0)
    assert draw.positives == ["p1"]
    assert labelled.never_negative(entry) == {"p0", "p1", "p2"}


def test_a_plan_with_too_few_negatives_gives_all_it_has(tmp_path: Path) -> None:
    few = labelled_many(tmp_path, (PlanEntry("q", ("p",), ("h",), ()),))
    [draw] = draws_of(few)
    assert (draw.positives, draw.hard, draw.easy) == (["p"], ["h"], [])


def test_a_draw_depends_only_on_seed_epoch_and_query(many: LabelledSource, tmp_path: Path) -> None:
    whole = by_query(draws_of(many, epoch=2, seed=7))
    subset = by_query(draws_of(labelled_many(tmp_path / "half", MANY[::-2]), epoch=2, seed=7))
    assert len(subset) == 10
    assert subset == {query_id: whole[query_id] for query_id in subset}
    assert by_query(draws_of(many, epoch=2, seed=7)) == whole
    assert by_query(draws_of(many, epoch=3, seed=7)) != whole
    assert by_query(draws_of(many, epoch=2, seed=8)) != whole


def test_the_order_of_the_plan_does_not_matter(many: LabelledSource, tmp_path: Path) -> None:
    reordered = labelled_many(tmp_path / "turned", MANY[::-1])
    assert draws_of(reordered, epoch=1) == draws_of(many, epoch=1)


def test_epochs_come_in_different_orders(many: LabelledSource) -> None:
    orders = {tuple(draw.entry.query_id for draw in draws_of(many, epoch=epoch)) for epoch in range(4)}
    assert len(orders) == 4


def test_make_plan_gives_different_plans_different_manifests() -> None:
    assert make_plan(MANY).manifest != make_plan(MANY[:-1]).manifest


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_the_number_of_batches_is_known_without_drawing_them(many: LabelledSource, tmp_path: Path, size: int) -> None:
    sources = [many, labelled_many(tmp_path / "other", MANY[:5], "other")]
    drawn = epoch_batches(sources, epoch=0, batch_queries=size, num_hard=1, num_easy=1, seed=0)
    assert batches_per_epoch(sources, size) == len(drawn)
