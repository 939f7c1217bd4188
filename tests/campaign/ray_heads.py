"""F8: the head of a Ray cluster is killed while work is done on it; the same call without a cluster then finishes it.

Labels and vectors are those of an undisturbed run in one process. The call that lost its cluster ends: with an error
of d2llm's, or because Ray ends the process when there has been no head for a minute (here, for five seconds). So does a
server, whose answers are right until then; the same one without a cluster then serves the same.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from shutil import rmtree
from threading import Thread
from typing import Any
from unittest import mock

import torch

import ray_work
from attacked_server import AttackedServer
from campaign.frame import Outcome, Row, main
from campaign.namespaces import enter, run_as_root
from campaign.ray_faults import NUM, STUCK, Clusters
from campaign.surroundings import ERROR_STATUS, end_with_status
from campaign.verb_kills import check_same, in_a_fork
from d2llm.retrieval import encode as encode_verb
from d2llm.retrieval import upserting
from d2llm.retrieval.shard import shard
from d2llm.runners import ray_runner
from d2llm.runners.ray_runner import RayRunner
from d2llm.training import label as label_verb
from sharded_responses import QUERY, results_of
from tiny_cluster import cluster_settings
from waiting import PATIENCE, until

_GONE = "GCS may have been killed"
_ACTORS = "^ray::(_Actor|ShardActor)"
_QUESTION = {"query": QUERY, "top_k": NUM}


class Head:
    """A cluster of one node in processes of its own; this process, which forks, does not connect to it."""

    def __init__(self) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.is_killed = False
        self.address = f"127.0.0.1:{port}"
        settings = ("--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block")
        settings += ("--include-dashboard=false", f"--object-store-memory={150 << 20}", "--disable-usage-stats")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: _answers(port), "the head", pause=0.1)

    def processes(self, name: str) -> list[int]:
        return _children([self.process.pid], name)

    def kill(self, names: tuple[str, ...], seconds: float) -> None:
        """Kill those of its processes that have these names, some seconds after it has begun to work."""
        with suppress(AssertionError):  # then it has ended before
            until(lambda: _children(self.processes("raylet/raylet"), _ACTORS), "an actor", pause=0.1)
        time.sleep(seconds)
        self.is_killed = True
        for name in names:
            for pid in self.processes(name):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for pid in self.processes(""):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def _children(parents: list[int], name: str) -> list[int]:
    command = ["pgrep", "-P", ",".join(map(str, parents)), "-f", name]
    return [*map(int, subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())]


def _answers(port: int) -> bool:
    with closing(socket.socket()) as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def answers_without(head: Head, shards: Path, kill: Callable[[], None]) -> str:
    """How a server on the cluster ends when the head is killed; each of its answers is right."""
    small = {"shard_cpus": 0.1, "student_cpus": 0.1, "runner": f"ray:{head.address}"}
    server = AttackedServer(shards, **small)
    try:
        whole = results_of(server.post("/v1/search", _QUESTION).body)
        assert len(whole) == NUM
        kill()
        end = time.monotonic() + 30
        while server.process.poll() is None and time.monotonic() < end:
            try:
                answer = server.post("/v1/search", _QUESTION)
            except (OSError, http.client.HTTPException):  # it is ending
                continue
            assert answer.status in (200, 503), answer.body
            if answer.status == 200:
                found = results_of(answer.body)
                assert found == whole if not answer.body["missing_shards"] else all(one in whole for one in found)
        if server.process.poll() is None:
            status, _, errors = server.stop()
            assert status == 0, errors
            ending = "stopped"
        else:
            _, _, errors = server.stop()
            assert _GONE in errors, errors
            ending = "ended by Ray"
    finally:
        server.close()
    alone = AttackedServer(shards)
    try:
        assert results_of(alone.post("/v1/search", _QUESTION).body) == whole
    finally:
        alone.close()
    return ending


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)
    run_as_root("ip", "link", "set", "lo", "up")
    clusters = Clusters(folder, None)

    def on(address: str, name: str, root: Path) -> None:
        module: Any = label_verb if name == "label" else encode_verb
        with (
            mock.patch.object(module, "load_work", partial(ray_work.load_slowly, module.load_work)),
            mock.patch.object(upserting, "BLOCK_PASSAGES", 8),
            mock.patch.object(ray_runner, "_CONNECT_SECONDS", PATIENCE),
            RayRunner(address=address, num_workers=2).connected() as runner,
        ):
            options = {} if name == "label" else {"device": "cpu", "dtype": "float32"}
            getattr(clusters, name)(root, runner=runner, **options)

    shard(clusters.index, folder / "shards", 2)

    def work(name: str, root: Path, head: Head, kill: Callable[[], None]) -> str:
        """How the work ended; "" for a way in which it must not."""
        killing = Thread(target=kill, daemon=True)
        killing.start()
        status = os.waitstatus_to_exitcode(
            in_a_fork(partial(end_with_status, partial(on, head.address, name)), root, STUCK)
        )
        told = root.with_suffix(".log").read_text()
        endings = {0: "ended before", ERROR_STATUS: "an error" if head.is_killed else ""}
        ending = endings.get(status, "ended by Ray" if status == 1 and _GONE in told else "")
        assert ending, f"ended with {status}: {told}"
        if not (root / "index").exists():
            getattr(clusters, name)(root)
        check_same(name, clusters.found(name, root), clusters.expected[name])
        return ending

    def case(chance: random.Random) -> Outcome:
        name, root = chance.choice(["label", "encode", "serve"]), folder / f"{chance.getrandbits(64):x}"
        killed, seconds = chance.choice([("gcs_server",), ("gcs_server", "raylet/raylet")]), chance.uniform(0, 8)
        root.mkdir()
        with cluster_settings(RAY_gcs_rpc_server_reconnect_timeout_s="5"):
            head = Head()
            try:
                kill = partial(head.kill, killed, seconds)
                ending = (
                    answers_without(head, folder / "shards", kill) if name == "serve" else work(name, root, head, kill)
                )
            finally:
                head.end()
        rmtree(root)
        root.with_suffix(".log").unlink(missing_ok=True)
        return Outcome(f"{name} without {' and '.join(killed)}: {ending}")

    yield case


ROW = Row("ray_heads", "F8", 50, prepare)

if __name__ == "__main__":
    enter("campaign.ray_heads")
    main(ROW)
