"""Work on a Ray cluster of two nodes on this machine: its order, and workers, nodes and shards that end it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial

import pytest

import ray_work
from d2llm.core.errors import D2LLMError, DataFormatError, InputError, MismatchError, ModelError
from d2llm.core.progress import ignore
from d2llm.runners import ray_runner
from d2llm.runners.ray_runner import RayRunner

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
SHARDS = [list(range(start, start + 3)) for start in range(0, 60, 3)]
SQUARES = [[number**2 for number in shard] for shard in SHARDS]


def results_of(runner, folder, shards=SHARDS, advance=ignore):
    with runner.workers(partial(ray_work.load_squares, str(folder))) as workers:
        yield from workers.map(iter(shards), advance)


@pytest.fixture
def one(two):
    """A runner with one worker: enough for most errors, which end workers, so that others must be started."""
    return replace(two, num_workers=1)


def hold_the_first(folder):
    """Keep one of two workers at the first shard until the other one has done as many as may be held.

    Eight are held, of which the first worker has two.

    Returns what to give as ``advance``, and the list of its calls.
    """
    finished: list[int] = []
    (folder / "slow-0").touch()

    def advance(count):
        finished.append(count)
        if len(finished) == 6:
            (folder / "slow-0").unlink()

    return advance, finished


def test_results_are_in_order_and_each_worker_loads_once(cluster, tmp_path):
    advance, finished = hold_the_first(tmp_path)
    with RayRunner().workers(partial(ray_work.load_squares, str(tmp_path))) as workers:
        results = list(workers.map(iter(SHARDS), advance))
        again = [result["squares"] for result in workers.map(iter(SHARDS[:4]), ignore)]
    assert [result["squares"] for result in results] == SQUARES
    assert again == SQUARES[:4]
    assert sum(finished) == 60
    assert len({result["node"] for result in results}) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_connected_workers_are_used_again_and_load_the_new_work(two, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    processes = []
    for name in ("first", "second"):
        results = list(results_of(two, tmp_path / name))
        assert [result["squares"] for result in results] == SQUARES
        processes.append({result["pid"] for result in results})
        loaded = {int(path.name.rpartition("-")[2]) for path in (tmp_path / name).iterdir()}
        assert processes[-1] <= loaded  # each of them has loaded this work
        assert len(loaded) <= 2
    assert processes[0] & processes[1]


def test_workers_that_were_interrupted_are_not_used_again(one, tmp_path):
    (tmp_path / "bad-30").touch()
    with pytest.raises(DataFormatError):
        list(results_of(one, tmp_path))
    (tmp_path / "bad-30").unlink()
    assert [result["squares"] for result in results_of(one, tmp_path)] == SQUARES


def test_few_shards_are_held_at_a_time(two, tmp_path):
    num_read = 0

    def shards():
        nonlocal num_read
        for number in range(200):
            num_read += 1
            yield [number]

    ahead = []
    for number, result in enumerate(results_of(two, tmp_path, shards())):
        assert result["squares"] == [number**2]
        ahead.append(num_read - number)
    assert max(ahead) <= 2 * 4 + 1


def test_a_killed_worker_loses_nothing(two, tmp_path, caplog):
    """One ends itself in a shard, another is killed from outside while it has two."""
    (tmp_path / "kill-10").touch()
    results, killed = [], None
    for result in results_of(two, tmp_path):
        results.append(result)
        if len(results) == 10:
            killed = result["pid"]
            os.kill(killed, signal.SIGKILL)
    assert [result["squares"] for result in results] == SQUARES
    assert caplog.text.count("a worker on the Ray cluster has died; its work is done again") == 2
    assert results[-1]["pid"] != killed


def test_a_shard_that_ends_every_worker_is_named_as_the_cause(one, tmp_path):
    (tmp_path / "poison-30").touch()
    with pytest.raises(ModelError, match="3 workers on the Ray cluster have died with the same part of the work"):
        list(results_of(one, tmp_path))


@pytest.mark.parametrize(("kind", "error"), [("bad", DataFormatError), ("bug", ZeroDivisionError)])
def test_an_error_in_a_worker_is_raised_here(one, tmp_path, kind, error):
    (tmp_path / f"{kind}-30").touch()
    with pytest.raises(error) as caught:
        list(results_of(one, tmp_path))
    if kind == "bad":
        assert type(caught.value) is DataFormatError
        assert str(caught.value) == "corpus.jsonl:30: is damaged"
    else:
        assert "ray_work.py" in str(caught.value)  # where it happened


@pytest.mark.parametrize(
    ("load", "error", "problem"),
    [
        (ray_work.fail_to_load, ModelError, "workers on the Ray cluster cannot start.*install d2llm"),
        (ray_work.refuse_to_load, InputError, "there is no such model here"),
    ],
)
def test_workers_that_cannot_load(one, load, error, problem):
    with pytest.raises(error, match=problem), one.workers(load) as workers:
        list(workers.map(SHARDS, ignore))


@pytest.mark.parametrize("package", ["d2llm", "torch"])
def test_other_versions_are_refused(one, tmp_path, monkeypatch, package):
    own = ray_runner.own_versions()
    monkeypatch.setattr(ray_runner, "own_versions", lambda: own | {package: "0.0.1"})
    with pytest.raises(
        MismatchError, match=rf"has {package} {re.escape(own[package])} instead of 0\.0\.1; install the same"
    ):
        list(results_of(one, tmp_path))


def test_a_node_that_is_lost(cluster, two, tmp_path):
    """Its worker's shards go to the other nodes."""
    node = cluster.add_node(num_cpus=1)
    results = []
    for result in results_of(replace(two, num_workers=3), tmp_path):
        results.append(result)
        if len(results) == 5:
            cluster.remove_node(node, allow_graceful=False)
    assert [result["squares"] for result in results] == SQUARES


@pytest.fixture(scope="module")
def gpus(cluster):
    """A node with two GPUs."""
    node = cluster.add_node(num_cpus=2, num_gpus=2)
    yield node
    cluster.remove_node(node)


def test_each_worker_gets_one_gpu(gpus, tmp_path):
    advance, _ = hold_the_first(tmp_path)
    results = list(results_of(RayRunner(), tmp_path, advance=advance))
    assert {result["gpus"] for result in results} == {"0", "1"}
    assert {result["node"] for result in results} == {gpus.node_id}


def test_a_large_model_gets_several_gpus(gpus, tmp_path):
    load = partial(ray_work.load_squares, str(tmp_path))
    for runner, needed in ((RayRunner(num_workers=1), 2), (RayRunner(gpus_per_worker=2), 1)):
        with runner.workers(load, gpus=needed) as workers:
            results = list(workers.map(iter(SHARDS), ignore))
        assert {len(result["gpus"].split(",")) for result in results} == {2}


def test_idle_workers_make_room_for_larger_ones(gpus, two, tmp_path):
    """Workers with a GPU each need the CPUs of its node, which idle ones without GPUs hold."""
    load = partial(ray_work.load_squares, str(tmp_path))
    with replace(two, num_workers=4).workers(load, device="cpu") as workers:
        assert [result["squares"] for result in workers.map(iter(SHARDS), ignore)] == SQUARES
    with two.workers(load) as workers:  # with a GPU each
        assert {result["gpus"] for result in workers.map(iter(SHARDS[:4]), ignore)} <= {"0", "1"}


def test_a_certain_gpu_is_refused(cluster):
    with pytest.raises(InputError, match="give 'cuda', not 'cuda:1'"), RayRunner().workers(list, device="cuda:1"):
        pass


def test_another_cluster_than_the_connected_one(cluster):
    problem = r"connected to the Ray cluster at .*, not to 10\.0\.0\.5:6379"
    with pytest.raises(InputError, match=problem), RayRunner("10.0.0.5:6379").workers(list):
        pass


def test_no_workers_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        RayRunner(num_workers=0)
    with pytest.raises(InputError, match="cannot have 0 GPUs each"):
        RayRunner(gpus_per_worker=0)


def test_an_address_without_a_cluster(monkeypatch):
    monkeypatch.setattr(ray_runner, "_CONNECT_SECONDS", 5.0)
    begin = time.monotonic()
    with pytest.raises(D2LLMError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1 .*ray start --head"):
        ray_runner._require_answer("127.0.0.1:1")
    assert time.monotonic() - begin < 30


def test_a_cluster_that_asks_for_a_token(monkeypatch):
    """As Ray's does where its first node has one in the home folder, which a cluster on that machine alone made."""
    told = "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing"
    refused = subprocess.CompletedProcess([], 1, "", f"Traceback ...\n{told}\n")
    monkeypatch.setattr(ray_runner.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(InputError, match=r"at 10\.0\.0\.5:6379 asks for a token; .* set RAY_AUTH_MODE=token"):
        ray_runner._require_answer("10.0.0.5:6379")
