"""Finding runners, and how workers share a cluster; no Ray is needed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from d2llm.core.errors import InputError, MissingExtraError, Terminated
from d2llm.runners.placement import find_runner
from d2llm.runners.ray_runner import Reservation, _reservation, _stopped_by_sigterm
from d2llm.runners.runner import LocalRunner, LocalWorkers


@pytest.mark.parametrize("name", ["", "Ray", "rays", "ray:", "ray10.0.0.5", "spark", "local:1"])
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match=f"no runner '{name}'; use local, ray or ray:ADDRESS"):
        find_runner(name)


def test_a_runner_is_its_own_name():
    runner = LocalRunner()
    assert find_runner(runner) is runner
    assert find_runner("local").is_local


def test_workers_are_for_a_cluster():
    with pytest.raises(InputError, match="add the runner ray"):
        find_runner("local", num_workers=2)
    with pytest.raises(InputError, match="add the runner ray"):
        find_runner("local", gpus_per_worker=2)


def test_the_local_worker_does_a_shard_when_its_result_is_requested():
    done, finished = [], []

    def work(shard, advance):
        done.append(shard)
        advance(len(shard))
        return len(shard)

    results = LocalWorkers(work).map(iter(["a", "bb"]), finished.append)
    assert not done
    assert next(results) == 1
    assert done == ["a"]
    assert list(results) == [2]
    assert finished == [1, 2]


def test_without_ray_one_line_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'ray'.*pip install.*'d2llm\[ray\]'") as caught:
        find_runner("ray")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("own", [False, True], ids=["default", "own handler"])
def test_sigterm_ends_work_on_a_cluster_like_ctrl_c(own):
    calls: list[int] = []
    handler = (lambda number, frame: calls.append(number)) if own else signal.SIG_DFL
    with contextlib.suppress(Terminated), _stopped_by_sigterm(handler):
        os.kill(os.getpid(), signal.SIGTERM)
        calls.append(0)
    assert calls == ([signal.SIGTERM, 0] if own else [])
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == handler


def test_the_local_verbs_do_not_import_ray():
    code = "import sys, d2llm.training.label, d2llm.retrieval.encode; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("nodes", "num_workers", "reservation"),
    [
        ([{"CPU": 8}], None, Reservation(1, cpus=8, gpus=0)),
        ([{"CPU": 8}], 3, Reservation(3, cpus=2, gpus=0)),
        ([{"CPU": 8}, {"CPU": 4}], None, Reservation(2, cpus=4, gpus=0)),
        ([{"CPU": 64}, {"CPU": 4}], None, Reservation(2, cpus=32, gpus=0)),  # both on the large node
        ([{"CPU": 5}, {"CPU": 5}], 4, Reservation(4, cpus=2, gpus=0)),
        ([{"CPU": 4}, {}], None, Reservation(1, cpus=4, gpus=0)),  # a head without cores of its own
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}, {"CPU": 64}], None, Reservation(8, cpus=1, gpus=1)),
        ([{"CPU": 16, "GPU": 4}], 2, Reservation(2, cpus=1, gpus=1)),
    ],
)
def test_workers_share_the_cluster(nodes, num_workers, reservation):
    assert _reservation(nodes, num_workers, gpus=1) == reservation


@pytest.mark.parametrize(
    ("gpus", "num_workers", "expected"), [(2, None, 3), (2, 1, 1), (4, None, 1), (3, None, 1), (1, None, 7)]
)
def test_a_worker_can_have_several_gpus_of_one_node(gpus, num_workers, expected):
    nodes = [{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 3}, {"CPU": 4}]
    if gpus == 3:
        nodes = nodes[1:]
    assert _reservation(nodes, num_workers, gpus=gpus) == Reservation(expected, cpus=1, gpus=gpus)


def test_the_device_cpu_leaves_gpus_alone():
    assert _reservation([{"CPU": 16, "GPU": 4}], None, gpus=0) == Reservation(1, cpus=16, gpus=0)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "gpus", "problem"),
    [
        ([{"CPU": 2}], 3, 1, "3 workers need a core each, but the cluster has 2"),
        ([{}], None, 1, "the workers need a core each, but the cluster has 0"),
        ([{"CPU": 16, "GPU": 1}], 2, 1, "2 workers need a GPU each, but the cluster has room for 1"),
        ([{"CPU": 16, "GPU": 3}] * 2, 3, 2, "3 workers need 2 GPUs of one machine each, but .* room for 2"),
        ([{"CPU": 16, "GPU": 3}] * 2, None, 4, "1 worker needs 4 GPUs of one machine each, but .* room for 0"),
    ],
)
def test_more_workers_than_the_cluster_has_room_for(nodes, num_workers, gpus, problem):
    with pytest.raises(InputError, match=problem):
        _reservation(nodes, num_workers, gpus=gpus)
