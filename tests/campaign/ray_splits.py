"""F8: the network between two nodes of a Ray cluster is cut while they label, encode and search; or its head is killed.

The nodes are in namespaces, joined by a cable. A cut takes packets of one direction or both without any error, for a
moment or until Ray gives the node up; then it is started again. What is labelled and encoded is what one process does;
an answer is whole, or names the shards that it lacks; all of them come back. Without its head, a command ends, and
the same one without a cluster ends as if nothing had happened.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from campaign.frame import Outcome, Row, main
from campaign.namespaces import enter, run_as_root
from campaign.ray_faults import Clusters, Faults
from tiny_cluster import HEAD, cluster_settings
from waiting import until

_HERE, _THERE = "10.77.0.1", "10.77.0.2"
_NOWHERE = "02:00:00:00:00:77"  # nobody has this address, so that packets to it are lost
_GIVEN_UP = {"initial_delay_ms": 1_000, "period_ms": 1_000, "timeout_ms": 5_000, "failure_threshold": 4}
"""When Ray calls a node dead: not before some ten seconds, as a busy machine may also stop the head for five."""


class Network:
    """A second node in a network of its own, and the cable to it."""

    def __init__(self) -> None:
        self.holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        there = Path(f"/proc/{self.holder.pid}/ns/net")
        until(lambda: there.readlink() != Path("/proc/self/ns/net").readlink(), "a network")
        self.inside = ("nsenter", f"--net={there}")
        run_as_root("ip", "link", "set", "lo", "up")
        run_as_root("ip", "link", "add", "here", "type", "veth", "peer", "name", "there")
        run_as_root("ip", "link", "set", "there", "netns", self.holder.pid)
        run_as_root(*self.inside, "ip", "link", "set", "lo", "up")
        for prefix, name, address in (((), "here", _HERE), (self.inside, "there", _THERE)):
            run_as_root(*prefix, "ip", "addr", "add", f"{address}/24", "dev", name)
            run_as_root(*prefix, "ip", "link", "set", name, "up")
        self.node: subprocess.Popen[bytes] | None = None

    def await_node(self, address: str) -> None:
        """Start the second node, unless it runs, and again if it ends, until this process is told of it."""
        import ray

        settings = (f"--address={address}", f"--node-ip-address={_THERE}", "--num-cpus=1", "--block")
        command = [*self.inside, sys.executable, "-m", "ray.scripts.scripts", "start", *settings]
        command.append(f"--object-store-memory={150 << 20}")

        def is_here() -> bool:
            if self.node is None or self.node.poll() is not None:
                self.node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return sum(node["Alive"] for node in ray.nodes()) >= 2

        until(is_here, "the second node", pause=0.5)

    @contextmanager
    def cut(self, directions: tuple[str, ...]) -> Iterator[None]:
        """Lose all packets in these directions, "from" or "to" the second node."""
        ends = {"to": ((), _THERE, "here"), "from": (self.inside, _HERE, "there")}
        for prefix, address, name in (ends[one] for one in directions):
            neighbour = ("lladdr", _NOWHERE, "dev", name, "nud", "permanent")
            run_as_root(*prefix, "ip", "neigh", "replace", address, *neighbour)
        try:
            yield
        finally:
            for prefix, address, name in (ends[one] for one in directions):
                run_as_root(*prefix, "ip", "neigh", "del", address, "dev", name)


class Cuts(Faults):
    """Cuts of the network, instead of killed processes."""

    network: Network

    def happen(self, chance: random.Random) -> None:
        directions = chance.choice([("from",), ("to",), ("from", "to")])
        with self.network.cut(directions):
            time.sleep(chance.choice([chance.uniform(0.2, 2), chance.uniform(15, 30)]))
        before = self.network.node
        self.network.await_node(self.cluster.address)
        self.done.append("cut" if self.network.node is before else "cut until a node was lost")


@contextmanager
def split_cluster(network: Network) -> Iterator[Any]:
    """A cluster of a node here and one there, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    variables = {f"RAY_health_check_{name}": str(value) for name, value in _GIVEN_UP.items()}
    with cluster_settings(**variables):
        cluster = Cluster(initialize_head=True, head_node_args=HEAD | {"node_ip_address": _HERE})
        try:
            options = {"log_to_driver": False, "logging_level": "ERROR", "_node_ip_address": _HERE}
            ray.init(address=cluster.address, **options)
            network.await_node(cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            if network.node is not None:
                network.node.terminate()
                network.node.wait()
            cluster.shutdown()


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)
    Cuts.network = network = Network()
    try:
        with split_cluster(network) as cluster:
            yield partial(Clusters(folder, cluster, Cuts).case, ["label", "encode", "search"], folder)
    finally:
        network.holder.kill()


ROW = Row("ray_splits", "F8", 50, prepare)

if __name__ == "__main__":
    enter("campaign.ray_splits")
    main(ROW)
