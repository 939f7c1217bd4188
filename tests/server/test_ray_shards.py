"""The actor of a shard, in this process; tests/e2e/test_server_ray.py has it on a cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from d2llm import Index, Passage, Student
from d2llm.core.errors import MismatchError, ShardAwayError
from d2llm.retrieval.shard import shard
from d2llm.runners.ray_runner import own_versions
from d2llm.server import ray_shards
from d2llm.server.ray_shards import ShardCluster
from d2llm.server.settings import ServeSettings
from d2llm.server.shard_actor import NotOpenError, ShardActor, ShardVersion
from d2llm.store.shards import Storage
from tiny_server import write_tiny_index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shard(write_tiny_index(tmp_path), tmp_path / "sharded", 2)
    return tmp_path / "sharded"


def latest(folder: Path) -> ShardVersion:
    """The latest version of shard 0."""
    store = Storage.of_manifest(folder)
    return ShardVersion(folder, dict(store.manifest), store.records[0], 0, 2)


def add(folder: Path, name: str) -> None:
    """Add passages to both shards."""
    Index.open(folder).upsert([Passage(f"{name}{n}", f"a cat by the sea {n}") for n in range(8)])


def count(actor: ShardActor, one: ShardVersion) -> int:
    return len(actor._opened(one.version).view)


def test_an_actor_keeps_the_versions_that_are_in_use_and_no_others(sharded: Path):
    scorer: Any = Student.load(sharded.parent / "student-0").without_backbone()
    actor = ShardActor(own_versions(), str(Path.cwd()))
    first = latest(sharded)
    size = actor.open(first, scorer, frozenset()).num_passages
    for name in ("x", "y", "z"):  # versions that another shard fails to open, so that the first is still served
        add(sharded, name)
        assert actor.open(latest(sharded), scorer, frozenset({first.version})).num_passages > size
        assert count(actor, first) == size
    assert len(actor._open) == 2
    add(sharded, "w")
    actor.open(latest(sharded), scorer, frozenset())
    with pytest.raises(NotOpenError):
        actor.count_words(first.version, np.zeros(1, np.uint64))


def test_a_call_that_fails_before_it_is_sent_is_tried_again_with_another_actor(sharded: Path, monkeypatch):
    ray = MagicMock()
    ray.exceptions.ActorDiedError = ChildProcessError
    ray.wait.return_value = [True], []
    new_actor = ray.remote.return_value.return_value.remote
    new_actor.return_value.open.options.side_effect = ChildProcessError("it is gone")
    monkeypatch.setattr(ray_shards, "import_ray", lambda: ray)
    one = ray_shards._Shard(latest(sharded), ServeSettings(index=[sharded]))
    (replica,) = one.replicas
    assert one.attend(replica, None)  # which wakes up who waits
    assert (replica.has_failed, "it is gone" in str(one.error)) == (True, True)
    new_actor.return_value.open.options.side_effect, replica.retry_at = None, 0.0
    assert [one.attend(replica, None) for _ in range(2)] == [False, True]
    assert one.is_ready(one.desired.version)
    assert new_actor.call_count == 2


def test_replicas_have_shard_seconds_together_to_answer(sharded: Path, monkeypatch):
    class Unanswered(Exception):
        pass

    ray = MagicMock()
    ray.exceptions.RayTaskError = ChildProcessError
    ray.exceptions.GetTimeoutError = ray.exceptions.RayError = Unanswered
    limits = []

    def get(_: Any, timeout: float) -> None:
        limits.append(timeout)
        time.sleep(timeout)
        raise Unanswered

    ray.get = get
    monkeypatch.setattr(ray_shards, "import_ray", lambda: ray)
    one = ray_shards._Shard(latest(sharded), ServeSettings(index=[sharded], shard_seconds=0.2, shard_replicas=2))
    version = one.desired.version
    for replica in one.replicas:
        replica.ready.add(version)
    with pytest.raises(ShardAwayError, match=r"does not answer: no answer within 0\.2 seconds"):
        one.call(version, "count_words")
    assert limits[0] == pytest.approx(0.1, abs=0.05)
    assert sum(limits) <= 0.2
    assert not one.is_ready(version)  # until a replica answers again


def test_an_actor_with_other_versions_is_refused(sharded: Path):
    actor = ShardActor(own_versions() | {"d2llm": "0.0.1"}, str(Path.cwd()))
    with pytest.raises(MismatchError, match=r"instead of 0\.0\.1"):
        actor.open(latest(sharded), Student.load(sharded.parent / "student-0").without_backbone(), frozenset())


def test_a_cluster_that_was_never_used_can_be_stopped():
    ShardCluster(ServeSettings()).stop()
