"""Preparing labelled pairs for training: ids, targets and plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.open_data import open_data
from d2llm.data.pair_training import PairTrainingSet, plan_of_pairs, read_pair_training_set, shared_pairs
from d2llm.data.pairs import PairDataset
from d2llm.data.plan import PlanEntry, TrainingPair, TrainingSource, labelled_pairs, read_plan, write_plan


def pair_set(folder: Path, **splits: list[tuple[str, str, str | float]]) -> PairTrainingSet:
    field = "score" if any(isinstance(value, float) for rows in splits.values() for _, _, value in rows) else "label"
    folder.mkdir()
    for split, rows in splits.items():
        lines = [json.dumps({"query": query, "document": document, field: value}) for query, document, value in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    pairs = open_data(folder)
    assert isinstance(pairs, PairDataset)
    return read_pair_training_set(pairs)


NLI = [
    ("a man sleeps", "a person sleeps", "entailment"),
    ("a man sleeps", "nobody sleeps", "contradiction"),
    ("a dog runs", "a cat runs", "neutral"),
]


def test_texts_get_ids_and_classes_become_probabilities(tmp_path: Path) -> None:
    prepared = pair_set(tmp_path / "nli", train=NLI, dev=NLI[:1])
    assert [query.text for query in prepared.dataset.queries.values()] == ["a man sleeps", "a dog runs", "a man sleeps"]
    assert prepared.targets == {
        "train": {
            "train/train-1": {"train/train-1": 1.0, "train/train-2": 0.0},
            "train/train-3": {"train/train-3": 0.5},
        },
        "dev": {"dev/dev-1": {"dev/dev-1": 1.0}},
    }
    assert prepared.dataset.passages["train/train-2"].text == "nobody sleeps"
    assert prepared.dataset.qrels["train"]["train/train-1"] == {"train/train-1": 1, "train/train-2": 0}


def test_scores_are_scaled_by_the_training_split(tmp_path: Path) -> None:
    train: list[tuple[str, str, str | float]] = [("a", "b", 1.0), ("a", "c", 5.0), ("d", "b", 2.0)]
    prepared = pair_set(tmp_path / "sts", train=train, dev=[("x", "y", 0.0), ("x", "z", 3.0)])
    assert list(prepared.targets["train"]["train/train-1"].values()) == [0.0, 1.0]
    assert list(prepared.targets["train"]["train/train-3"].values()) == [0.25]
    assert list(prepared.targets["dev"]["dev/dev-1"].values()) == [0.0, 0.5]  # below the range: clipped


def test_a_repeated_pair_gets_its_mean_target(tmp_path: Path) -> None:
    prepared = pair_set(tmp_path / "binary", train=[("a", "b", "1"), ("a", "b", "0"), ("a", "c", "0")])
    assert prepared.num_repeated == 1
    assert prepared.targets["train"]["train/train-1"] == {"train/train-1": 0.5, "train/train-3": 0.0}
    assert "1 pair repeated" in prepared.dataset.issues


def test_the_plan_contains_the_labelled_pairs(tmp_path: Path) -> None:
    prepared = pair_set(tmp_path / "nli", train=NLI)
    first, second = plan_of_pairs(prepared, "train", seed=0)
    assert first == PlanEntry("train/train-1", ("train/train-1",), ("train/train-2",), (), (1.0, 0.0))
    assert (second.positives, second.hard_negatives, second.targets) == ((), ("train/train-3",), (0.5,))
    assert plan_of_pairs(prepared, "train", seed=0) == [first, second]
    assert len(plan_of_pairs(prepared, "train", seed=0, max_queries=1)) == 1


def test_pairs_that_another_split_has_can_be_left_out(tmp_path: Path) -> None:
    prepared = pair_set(tmp_path / "nli", train=NLI, dev=[("nobody sleeps", "a man sleeps", "neutral")])
    shared = shared_pairs(prepared, "train")
    assert shared == {("train/train-1", "train/train-2")}
    first, second = plan_of_pairs(prepared, "train", leave_out=shared, seed=0)
    assert (first.positives, first.hard_negatives) == (("train/train-1",), ())
    assert second.hard_negatives == ("train/train-3",)
    both = shared_pairs(pair_set(tmp_path / "same", train=NLI, dev=NLI), "train")
    assert len(both) == 3
    with pytest.raises(InputError, match="has no pairs to train on that no other split has"):
        plan_of_pairs(prepared, "train", leave_out=both, seed=0)


def test_a_plan_of_pairs_can_be_written_and_read(tmp_path: Path) -> None:
    prepared = pair_set(tmp_path / "nli", train=NLI)
    entries = plan_of_pairs(prepared, "train", seed=0)
    write_plan(tmp_path / "plan", entries, {})
    plan = read_plan(tmp_path / "plan")
    assert plan.entries == tuple(entries)
    source = TrainingSource(prepared.dataset, plan, "symmetric")
    pairs = labelled_pairs([source], num_negatives=4, max_queries=None, seed=0)
    assert sorted((pair.query, pair.passage, pair.target) for pair in pairs) == [
        ("a dog runs", "a cat runs", 0.5),
        ("a man sleeps", "a person sleeps", 1.0),
        ("a man sleeps", "nobody sleeps", 0.0),
    ]
    assert [pair.is_positive for pair in sorted(pairs, key=lambda pair: pair.target)] == [False, False, True]


def test_invalid_targets_are_rejected(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", [PlanEntry("q", ("a",), ("b",), (), (1.0, 0.0))], {})
    path = tmp_path / "plan" / "plan.jsonl"
    for targets, message in ([1.0], "a number for each"), ([1.0, 7.0], "numbers from 0 to 1"), ("x", "numbers from 0"):
        record = json.loads(path.read_text()) | {"targets": targets}
        path.write_text(json.dumps(record))
        with pytest.raises(DataFormatError, match=message):
            read_plan(tmp_path / "plan")


def test_labels_that_cannot_be_learnt_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="pair 'train-1' has the class 'sport'"):
        pair_set(tmp_path / "classes", train=[("a", "b", "sport"), ("a", "c", "news"), ("d", "e", "art")])
    with pytest.raises(DataFormatError, match="scores of split 'train' are all equal"):
        pair_set(tmp_path / "flat", train=[("a", "b", 2.0), ("a", "c", 2.0)])
    prepared = pair_set(tmp_path / "nli", dev=NLI)
    with pytest.raises(InputError, match="split 'train' has no pairs"):
        plan_of_pairs(prepared, "train", seed=0)


def test_a_labelled_pair_is_positive_only_above_one_half() -> None:
    assert not TrainingPair("q", "p", "symmetric", 0.5).is_positive
