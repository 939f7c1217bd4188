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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, ModelError
from d2llm.core.extras import require
from d2llm.models.student import Student
from d2llm.models.tokens import TextKind
from d2llm.runners.placement import load_same
from d2llm.runners.ray_runner import as_worker, import_ray, last_line, own_versions, require_room, task_error
from d2llm.server.settings import ServeSettings

_log = logging.getLogger(__name__)
_BATCHES_PER_REPLICA = 2  # one in work, one that is there when it is finished
_LOOK_SECONDS = 0.5  # between two attempts to reach replicas again
_BATCH_SECONDS = 10.0  # within which a replica must encode a batch
_START_SECONDS = 300.0


class _Replica:
    """What runs on a node of the cluster: a copy of the student."""

    def __init__(
        self, versions: dict[str, str], folder: str, source: str, fingerprint: str, options: dict[str, Any]
    ) -> None:
        as_worker(versions, folder)
        self._student = load_same(partial(Student.load, source, **options), fingerprint)

    def encode_tokens(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As of ``Student``."""
        return self._student.encode_tokens(ids)

    def encode_token_rows(
        self, ids: Sequence[Sequence[int]], kind: TextKind, starts: Sequence[int]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """As of ``Student``."""
        return self._student.encode_token_rows(ids, kind, starts)

    def ping(self) -> int:
        """Its process id: it is there."""
        return os.getpid()


class StudentReplicas:
    """Encodes batches on the replicas of a student."""

    def __init__(self, student: Student, source: str, settings: ServeSettings) -> None:
        """Start the replicas, and wait for the first ones.

        Args:
            student: encodes here if no replica answers.
            source: folder or name of the student, by which replicas load it.
            settings: how many replicas there are, and what each has.

        Raises:
            MissingExtraError: Ray Serve is not installed.
            InputError: the cluster has too few CPUs or GPUs.
            ModelError: the replicas cannot start.
        """
        self._most = max(settings.student_replicas, settings.max_student_replicas or 0)
        self.num_batches = _BATCHES_PER_REPLICA * self._most
        self._student = student
        self._serve = require("ray.serve", extra="ray-serve", purpose="replicas of a student")
        self._name = f"d2llm-{student.fingerprint}"
        self._away = threading.Event()
        self._stopped = threading.Event()
        for kind, size in (("CPU", settings.student_cpus), ("GPU", settings.student_gpus)):
            who = f"{settings.student_replicas} replicas of the student"
            require_room(kind, settings.student_replicas * size, who, "student_replicas or what each reserves")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._handle = self._deploy(source, settings)

    def encode_tokens(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors of a batch of tokenized texts."""
        return self._encode("encode_tokens", ids)

    def encode_token_rows(
        self, ids: Sequence[Sequence[int]], kind: TextKind, starts: Sequence[int]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """The vectors of a batch of tokenized texts and of their tokens."""
        return self._encode("encode_token_rows", ids, kind, starts)

    def stop(self) -> None:
        """End the replicas."""
        self._stopped.set()
        with contextlib.suppress(Exception):  # the cluster may have gone
            self._serve.delete(self._name, _blocking=False)

    def _deploy(self, source: str, settings: ServeSettings) -> Any:
        options: dict[str, Any] = {
            "name": "student",
            "ray_actor_options": {"num_cpus": settings.student_cpus, "num_gpus": settings.student_gpus},
            "max_ongoing_requests": _BATCHES_PER_REPLICA,
            "health_check_period_s": 2,
            "health_check_timeout_s": 10,
            "graceful_shutdown_timeout_s": 2,
        }
        if self._most > settings.student_replicas:
            options["autoscaling_config"] = {
                "min_replicas": settings.student_replicas,
                "max_replicas": self._most,
                "target_ongoing_requests": 1,
            }
        else:
            options["num_replicas"] = settings.student_replicas
        device = settings.device or ("cuda" if settings.student_gpus else "cpu")
        loading = {"device": device, "dtype": settings.dtype, "engine": settings.engine}
        try:
            self._serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
            replica = self._serve.deployment(_Replica).options(**options)
            app = replica.bind(own_versions(), str(Path.cwd()), source, self._student.fingerprint, loading)
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
                return getattr(self._handle, method).remote(*args).result(timeout_s=_BATCH_SECONDS)
            except ray.exceptions.RayTaskError as error:
                raise task_error(error) from None
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
