"""Work on a Ray cluster: each worker is an actor with its own model, and gets one shard after another.

This process hands out the shards and gets the results, so that it alone writes labels and indexes. A shard whose worker
dies goes to another one. Memory does not grow with the number of shards: only a few for each worker are held at a time.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from d2llm import __version__
from d2llm.core.errors import D2LLMError, InputError, MismatchError, ModelError, Terminated
from d2llm.core.extras import require
from d2llm.core.manifest import package_versions
from d2llm.core.progress import ignore
from d2llm.runners.runner import Work

_CONNECT_SECONDS = 30.0  # a busy machine takes ten to load Ray; Ray itself gives up on an address after two minutes


def own_versions() -> dict[str, str]:
    """The versions on which results depend. Ray itself compares those of Python and Ray."""
    return {"d2llm": __version__, "torch": package_versions().get("torch", "none")}


def as_worker(versions: Mapping[str, str], folder: str) -> None:
    """Make this process work for another one, of which these are the versions and the working directory.

    If that directory exists here, relative paths mean the same.

    Raises:
        MismatchError: the versions differ.
    """
    check_versions(versions)
    if Path(folder).is_dir():
        os.chdir(folder)


def check_versions(versions: Mapping[str, str]) -> None:
    """Compare the versions of this worker with those of the process that it works for.

    Raises:
        MismatchError: they differ.
    """
    installed = own_versions()
    differences = [
        f"{name} {installed[name]} instead of {other}" for name, other in versions.items() if installed[name] != other
    ]
    if differences:
        raise MismatchError(
            f"the node {platform.node()} of the Ray cluster has {', '.join(differences)}; install the same versions on "
            "every node"
        )


def last_line(error: Exception) -> str:
    """The first sentence of the last line of an error of Ray, which names the cause; advice follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(". ")[0].rstrip(".") if lines else type(error).__name__


def task_error(error: Any, *kinds: type[Exception]) -> Exception:
    """What a worker has raised, from Ray's ``RayTaskError``: errors of d2llm and of these kinds as they were."""
    return error.cause if isinstance(error.cause, (D2LLMError, *kinds)) else error


def require_room(kind: str, needed: float, who: str, remedy: str) -> None:
    """Check that the cluster has resources of a kind ("CPU").

    Raises:
        InputError: ``who`` needs more than there are.
    """
    present = import_ray().cluster_resources().get(kind, 0.0)
    if needed > present:
        raise InputError(
            f"{who} need {needed:g} {kind}s, but the cluster has {present:g}; add nodes, or set {remedy} lower"
        )


def import_ray() -> Any:
    """Ray, which is an optional dependency."""
    return require("ray", extra="ray", purpose="a Ray cluster")


@contextmanager
def connection(address: str | None) -> Generator[None]:
    """Connect to the cluster, unless this process already is.

    Raises:
        InputError: it cannot be reached, or this process is connected to another one.
    """
    ray = import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if address not in {None, "auto", connected}:
            raise InputError(f"this process is connected to the Ray cluster at {connected}, not to {address}")
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
        options |= {"address": "local", "include_dashboard": False}
    else:
        _require_answer(address)
        options["address"] = address
    handler = signal.getsignal(signal.SIGTERM)  # Ray replaces it
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray cannot be used at {address or 'this machine'}: {error}") from error
    try:
        with _stopped_by_sigterm(handler):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _stopped_by_sigterm(handler: Any) -> Generator[None]:
    """Let SIGTERM end the block like Ctrl-C, if the caller's ``handler`` is the default, and else call that handler.

    Ray's own would abort this process with a trace of native code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _terminate if handler == signal.SIG_DFL else handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _terminate(signal_number: int, frame: object) -> None:
    del signal_number, frame
    raise Terminated


def _require_answer(address: str) -> None:
    """Raise an ``InputError`` unless a cluster answers at this address."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        check = subprocess.run(command, capture_output=True, text=True, timeout=_CONNECT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        problem = f"no answer within {_CONNECT_SECONDS:.0f} seconds"
    else:
        if check.returncode == 0:
            return
        problem = (check.stderr.strip().splitlines() or ["no answer"])[-1]
    if "AuthenticationError" in problem:
        raise InputError(
            f"the Ray cluster at {address} asks for a token; copy ~/.ray/auth_token of the user who started it to this "
            "machine, and set RAY_AUTH_MODE=token"
        )
    raise InputError(
        f"no Ray cluster can be reached at {address} ({problem}); give the HOST:PORT that `ray start --head` printed, "
        "and check that the cluster is up and this machine is a node of it"
    )


def alive_nodes() -> list[dict[str, float]]:
    """The resources of the nodes that are alive."""
    return [node["Resources"] for node in import_ray().nodes() if node["Alive"]]


_Shard = TypeVar("_Shard", bound=Sized)
_Result = TypeVar("_Result")

_WAIT_SECONDS = 30.0  # between two remarks that no worker has started
_SHARDS_PER_WORKER = 2  # one in work, one that is there when it is finished
_SHARDS_HELD_PER_WORKER = 4  # those, and results that wait for the result of an earlier shard
_MAX_DEATHS = 3  # of workers on the same shard, or in a row before one has started

_remarks = logging.getLogger("d2llm.remarks")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayRunner:
    """Runs work on the Ray cluster at an address, or on one of its own on this machine.

    If this process is already connected to a cluster (``ray.init``), that one is used. The nodes need the same versions
    of d2llm, torch and Python as this process, and models at the same paths.

    Args:
        address: ``HOST:PORT`` of the cluster's head, or ``auto`` for the cluster that this machine is a node of; None:
            the address in RAY_ADDRESS if it is set, else a cluster is started here and ended afterwards.
        num_workers: by default one for each GPU; without GPUs, one for each node, with all its cores.
        gpus_per_worker: GPUs of one node that each worker gets, for models that one GPU cannot hold; by default as many
            as the model needs.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: the number of workers or of their GPUs is less than 1.
    """

    address: str | None = None
    num_workers: int | None = None
    gpus_per_worker: int | None = None
    is_local = False
    _idle: list[_IdleActor] | None = field(default=None, repr=False, compare=False)  # only while it is ``connected``

    def __post_init__(self) -> None:
        import_ray()
        if self.num_workers is not None and self.num_workers < 1:
            raise InputError(f"{self.num_workers} workers cannot do anything; give at least 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 1:
            raise InputError(f"workers cannot have {self.gpus_per_worker} GPUs each; give at least 1, or --device cpu")

    @contextmanager
    def connected(self) -> Generator[RayRunner]:
        """This runner, connected to its cluster; one that it starts itself ends with the context.

        Workers that have finished wait for other work of the same size: they need not import everything again.

        Raises:
            InputError: the cluster cannot be reached.
        """
        if self._idle is not None:  # is connected, and another connection's idle workers would hold its resources
            yield self
            return
        with connection(self.address):
            idle: list[_IdleActor] = []
            try:
                yield replace(self, address="auto", _idle=idle)
            finally:
                for one in idle:
                    import_ray().kill(one.actor)

    @contextmanager
    def workers(
        self, load: Callable[[], Work[_Shard, _Result]], *, device: str | None = None, gpus: int = 1
    ) -> Generator[RayWorkers[_Shard, _Result]]:
        """Workers on the cluster; each is started when there is a shard for it, and ended with the context.

        Raises:
            InputError: the cluster cannot be reached, has fewer GPUs or cores than workers are requested, or the
                device is one certain GPU: Ray decides which worker gets which.
        """
        if device is not None and ":" in device:
            raise InputError(f"on a cluster Ray assigns the devices; give '{device.partition(':')[0]}', not '{device}'")
        with connection(self.address):
            per_worker = 0 if device in {"cpu", "mps"} else self.gpus_per_worker or gpus
            reservation = _reservation(alive_nodes(), self.num_workers, gpus=per_worker)
            workers = RayWorkers[_Shard, _Result](load, reservation, self._idle)
            try:
                yield workers
            finally:
                workers.stop()


@dataclass(frozen=True, slots=True)
class Reservation:
    """What each of ``num_workers`` workers reserves."""

    num_workers: int
    cpus: int
    gpus: int


def _reservation(nodes: Sequence[Mapping[str, float]], num_workers: int | None, *, gpus: int) -> Reservation:
    """How workers divide the resources of nodes, each ``{"CPU": 8.0, "GPU": 2.0, ...}``.

    On GPUs, each worker takes ``gpus`` of one node; 0: all work on CPUs. On CPUs, each takes as many cores as possible
    such that all find room.

    Raises:
        InputError: there is not enough for this number of workers.
    """
    present = [int(node.get("GPU", 0)) for node in nodes]
    if gpus and any(present):
        room = sum(num_gpus // gpus for num_gpus in present)
        if (num_workers or 1) > room:
            needs = f"{num_workers or 1} {'worker needs' if num_workers in (None, 1) else 'workers need'}"
            what = "a GPU each" if gpus == 1 else f"{gpus} GPUs of one machine each"
            raise InputError(f"{needs} {what}, but the cluster has room for {room} of them; give other numbers")
        return Reservation(num_workers or room, cpus=1, gpus=gpus)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    count = num_workers or sum(num_cores > 0 for num_cores in cores)
    if not 0 < count <= sum(cores):
        raise InputError(f"{count or 'the'} workers need a core each, but the cluster has {sum(cores)}; add nodes")
    most = max(size for size in range(1, max(cores) + 1) if sum(num_cores // size for num_cores in cores) >= count)
    return Reservation(count, cpus=most, gpus=0)


@dataclass(frozen=True, slots=True)
class _IdleActor:
    """An actor without work, and what it reserves of the cluster."""

    actor: Any
    cpus: int
    gpus: int


@dataclass
class _Worker:
    """An actor as this process sees it. ``starting`` is set until it has loaded its model.

    ``shards`` are the numbers and results to come of its shards; it does them in this order.
    """

    actor: Any
    starting: Any
    shards: deque[tuple[int, Any]] = field(default_factory=deque[tuple[int, Any]])

    @property
    def next(self) -> Any:
        """The result that it gives next, if any."""
        return self.starting or (self.shards[0][1] if self.shards else None)


class RayWorkers(Generic[_Shard, _Result]):
    """Workers on the cluster that this process is connected to (``runner.Workers``).

    ``idle`` are actors from earlier work, which are used first; actors without work are added to them in the end.
    """

    def __init__(
        self, load: Callable[[], Work[_Shard, _Result]], reservation: Reservation, idle: list[_IdleActor] | None = None
    ) -> None:
        self._ray = import_ray()
        self._load = self._ray.cloudpickle.dumps(load)
        self._reservation = reservation
        self._idle = idle
        for one in list(idle or ()):
            if idle and (one.cpus, one.gpus) != (reservation.cpus, reservation.gpus):
                idle.remove(one)
                self._ray.kill(one.actor)  # or these workers might wait for its resources
        self._deaths_at_start = 0
        self._workers: list[_Worker] = []

    def map(self, shards: Iterable[_Shard], advance: Callable[[int], None]) -> Iterator[_Result]:
        """The results in the order of the shards (``Workers.map``).

        Raises:
            MismatchError: a worker has another version of d2llm or torch than this process.
            ModelError: workers cannot start, or a shard has ended several workers.
        """
        rest = enumerate(shards)
        unfinished: dict[int, _Shard] = {}
        waiting: deque[int] = deque()  # numbers of the shards that no worker has
        results: dict[int, _Result] = {}
        deaths: Counter[int] = Counter()
        first = 0  # the number of the next result
        while True:
            has_room = len(unfinished) + len(results) < _SHARDS_HELD_PER_WORKER * self._reservation.num_workers
            item = next(rest, None) if has_room else None
            if item is not None:
                unfinished[item[0]] = item[1]
                waiting.append(item[0])
                if len(self._workers) < min(self._reservation.num_workers, len(unfinished)):
                    self._workers.append(self._start())
            elif not unfinished:
                return
            self._hand_out(waiting, unfinished)
            for index, result in self._collect(waiting, deaths, wait=item is None):
                advance(len(unfinished.pop(index)))
                results[index] = result
            while first in results:
                yield results.pop(first)
                first += 1

    def stop(self) -> None:
        """End the workers, whatever they do; those that do nothing become idle if they can be used again."""
        for worker in self._workers:
            if self._idle is not None and worker.next is None:
                worker.actor.rest.remote()
                self._idle.append(_IdleActor(worker.actor, self._reservation.cpus, self._reservation.gpus))
            else:
                self._ray.kill(worker.actor)

    def _start(self) -> _Worker:
        if self._idle:
            actor = self._idle.pop().actor
        else:
            options = {"num_cpus": self._reservation.cpus, "num_gpus": self._reservation.gpus}
            actor = self._ray.remote(_Actor).options(**options).remote()
        return _Worker(actor, actor.start.remote(own_versions(), str(Path.cwd()), self._load))

    def _hand_out(self, waiting: deque[int], shards: Mapping[int, _Shard]) -> None:
        """Give waiting shards to the workers that have started, first to those without any."""
        started = [worker for worker in self._workers if worker.starting is None]
        for most in range(_SHARDS_PER_WORKER):
            for worker in started:
                if waiting and len(worker.shards) == most:
                    index = waiting.popleft()
                    worker.shards.append((index, worker.actor.do.remote(shards[index])))

    def _collect(self, waiting: deque[int], deaths: Counter[int], *, wait: bool) -> list[tuple[int, _Result]]:
        """The results that have arrived, with the numbers of their shards; ``wait`` until something happens."""
        workers = {worker.next: worker for worker in self._workers if worker.next is not None}
        ready, _ = self._ray.wait(list(workers), num_returns=len(workers), timeout=0)
        if wait and not ready:
            ready, _ = self._ray.wait(list(workers), timeout=_WAIT_SECONDS)
        if wait and not ready and all(worker.starting for worker in self._workers):
            needs = f"{self._reservation.gpus} GPU" if self._reservation.gpus else f"{self._reservation.cpus} CPUs"
            _remarks.info("waiting for a worker to start, which needs %s and loads its model", needs)
        results: list[tuple[int, _Result]] = []
        for reference in ready:
            worker = workers[reference]
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise task_error(error) from None
            except self._ray.exceptions.RayError as error:
                self._replace(worker, error, waiting, deaths)
                continue
            if worker.starting is reference:
                worker.starting, self._deaths_at_start = None, 0
            else:
                results.append((worker.shards.popleft()[0], result))
        return results

    def _replace(self, worker: _Worker, error: Exception, waiting: deque[int], deaths: Counter[int]) -> None:
        """Start another worker in place of one that has died, and let its shards be done again."""
        reason = last_line(error)
        if worker.starting is not None:
            self._deaths_at_start += 1
            if self._deaths_at_start >= _MAX_DEATHS:
                raise ModelError(
                    f"workers on the Ray cluster cannot start ({reason}); install d2llm {__version__} on every node, "
                    "and see Ray's logs there (/tmp/ray/session_latest/logs)"
                ) from error
            _log.warning("a worker on the Ray cluster has died while it started; another one is started (%s)", reason)
        else:
            index = worker.shards[0][0]
            deaths[index] += 1
            if deaths[index] >= _MAX_DEATHS:
                raise ModelError(
                    f"{_MAX_DEATHS} workers on the Ray cluster have died with the same part of the work ({reason}); "
                    "perhaps their memory is too small. Finished parts are kept: run the same command again to continue"
                ) from error
            _log.warning("a worker on the Ray cluster has died; its work is done again (%s)", reason)
        waiting.extendleft(index for index, _ in reversed(worker.shards))
        self._ray.kill(worker.actor)  # it may only be out of reach
        self._workers[self._workers.index(worker)] = self._start()


class _Actor:
    """What runs on a node: loads a model and does shards with it."""

    def __init__(self) -> None:
        self._work: Work[Any, Any] | None = None

    def start(self, versions: Mapping[str, str], folder: str, load: bytes) -> None:
        """Load the model, after comparing versions with those of the process that hands out the work.

        ``folder`` is the working directory of that process; if it exists here, relative paths mean the same.
        """
        as_worker(versions, folder)
        self._work = import_ray().cloudpickle.loads(load)()

    def rest(self) -> None:
        """Forget the model."""
        self._work = None
        gc.collect()

    def do(self, shard: Any) -> Any:
        """The result of a shard."""
        assert self._work is not None
        return self._work(shard, ignore)
