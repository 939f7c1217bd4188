"""A Ray cluster of two nodes with a core each on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

HEAD: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


@contextmanager
def cluster_settings(**changes: str) -> Generator[None]:
    """The environment of a cluster, with these changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # also for nodes that a test adds
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token in the home folder turns it on for some of them
        patch.setenv("RAY_worker_niceness", "0")  # by default 15: workers would get what other test processes leave
        for name, value in changes.items():
            patch.setenv(name, value)
        yield


@contextmanager
def tiny_cluster() -> Generator[Any]:
    """The cluster, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    with cluster_settings():
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def pids_of_actors(cluster: Any, kind: str = "ShardActor") -> set[int]:
    """The processes of this cluster that hold actors; other tests may have clusters on this machine too."""
    raylets = [each.process.pid for node in cluster.list_all_nodes() for each in node.all_processes["raylet"]]
    command = ["pgrep", "-P", ",".join(map(str, raylets)), "-f", f"^ray::{kind}"]
    return set(map(int, subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()))
