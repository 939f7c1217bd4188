"""Positives and hard negatives that a teacher chooses (Gecko): by hand, and what a batch makes of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from pydantic import ValidationError

from d2llm.data.collation import LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.plan import PlanEntry
from d2llm.methods.losses.relabelled_cross_entropy import Negatives, RelabelledCrossEntropy
from d2llm.recipe import Recipe
from d2llm.training.losses import Preparation
from tiny_data import make_source

PASSAGES = {name: f"text {name}" for name in "abcdxy"}
ENTRIES = [
    PlanEntry("q", ("a",), ("b", "c", "d"), ("x",)),  # the teacher finds c best, then a, d, b
    PlanEntry("r", ("d",), ("a", "b"), ()),  # of two that it finds equal, the positive of the plan comes first
    PlanEntry("s", ("b",), ("c", "d", "a"), ()),  # not labelled
]
LABELS = {
    "q": {"a": 2.0, "b": -3.0, "c": 4.0, "d": -1.0, "x": 9.0},
    "r": {"d": 1.0, "a": 1.0, "b": 0.0},
    "s": {"b": 0.0, "c": 1.0},
}


@pytest.fixture
def labelled(tmp_path: Path) -> LabelledSource:
    source = make_source(PASSAGES, {"q": "q", "r": "r", "s": "s"}, ENTRIES, qrels={"train": {"q": {"a": 1}}})
    labels = LabelStore(tmp_path, teacher="T", prompt="P", dataset="tiny")
    labels.write([QueryLabels(key, tuple(own), np.array([*own.values()], np.float32)) for key, own in LABELS.items()])
    return LabelledSource.join(source, labels, keep_unlabelled=True)


@pytest.mark.parametrize(
    ("negatives", "expected"),
    [
        ("lowest", {"q": (("c",), ("b",), ("x",)), "r": (("d",), ("b",), ())}),
        ("others", {"q": (("c",), ("a", "d", "b"), ("x",)), "r": (("d",), ("a", "b"), ())}),
    ],
)
def test_what_the_teacher_chooses(labelled: LabelledSource, negatives: Negatives, expected: dict[str, Any]) -> None:
    preparation = cast("Preparation", SimpleNamespace(sources=[labelled]))
    assert RelabelledCrossEntropy(negatives=negatives).prepare(preparation) == {}
    (changed,) = preparation.sources
    found = {each.query_id: (each.positives, each.hard_negatives, each.easy_negatives) for each in changed.entries}
    assert found == expected | {"s": (("b",), ("c", "d", "a"), ())}
    ((_, draws),) = epoch_batches([changed], epoch=0, batch_queries=3, num_hard=3, num_easy=0, seed=0)
    batch = collate(changed, draws)
    row, column = batch.query_ids.index("q"), {name: index for index, name in enumerate(batch.passage_ids)}
    assert np.flatnonzero(batch.positive[row]).tolist() == [column["c"]]
    assert set(np.flatnonzero(batch.hard[row])) == {column[name] for name in expected["q"][1]}
    assert not batch.easy[row, column["a"]]  # that the data set judges it relevant still counts for others' passages


def test_it_needs_labels() -> None:
    assert Recipe.model_validate({"losses": {"relabelled_cross_entropy": 1}}).losses.imitates
    with pytest.raises(ValidationError, match="lowest"):
        Recipe.model_validate({"losses": {"relabelled_cross_entropy": {"negatives": "best"}}})
