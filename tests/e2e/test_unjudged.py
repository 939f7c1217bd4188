"""``training.unjudged``: the treatment of passages that training itself finds and the teacher has not scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from d2llm.data.collation import LabelledSource
from d2llm.data.labels import LabelStore
from d2llm.recipe import ResidualConfig
from d2llm.training import residual
from tiny_distill import Workspace

STAGE = ResidualConfig(epochs=2, warmup_steps=0, batch_queries=4, depth=12, num_near=5, num_random=3)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("unjudged"))


def run(workspace: Workspace, folder: Path, patch: pytest.MonkeyPatch, **training: Any) -> tuple[LabelStore, list[Any]]:
    """Run on a copy of the labels; return their store and all batches of the second stage."""
    labels = folder / "labels"
    shutil.copytree(workspace.labels, labels)
    batches: list[Any] = []
    collate = residual.collate_lists

    def recorded(labelled: LabelledSource, draws: Any) -> Any:
        batch = collate(labelled, draws)
        batches.append((draws, batch))
        return batch

    patch.setattr(residual, "collate_lists", recorded)
    workspace.run(folder / "student", labels=labels, residual=STAGE, **training)
    return workspace.store(labels), batches


def count_unlabelled_neighbours(batches: list[Any]) -> int:
    """Count the candidates of the second stage that are not random and have no label from the teacher."""
    return sum(int((batch.easy & (batch.teacher_log_odds == float("-inf"))).sum()) for _, batch in batches)


def test_neighbours_count_as_irrelevant_by_default(workspace, tmp_path, monkeypatch):
    store, batches = run(workspace, tmp_path, monkeypatch)
    assert store.num_pairs == workspace.store(workspace.labels).num_pairs
    assert count_unlabelled_neighbours(batches) > 0


def test_the_teacher_judges_neighbours_once_and_labels_are_kept(workspace, tmp_path, monkeypatch):
    before = workspace.store(workspace.labels)
    monkeypatch.setattr(residual, "_draw", without_random(residual._draw))
    store, batches = run(workspace, tmp_path, monkeypatch, unjudged="ask_teacher")
    assert store.num_pairs > before.num_pairs
    assert count_unlabelled_neighbours(batches) == 0
    new = {query_id: set(store.log_odds(query_id)) - set(before.log_odds(query_id)) for query_id in store.query_ids}
    drawn = {(draw.entry.query_id, passage_id) for draws, _ in batches for draw in draws for passage_id in draw.easy}
    assert {(query_id, p) for query_id, ids in new.items() for p in ids} <= drawn
    for entry in workspace.source.plan.entries:  # earlier labels are unchanged
        assert before.log_odds(entry.query_id).items() <= store.log_odds(entry.query_id).items()


def test_a_resumed_run_does_not_ask_the_teacher_again(workspace, tmp_path, monkeypatch):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(residual._Training, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, tmp_path, patch, unjudged="ask_teacher")
    num_labels = workspace.store(tmp_path / "labels").num_pairs
    assert num_labels > workspace.store(workspace.labels).num_pairs

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher is loaded although it has nothing to judge")

    monkeypatch.setattr("d2llm.training.label.load_teacher", refuse)
    workspace.run(tmp_path / "student", labels=tmp_path / "labels", residual=STAGE, unjudged="ask_teacher")
    assert workspace.store(tmp_path / "labels").num_pairs == num_labels


def test_neighbours_without_a_label_can_be_left_out(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(residual, "_draw", without_random(residual._draw))
    store, batches = run(workspace, tmp_path, monkeypatch, unjudged="leave_out")
    assert store.num_pairs == workspace.store(workspace.labels).num_pairs
    assert count_unlabelled_neighbours(batches) == 0


def test_the_teacher_is_not_asked_behind_a_closed_gate(workspace, tmp_path, monkeypatch):
    """A closed gate: the data set teaches without the teacher, and its neighbours count as irrelevant."""
    calls: list[Any] = []
    monkeypatch.setattr("d2llm.training.label.label_pool", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(residual, "_draw", without_random(residual._draw))
    _, batches = run(
        workspace, tmp_path, monkeypatch, unjudged="ask_teacher", closed_gates=[workspace.source.dataset.name]
    )
    assert calls == []
    assert count_unlabelled_neighbours(batches) > 0


def test_newly_mined_negatives_are_judged_or_left_out(workspace, tmp_path, monkeypatch):
    before = workspace.store(workspace.labels)
    for unjudged in ("ask_teacher", "leave_out"):
        labels = tmp_path / unjudged
        shutil.copytree(workspace.labels, labels)
        sources: list[LabelledSource] = []
        original = LabelledSource.without_unjudged_negatives

        def recorded(
            source: LabelledSource, kept_sources: list[LabelledSource] = sources, original: Any = original
        ) -> Any:
            kept_sources.append(original(source))
            return kept_sources[-1]

        monkeypatch.setattr(LabelledSource, "without_unjudged_negatives", recorded)
        workspace.run(tmp_path / f"{unjudged}-student", labels=labels, remine=True, unjudged=unjudged, epochs=2)
        monkeypatch.undo()
        (renewed,) = sources
        store = workspace.store(labels)
        assert all(not store.missing(entry.query_id, entry.hard_negatives) for entry in renewed.entries)
        if unjudged == "ask_teacher":
            assert sum(len(entry.hard_negatives) for entry in renewed.entries) > 0
        else:
            assert store.num_pairs == before.num_pairs


def without_random(draw: Any) -> Any:
    """Wrap ``draw`` to leave out random passages, which are never judged, so that only neighbours are drawn."""

    def drawn(vectors: Any, position: int, config: ResidualConfig, seed: str, **options: Any) -> Any:
        return draw(vectors, position, config.model_copy(update={"num_random": 0}), seed, **options)

    return drawn
