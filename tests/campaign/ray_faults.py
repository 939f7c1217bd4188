"""F8: workers, shards and nodes of a Ray cluster killed or stopped while they label, encode and search; new shards.

What is labelled and encoded is what one process does. An answer is whole, or names the shards that it lacks; it
is refused while no shard answers. All of them come back. Nothing takes longer than five minutes, or 2.5 times
``D2LLM_TEST_PATIENCE`` seconds. The cluster is on this machine; its network is not cut.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any
from unittest import mock

import torch

import ray_work
from campaign.frame import Outcome, Row, main
from campaign.verb_kills import check_same, labels_of, stored
from d2llm import Student, encode
from d2llm.core.errors import ModelError
from d2llm.retrieval import encode as encode_verb
from d2llm.retrieval import upserting
from d2llm.retrieval.shard import shard
from d2llm.runners.ray_runner import RayRunner
from d2llm.training import label as label_verb
from e2e.test_server_ray import searching, served
from sharded_responses import results_of, search
from tiny_cluster import pids_of_actors, tiny_cluster
from tiny_data import topics
from tiny_distill import Workspace
from tiny_server import tiny_passages, write_tiny_index
from waiting import PATIENCE, until

STUCK = int(2.5 * PATIENCE)
NUM = 60


@contextmanager
def time_limit() -> Generator[None]:
    def stop(*_: object) -> None:
        stacks = [line for frame in sys._current_frames().values() for line in traceback.format_stack(frame)[-4:]]
        raise AssertionError(f"stuck: not ended after {STUCK} s\n{''.join(stacks)}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(STUCK)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Faults:
    """What happens to the actors of one kind, or to the node that is not the head."""

    def __init__(self, cluster: Any, kind: str) -> None:
        self.cluster, self.kind = cluster, kind
        self.done: list[str] = []

    def happen(self, chance: random.Random) -> None:
        what = chance.choices(["killed", "slow", "node"], [6, 3, 1])[0]
        actors = sorted(pids_of_actors(self.cluster, self.kind))
        if what == "node":
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)
            time.sleep(chance.uniform(0, 2))
            self.cluster.add_node(num_cpus=1)
        elif actors:
            victim = chance.choice(actors)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL if what == "killed" else signal.SIGSTOP)
            if what == "slow":
                time.sleep(chance.uniform(0.5, 5))
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGCONT)
        else:
            return
        self.done.append(what)

    def during(self, work: Callable[[], None], chance: random.Random) -> None:
        """One to four faults while something runs in another thread: Ray can only start nodes in the main one."""
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(work)
            for _ in range(chance.randint(1, 4)):
                until(lambda: running.done() or pids_of_actors(self.cluster, self.kind), "an actor", pause=0.1)
                wait([running], chance.uniform(0, 4))
                if not running.done():
                    self.happen(chance)
            running.result()


def _until_finished(work: Callable[[], object]) -> None:
    """Workers that died again and again with the same part end a call with an error, and it can be repeated."""
    for _ in range(3):
        with suppress(ModelError):
            work()
            return
    work()


class Clusters:
    """The verbs on a cluster, with what one process makes."""

    def __init__(self, folder: Path, cluster: Any, faults: type[Faults] = Faults) -> None:
        self.cluster, self.faults = cluster, faults
        self.workspace, self.queries = Workspace(folder / "workspace"), topics(num_train=160)
        self.index = write_tiny_index(folder, NUM)
        self.source = folder / "student-0"
        self.student = Student.load(self.source, device="cpu", dtype="float32")
        self.label(folder / "undisturbed")
        self.encode(folder / "undisturbed")
        self.expected = {name: self.found(name, folder / "undisturbed") for name in ("label", "encode")}

    def label(self, root: Path, **options: Any) -> None:
        settings = {"teacher": self.workspace.teacher, "device": "cpu", "dtype": "float32"}
        label_verb.label([self.queries], root / "labels", **settings, **options)

    def encode(self, root: Path, **options: Any) -> None:
        encode(tiny_passages(NUM), self.student, root / "index", student_source=str(self.source), **options)

    def found(self, verb: str, root: Path) -> Any:
        return labels_of(self.workspace.store(root / "labels")) if verb == "label" else stored(root / "index")

    def case(self, names: list[str], folder: Path, chance: random.Random) -> Outcome:
        """Use the cluster by one of the names, while faults happen."""
        name, root = chance.choice(names), folder / f"{chance.getrandbits(64):x}"
        root.mkdir()
        with time_limit():
            done = self.search(root, chance) if name == "search" else self.verb(name, root, chance)
        rmtree(root)
        return Outcome(f"{name}: {', '.join(sorted({*done})) or 'ended before'}", cases=len(done))

    def verb(self, name: str, root: Path, chance: random.Random) -> list[str]:
        module = label_verb if name == "label" else encode_verb
        faults = self.faults(self.cluster, "_Actor")
        with (
            mock.patch.object(module, "load_work", partial(ray_work.load_slowly, module.load_work)),
            mock.patch.object(upserting, "BLOCK_PASSAGES", 8),
            RayRunner(num_workers=2).connected() as runner,
        ):
            options = {} if name == "label" else {"device": "cpu", "dtype": "float32"}
            work = partial(getattr(self, name), root, runner=runner, **options)
            faults.during(lambda: _until_finished(work), chance)
        check_same(name, self.found(name, root), self.expected[name])
        return faults.done

    def search(self, root: Path, chance: random.Random) -> list[str]:
        link, faults = root / "served", self.faults(self.cluster, "ShardActor")
        shard(self.index, root / "first", 2)
        link.symlink_to("first")
        settings = {"student_replicas": chance.randint(0, 1), "shard_replicas": chance.randint(1, 2)}
        with served(link, self.cluster, **settings) as (address, _):
            whole = results_of(search(address, top_k=NUM))
            assert len(whole) == NUM
            for number in range(chance.randint(4, 8)):
                with searching(address, top_k=NUM, may_be_away=True) as answers:
                    if chance.random() < 0.2:
                        shard(self.index, root / f"shards-{number}", chance.randint(1, 3))
                        (root / "next").symlink_to(f"shards-{number}")
                        (root / "next").replace(link)
                        faults.done.append("new shards")
                    else:
                        faults.happen(chance)
                    begin = len(answers) + 2
                    until(lambda: any(not one["missing_shards"] for one in answers[begin:]), "a whole answer")  # noqa: B023
                for answer in answers:
                    found = results_of(answer)
                    if not answer["missing_shards"]:
                        assert found == whole, "another result"
                    assert {one["id"] for one in found} <= {one["id"] for one in whole}
        return faults.done


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[random.Random], Outcome]]:
    torch.set_num_threads(1)
    with tiny_cluster() as cluster:
        clusters = Clusters(folder, cluster)

        yield partial(clusters.case, ["label", "encode", "search", "search"], folder)


ROW = Row("ray_faults", "F8", 200, prepare)

if __name__ == "__main__":
    main(ROW)
