"""What a server counts and times, for Prometheus. No label comes from a client: routes are templates, not paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from d2llm import __version__
from d2llm.core.fallbacks import fallback_counts

STAGES = ("queue", "encode", "candidates", "score", "teacher")
"""Of a request: waiting for the student, encoding, finding candidates, rescoring by the IEM, reading by the teacher."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, *_REQUEST_SECONDS)
_BATCH_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

StageListener = Callable[[str, float], None]


class _Fallbacks(Collector):
    """What could not be done the fast way, of this process."""

    def collect(self) -> Iterable[Metric]:
        """Counted since the process began."""
        counted = CounterMetricFamily(
            "d2llm_fallbacks",
            "Times that a fast way could not be taken, by which; the log says why.",
            labels=("fast_way",),
        )
        for fast_way, count in fallback_counts().items():
            counted.add_metric((fast_way,), count)
        return [counted]


class Telemetry:
    """The metrics of one application, in a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "d2llm_http_requests",
            "Requests answered, by route, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "d2llm_http_request_seconds",
            "Seconds from a request's arrival to the end of its answer, by route.",
            ("route",),
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "d2llm_http_requests_in_flight", "Requests that are being answered.", registry=self.registry
        )
        self._stages = Histogram(
            "d2llm_stage_seconds",
            "Seconds of a request's stages: queue, encode, candidates, score, teacher.",
            ("stage",),
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        for stage in STAGES:
            self._stages.labels(stage)  # shown from the start, as zero
        self._queue = Gauge("d2llm_queue_texts", "Texts that wait to be encoded.", registry=self.registry)
        self._batches = Histogram(
            "d2llm_batch_texts", "Texts that are encoded at once.", buckets=_BATCH_TEXTS, registry=self.registry
        )
        self._batch_seconds = Counter("d2llm_batch_seconds", "Seconds spent encoding batches.", registry=self.registry)
        self._index_version = Gauge(
            "d2llm_index_version", "Version of the index that is served.", registry=self.registry
        )
        self._index_passages = Gauge("d2llm_index_passages", "Passages in that version.", registry=self.registry)
        self.registry.register(_Fallbacks())
        Info("d2llm_build", "What runs.", registry=self.registry).info({"version": __version__})
        ProcessCollector(registry=self.registry)
        self._student: Info | None = None
        self._named: Callable[[], Mapping[str, str]] = dict
        self._stage_listeners: list[StageListener] = []

    def observe(self, stage: str, seconds: float) -> None:
        """Count ``seconds`` of a stage that has just ended; ``stage`` is one of ``STAGES``."""
        if stage not in STAGES:
            raise ValueError(f"'{stage}' is no stage of a request; they are: {', '.join(STAGES)}")
        self._stages.labels(stage).observe(seconds)
        for listen in self._stage_listeners:
            listen(stage, seconds)

    def on_stage(self, listener: StageListener) -> None:
        """Also tell ``listener`` of every stage."""
        self._stage_listeners.append(listener)

    def observe_batch(self, num_texts: int, seconds: float) -> None:
        """Count a batch of the student."""
        self._batches.observe(num_texts)
        self._batch_seconds.inc(seconds)

    def watch_queue(self, num_queued: Callable[[], int]) -> None:
        """Ask ``num_queued`` at each exposition; it is called in the thread that exposes."""
        self._queue.set_function(lambda: float(num_queued()))

    def watch_index(self, version: Callable[[], int], num_passages: Callable[[], int]) -> None:
        """Ask for what is served at each exposition."""
        self._index_version.set_function(lambda: float(version()))
        self._index_passages.set_function(lambda: float(num_passages()))

    def watch_student(self, named: Callable[[], Mapping[str, str]]) -> None:
        """Ask for the name and fingerprint of the student at each exposition."""
        self._student = self._student or Info("d2llm_student", "The student that is served.", registry=self.registry)
        self._named = named

    def begin_request(self) -> None:
        """A request came."""
        self._in_flight.inc()

    def end_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """The request was answered; ``route`` is a template."""
        self._in_flight.dec()
        self._requests.labels(route, method if method in _METHODS else "OTHER", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def exposition(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type."""
        if self._student is not None:
            self._student.info({**self._named()})
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


metrics_router = APIRouter(tags=["operations"])


@metrics_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counts and times of the server, as Prometheus reads them."""
    telemetry: Telemetry = request.app.state.telemetry
    content, media_type = telemetry.exposition()
    return Response(content, headers={"Content-Type": media_type})
