"""Workers on the Ray cluster of the tests (``cluster``)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


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
