"""The connection to a Ray cluster."""

# pyright: reportUnknownParameterType=false
# (Ray is optional, so its types are unknown here)

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2llm import __version__
from d2llm.core.errors import D2LLMError, InputError, MismatchError, Terminated
from d2llm.core.extras import require
from d2llm.core.manifest import package_versions

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
