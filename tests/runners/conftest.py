"""One Ray cluster of two nodes on this machine for all tests of runners: starting one takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest


@pytest.fixture(scope="package")
def cluster() -> Generator[Any]:
    """A cluster of two nodes with a core each, to which this process is connected."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for the workers to import ray_work
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def two(cluster) -> Generator[Any]:
    """A runner with two workers, one on each node, that stay for the tests of a module."""
    from d2llm.runners.ray_runner import RayRunner

    with RayRunner(num_workers=2).connected() as runner:
        yield runner


@pytest.fixture
def room(cluster, two) -> Any:
    """The address of the cluster, of which no worker of this process holds a part."""
    import ray

    while two._idle:
        ray.kill(two._idle.pop().actor)
    return cluster.address
