"""Runners: where the shards of a verb's work are done. The results are the same everywhere.

A verb splits its work into shards (some pairs to score, some passages to encode) and maps a function over them. What
the function needs, such as a model, is loaded once by each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, Protocol, TypeVar

_Shard = TypeVar("_Shard", bound=Sized)
_Result = TypeVar("_Result")
_ShardIn = TypeVar("_ShardIn", bound=Sized, contravariant=True)
_ResultOut = TypeVar("_ResultOut", covariant=True)

Work = Callable[[_Shard, Callable[[int], None]], _Result]
"""Does one shard; calls its second argument with the number of items finished since the last call."""


class Workers(Protocol[_ShardIn, _ResultOut]):
    """Workers that have loaded what they need."""

    def map(self, shards: Iterable[_ShardIn], advance: Callable[[int], None]) -> Iterator[_ResultOut]:
        """The result of each shard, in the order of the shards. Use all of it before the next call.

        Shards are read as they are needed: on a cluster a few for each worker ahead of the results, in this process one
        at a time. ``advance`` is called with numbers of finished items, of which a shard has ``len(shard)``.

        An error in a worker ends the iteration; it is raised here as in this process.
        """
        ...


class Runner(Protocol):
    """Where work runs; ``placement.find_runner`` finds one by its name."""

    @property
    def is_local(self) -> bool:
        """Whether the workers share this process, and so its models."""
        ...

    def connected(self) -> AbstractContextManager[Runner]:
        """The same runner, connected to its cluster until the context ends, so that several uses connect once."""
        ...

    def workers(
        self, load: Callable[[], Work[_Shard, _Result]], *, device: str | None = None, gpus: int = 1
    ) -> AbstractContextManager[Workers[_Shard, _Result]]:
        """Workers that exist until the context ends; each calls ``load`` once and does its shards with the result.

        Args:
            load: for other processes than this one, it must be picklable.
            device: where the models are to compute, which decides what a worker on a cluster reserves.
            gpus: how many GPUs the model of one worker needs, where there are any.
        """
        ...


class LocalWorkers(Generic[_Shard, _Result]):
    """The one worker of this process."""

    def __init__(self, work: Work[_Shard, _Result]) -> None:
        self._work = work

    def map(self, shards: Iterable[_Shard], advance: Callable[[int], None]) -> Iterator[_Result]:
        """The results, each made when it is requested (``Workers.map``)."""
        return (self._work(shard, advance) for shard in shards)


class LocalRunner:
    """Runs work in this process."""

    is_local = True

    def connected(self) -> AbstractContextManager[Runner]:
        """This runner, which needs no connection."""
        return nullcontext(self)

    @contextmanager
    def workers(
        self, load: Callable[[], Work[_Shard, _Result]], *, device: str | None = None, gpus: int = 1
    ) -> Generator[LocalWorkers[_Shard, _Result]]:
        """One worker; what it loads decides on the device itself."""
        del device, gpus
        yield LocalWorkers(load())
