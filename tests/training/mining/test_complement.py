"""Training on what BM25 gets wrong: which negatives and positives are left, and that every passage keeps its role."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.data.collation import LabelledSource, collate, epoch_batches
from d2llm.data.labels import LabelStore
from d2llm.data.pairs import PairDataset
from d2llm.data.plan import PlanEntry
from d2llm.training.distill import complement_words
from tiny_data import make_source
from tiny_distill import Workspace, log_of

PASSAGES = {
    "both": "red cats sleep",  # two words of the query, the first of BM25
    "one": "red bread",  # one word, the second
    "long": "a red car on a long road near the old harbour of a small town",  # one word in a long text, the third
    "none": "felines rest",
    "also none": "kittens nap",
}
ENTRIES = [
    PlanEntry("q", ("both", "none"), ("one", "long", "also none"), ()),
    PlanEntry("found", ("one",), ("both",), ("none",)),
]


def labelled(folder: Path, entries: list[PlanEntry] = ENTRIES) -> LabelledSource:
    source = make_source(PASSAGES, {"q": "red cats", "found": "bread"}, entries)
    return LabelledSource.join(
        source, LabelStore(folder, teacher="T", prompt="P", dataset="tiny"), keep_unlabelled=True
    )


def by_query(source: LabelledSource) -> dict[str, PlanEntry]:
    return {entry.query_id: entry for entry in source.entries}


def test_what_bm25_ranks_first_decides_the_roles(tmp_path: Path) -> None:
    entries = by_query(complement_words(labelled(tmp_path), 2))
    assert entries["q"].hard_negatives == ("one",)
    assert entries["q"].easy_negatives == ("long", "also none")
    assert entries["q"].positives == ("both", "none")
    assert entries["q"].drawn_positives == ("none",)
    assert {*entries["q"].passage_ids} == {*ENTRIES[0].passage_ids}


def test_a_query_of_which_bm25_has_all_positives_keeps_them(tmp_path: Path) -> None:
    found = by_query(complement_words(labelled(tmp_path), 2))["found"]
    assert found.drawn_positives == found.positives == ("one",)
    assert found.hard_negatives == ()  # shares no word with the query, so BM25 does not rank it
    assert found.easy_negatives == ("none", "both")


def test_with_more_passages_more_negatives_stay_hard(tmp_path: Path) -> None:
    entries = by_query(complement_words(labelled(tmp_path), 3))
    assert entries["q"].hard_negatives == ("one", "long")


def test_only_missed_positives_are_drawn_and_the_others_are_no_negatives(tmp_path: Path) -> None:
    source = complement_words(labelled(tmp_path), 2)
    for epoch in range(8):
        for each, draws in epoch_batches([source], epoch=epoch, batch_queries=2, num_hard=1, num_easy=0, seed=0):
            batch = collate(each, draws)
            row = batch.query_ids.index("q")
            positive = [p for p, is_positive in zip(batch.passage_ids, batch.positive[row], strict=True) if is_positive]
            assert positive == ["none"]
            other = batch.passage_ids.index("one")
            assert batch.hard[row, other]
            if "both" in batch.passage_ids:  # as the negative of the other query
                assert not batch.easy[row, batch.passage_ids.index("both")]


def test_a_plan_without_negatives_of_bm25_is_refused(tmp_path: Path) -> None:
    entries = [PlanEntry("q", ("both",), ("also none",), ())]
    with pytest.raises(InputError, match="none of the hard negatives of 'tiny' is among BM25's first 2"):
        complement_words(labelled(tmp_path, entries), 2)


def test_labelled_pairs_stay_as_they_are(tmp_path: Path) -> None:
    source = labelled(tmp_path)
    pairs = replace(
        source, source=replace(source.source, pairs=PairDataset("tiny", Path("tiny"), "binary", (), {}, ()))
    )
    assert complement_words(pairs, 2) is pairs


def test_a_run_learns_from_them(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    workspace.run(tmp_path / "plain", epochs=1)
    workspace.run(tmp_path / "student", complement_words=3, epochs=1)
    losses = [[row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("plain", "student")]
    assert len(losses[0]) == len(losses[1])
    assert not np.allclose(losses[0], losses[1])
