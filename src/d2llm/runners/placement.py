"""Where models work: a runner, and how workers that do not share this process load each model."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from d2llm.core.errors import InputError, MismatchError
from d2llm.runners.runner import LocalRunner, LocalWorkers, Runner, Work, Workers

_Shard = TypeVar("_Shard", bound=Sized)
_Result = TypeVar("_Result")


class Identified(Protocol):
    """A model that has a fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Equal if and only if two models are the same."""
        ...


_Model = TypeVar("_Model", bound=Identified)

Load = Callable[[], Any]
"""Loads a model; on a cluster it is pickled, so it is a function at the top of a module, or a ``partial`` of one."""


def find_runner(runner: str | Runner, *, num_workers: int | None = None, gpus_per_worker: int | None = None) -> Runner:
    """The runner of a name: ``local``, ``ray`` or ``ray:ADDRESS`` (``RayRunner``).

    ``num_workers`` is the number of workers on Ray, by default one for each GPU, or for each node if there is none;
    ``gpus_per_worker`` is for models that one GPU cannot hold.

    Raises:
        InputError: there is no such runner, or workers or their GPUs are given for this process.
        MissingExtraError: Ray is not installed.
    """
    if not isinstance(runner, str):
        return runner
    kind, colon, address = runner.partition(":")
    if kind == "ray" and bool(colon) == bool(address):
        from d2llm.runners.ray_runner import RayRunner

        return RayRunner(address or None, num_workers=num_workers, gpus_per_worker=gpus_per_worker)
    if runner != "local":
        raise InputError(f"there is no runner '{runner}'; use local, ray or ray:ADDRESS, for example ray:10.0.0.5:6379")
    if num_workers is not None or gpus_per_worker is not None:
        raise InputError("a number of workers or of their GPUs is for a cluster; add the runner ray, or leave it out")
    return LocalRunner()


@dataclass(frozen=True)
class Placement:
    """Where models work.

    Attributes:
        runner: this process, or a cluster.
        device: where models compute on the workers of a cluster, which decides what a worker reserves.
        loads: for a cluster: fingerprint -> how a worker loads that model; None if the model works in this process in
            any case, as a remote teacher does, whose endpoint sets the pace.
        gpus: for a cluster: fingerprint -> how many GPUs that model needs, where there are any; by default one.
    """

    runner: Runner = field(default_factory=LocalRunner)
    device: str | None = None
    loads: Mapping[str, Load | None] = field(default_factory=dict[str, Load | None])
    gpus: Mapping[str, int] = field(default_factory=dict[str, int])

    def is_here(self, model: Identified) -> bool:
        """Whether a model works in this process."""
        return self.runner.is_local or self._load(model) is None

    def load(self, model: Identified) -> Load | None:
        """How a worker on the cluster loads a model; None if the model works in this process.

        Raises:
            InputError: nobody has said how workers load it.
        """
        return None if self.runner.is_local else self._load(model)

    @contextmanager
    def connected(self) -> Generator[Placement]:
        """The same placement, connected to the cluster, so that several uses of workers connect once."""
        with self.runner.connected() as runner:
            yield replace(self, runner=runner)

    def workers(
        self, model: _Model, work: Callable[[_Model, _Shard, Callable[[int], None]], _Result]
    ) -> AbstractContextManager[Workers[_Shard, _Result]]:
        """Workers that do ``work(model, shard, advance)``: with the model itself, or with what they load in its place.

        Raises:
            InputError: the cluster cannot be reached or is too small, or nobody has said how workers load this model.
            MismatchError: a worker, when it starts, has other versions or loads another model.
        """
        load = self.load(model)
        if load is None:
            return nullcontext(LocalWorkers(partial(work, model)))
        load_here = partial(load_work, load, model.fingerprint, work)
        return self.runner.workers(load_here, device=self.device, gpus=self.gpus.get(model.fingerprint, 1))

    def _load(self, model: Identified) -> Load | None:
        if model.fingerprint not in self.loads:
            raise InputError(
                f"the workers of a cluster load models themselves, and nothing says how they load the "
                f"{type(model).__name__} {model.fingerprint}; name its folder, or run locally"
            )
        return self.loads[model.fingerprint]


HERE = Placement()
"""Every model works in this process."""


def fingerprint_of(model: Identified) -> str:
    """A model's fingerprint."""
    return model.fingerprint


def load_work(
    load: Callable[[], _Model],
    identity: str,
    work: Callable[[_Model, _Shard, Callable[[int], None]], _Result],
    identify: Callable[[_Model], str] = fingerprint_of,
) -> Work[_Shard, _Result]:
    """Load a model on a worker and return its work (``load_same``)."""
    return partial(work, load_same(load, identity, identify))


def load_same(load: Callable[[], _Model], identity: str, identify: Callable[[_Model], str] = fingerprint_of) -> _Model:
    """Load a model on a worker, and check that it is the model that is meant.

    Args:
        load: loads the model.
        identity: of the model that is meant: its fingerprint, unless ``identify`` says otherwise.
        identify: returns a model's identity, for models that are more than their fingerprint.

    Raises:
        MismatchError: there is another model at the same place on this machine.
    """
    model = load()
    if (actual := identify(model)) != identity:
        raise MismatchError(
            f"the {type(model).__name__} on {platform.node()} is {actual}, but {identity} is meant; put the same model "
            "at the same path on every machine"
        )
    return model
