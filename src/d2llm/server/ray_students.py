"""Replicas of a student on a Ray cluster, placed, restarted and scaled by Ray Serve; they encode for the server.

The server's process forms the batches (``batching``) and hands each to a replica. If none answers, it encodes the
batch itself, with its own copy of the student, until one answers again.
"""

# pyright: reportUnknownParameterType=false
# (Ray is optional, so its types are unknown here)

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.types import EngineName
from d2llm.models.backbone import EncodedTexts, TextKind
from d2llm.models.student import Student
from d2llm.runners.placement import load_work
from d2llm.runners.ray_cluster import check_versions, import_ray, last_line, own_versions

_log = logging.getLogger(__name__)
_BATCHES_PER_REPLICA = 2  # one in work, one that is there when it is finished
_LOOK_SECONDS = 0.5  # between two attempts to reach replicas again
_START_SECONDS = 300.0


@dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas there are, and what each has.

    Attributes:
        replicas: number of replicas; the smallest, if ``max_replicas`` is larger.
        max_replicas: Ray Serve adds replicas up to this number while batches wait, and removes them later.
        cpus: CPUs that each reserves.
        gpus: GPUs that each reserves.
        seconds: within which a batch must be encoded.
        device: where a student computes in a replica.
        dtype: number format of its products.
        engine: engine that encodes.
    """

    replicas: int = 1
    max_replicas: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    seconds: float = 10.0
    device: str | None = None
    dtype: str | None = None
    engine: EngineName = "auto"

    @property
    def most(self) -> int:
        """The largest number of replicas."""
        return max(self.replicas, self.max_replicas or 0)


class _Replica:
    """What runs on a node of the cluster: a copy of the student."""

    def __init__(
        self, versions: dict[str, str], folder: str, source: str, fingerprint: str, settings: ReplicaSettings
    ) -> None:
        check_versions(versions)
        if Path(folder).is_dir():  # relative paths mean the same as in the server's process
            os.chdir(folder)

        def load() -> Student:
            return Student.load(source, device=settings.device, dtype=settings.dtype, engine=settings.engine)

        def itself(student: Student, _shard: Sequence[object], _advance: object) -> Student:
            return student

        self._student = load_work(load, fingerprint, itself)((), lambda _: None)

    def encode_tokens(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As of ``Student``."""
        return self._student.encode_tokens(ids)

    def encode_with_tokens(self, texts: Sequence[str], kind: TextKind) -> EncodedTexts:
        """As of ``Student``."""
        return self._student.encode_with_tokens(texts, kind)

    def ping(self) -> int:
        """Its process id: it is there."""
        return os.getpid()


class StudentReplicas:
    """Encodes batches on the replicas of a student (``model_service.BatchEncoder``)."""

    def __init__(self, student: Student, source: str, settings: ReplicaSettings) -> None:
        """Start the replicas, and wait for the first ones.

        Args:
            student: encodes here if no replica answers.
            source: folder or name of the student, by which replicas load it.
            settings: of the replicas.

        Raises:
            MissingExtraError: Ray Serve is not installed.
            InputError: the cluster has too few CPUs or GPUs.
            ModelError: the replicas cannot start.
        """
        self.num_batches = _BATCHES_PER_REPLICA * settings.most
        self._student = student
        self._settings = settings
        self._serve = require("ray.serve", extra="ray-serve", purpose="replicas of a student")
        self._name = f"d2llm-{student.fingerprint}"
        self._away = threading.Event()
        self._stopped = threading.Event()
        _require_room(settings)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._handle = self._deploy(source)

    def encode_tokens(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors of a batch of tokenized texts."""
        return self._encode("encode_tokens", ids)

    def encode_with_tokens(self, texts: Sequence[str], kind: TextKind) -> EncodedTexts:
        """The vectors of texts and of their tokens."""
        return self._encode("encode_with_tokens", texts, kind)

    @property
    def is_away(self) -> bool:
        """Whether no replica answered lately, so that this process encodes."""
        return self._away.is_set()

    def stop(self) -> None:
        """End the replicas."""
        self._stopped.set()
        with contextlib.suppress(Exception):  # the cluster may have gone
            self._serve.delete(self._name, _blocking=False)

    def _deploy(self, source: str) -> Any:
        settings = self._settings
        options: dict[str, Any] = {
            "name": "student",
            "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
            "max_ongoing_requests": _BATCHES_PER_REPLICA,
            "health_check_period_s": 2,
            "health_check_timeout_s": 10,
            "graceful_shutdown_timeout_s": 2,
        }
        if settings.most > settings.replicas:
            options["autoscaling_config"] = {
                "min_replicas": settings.replicas,
                "max_replicas": settings.most,
                "target_ongoing_requests": 1,
            }
        else:
            options["num_replicas"] = settings.replicas
        try:
            self._serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
            replica = self._serve.deployment(_Replica).options(**options)
            app = replica.bind(own_versions(), str(Path.cwd()), source, self._student.fingerprint, settings)
            handle = self._serve.run(app, name=self._name, route_prefix=None)
            handle.ping.remote().result(timeout_s=_START_SECONDS)
        except Exception as error:
            self.stop()
            cause = getattr(error, "cause", None)
            if isinstance(cause, D2LLMError):
                raise cause from error
            raise ModelError(
                f"the replicas of the student cannot start ({last_line(error)}); see Ray's logs on their nodes "
                "(/tmp/ray/session_latest/logs/serve)"
            ) from error
        return handle

    def _encode(self, method: str, *args: Any) -> Any:
        ray = import_ray()
        if not self._away.is_set():
            try:
                return getattr(self._handle, method).remote(*args).result(timeout_s=self._settings.seconds)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, D2LLMError) else error) from None
            except (ray.exceptions.RayError, TimeoutError, self._serve.exceptions.RayServeException) as error:
                _log.warning("no replica of the student answers (%s); this process encodes", last_line(error))
                if not self._away.is_set():
                    self._away.set()
                    threading.Thread(target=self._wait, name="replicas", daemon=True).start()
        return getattr(self._student, method)(*args)

    def _wait(self) -> None:
        """Wait until a replica answers again."""
        while not self._stopped.is_set():
            try:
                self._handle.ping.remote().result(timeout_s=_START_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever has happened, it is tried again
                _log.info("replicas of the student: %s", last_line(error))
                self._stopped.wait(_LOOK_SECONDS)
            else:
                _log.warning("the replicas of the student answer again")
                self._away.clear()
                return


def _require_room(settings: ReplicaSettings) -> None:
    resources = import_ray().cluster_resources()
    for kind, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        needed, present = settings.replicas * each, resources.get(kind, 0.0)
        if needed > present:
            raise InputError(
                f"{settings.replicas} replicas of the student need {needed:g} {kind}s, but the cluster has {present:g}"
                "; add nodes, or set student_replicas or what each reserves lower"
            )
