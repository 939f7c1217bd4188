"""Labelling on a full disk, and within bounded memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import d2llm.core.files as files
import d2llm.training.label as verb
from d2llm.core.errors import InputError
from d2llm.core.types import TASKS, Task
from d2llm.data.labels import LabelStore
from d2llm.evaluation import pool_scores
from d2llm.models.teachers.identity import TeacherIdentity
from d2llm.models.teachers.pair_teacher import TeacherScores, TextPair
from d2llm.recipe import TeacherConfig
from tiny_data import topics

NUM_QUERIES = 40


class LengthTeacher:
    """Scores a pair by how much longer the passage is than the query; records the number of pairs of each call."""

    fingerprint = "length"

    def __init__(self, *, has_features: bool = True) -> None:
        self.has_features = has_features
        self.asked: list[int] = []

    def prompt_fingerprint(self, task: Task) -> str:
        return f"length-{task}"

    def score_pairs(
        self,
        pairs: Sequence[TextPair],
        task: Task,
        *,
        with_features: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> TeacherScores:
        del task
        self.asked.append(len(pairs))
        if advance is not None:
            advance(len(pairs))
        log_odds = np.array([len(passage) - len(query) for query, passage in pairs], dtype=np.float32)
        features = np.stack([log_odds, np.ones_like(log_odds)], axis=1) if with_features and self.has_features else None
        return TeacherScores(log_odds, features, 0, len(pairs), num_bounded=1, num_undecided=2)


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> LengthTeacher:
    teacher = LengthTeacher()
    monkeypatch.setattr(verb, "load_teacher", lambda *_, **__: teacher)
    prompts = {task: teacher.prompt_fingerprint(task) for task in TASKS}
    monkeypatch.setattr(verb, "identify_teacher", lambda _: TeacherIdentity(teacher.fingerprint, prompts))
    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 36)  # the pairs of four queries
    monkeypatch.setattr(pool_scores, "_SHARD_SECONDS", 0.0)
    return teacher


def run(store: Path) -> verb.LabelReport:
    return verb.label([topics(num_train=NUM_QUERIES)], store, teacher=TeacherConfig())


def stored(folder: Path) -> LabelStore:
    return LabelStore(folder, teacher="length", prompt="length-asymmetric", dataset="tiny")


def test_full_disk_loses_no_written_labels(tmp_path, monkeypatch, teacher):
    """The disk fills up while a shard's second file is being flushed."""
    whole = run(tmp_path / "whole")
    original, remaining = os.fsync, [14]

    def fsync(descriptor: int) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(
            InputError, match=r"labels cannot be written \(No space left on device\).*run the same command again"
        ):
            run(tmp_path / "store")
    before = stored(tmp_path / "store")
    assert 0 < len(before) < NUM_QUERIES
    assert not list((tmp_path / "store").rglob(".*"))  # no partial file is left behind
    judged_before = sum(teacher.asked)
    report = run(tmp_path / "store")
    assert report.finished_queries == len(before)
    assert sum(teacher.asked) - judged_before == report.pairs == whole.pairs - before.num_pairs
    after, undisturbed = stored(tmp_path / "store"), stored(tmp_path / "whole")
    assert after.num_duplicates == 0
    assert {q: after.log_odds(q) for q in after.query_ids} == {
        q: undisturbed.log_odds(q) for q in undisturbed.query_ids
    }


def test_memory_holds_one_chunk_of_labels(tmp_path, monkeypatch, teacher):
    """With any number of pairs, the teacher gets a few queries at a time and the store holds no labels in memory."""
    opened: list[LabelStore] = []
    original = LabelStore.__init__

    def recording_init(self: LabelStore, folder: Path, **key: str) -> None:
        original(self, folder, **key)
        opened.append(self)

    monkeypatch.setattr(LabelStore, "__init__", recording_init)
    report = run(tmp_path)
    max_passages = max(len(entry.passage_ids) for entry in topics(num_train=NUM_QUERIES).plan.entries)
    assert max(teacher.asked) <= 4 * max_passages < report.pairs
    assert len(opened) == 1
    assert opened[0].num_pairs == 0
    assert stored(tmp_path).num_pairs == report.pairs


def test_without_features_only_new_pairs_are_judged(tmp_path: Path, teacher: LengthTeacher) -> None:
    teacher.has_features = False
    first = run(tmp_path)
    assert (first.num_bounded, first.num_undecided) == (len(teacher.asked), 2 * len(teacher.asked))
    assert stored(tmp_path).gram(stored(tmp_path).query_ids[0]) is None
    second = run(tmp_path)
    assert (second.pairs, second.finished_queries) == (0, NUM_QUERIES)
