"""Prometheus metrics of a server. No label value comes from a client: routes are templates, not paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics import disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from d2llm import __version__
from d2llm.core.fallbacks import fallback_counts
from d2llm.retrieval.segments import IndexView

STAGES = ("queue", "rewriting", "expansion", "encode", "candidates", "score", "rerank", "teacher")
"""Stages of a request: queueing, encoding, finding candidates, scoring by the IEM, reading by the teacher."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, *_REQUEST_SECONDS)
_BATCH_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

StageListener = Callable[[str, float], None]


class _Fallbacks(Collector):
    """Counts of fallbacks to slower paths in this process."""

    def collect(self) -> Iterable[Metric]:
        """Collect the counts since the process started."""
        counted = CounterMetricFamily(
            "d2llm_fallbacks",
            "Number of times that a fast path could not be used, by path; the log says why.",
            labels=("fast_path",),
        )
        for fast_path, count in fallback_counts().items():
            counted.add_metric((fast_path,), count)
        return [counted]


class Telemetry:
    """The metrics of one application, in a separate registry, so that a process can have several."""

    def __init__(self) -> None:
        disable_created_metrics()  # as many series again, which say when each began
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "d2llm_http_requests",
            "Requests answered, by route, method, status and index.",
            ("route", "method", "status", "index"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "d2llm_http_request_seconds",
            "Seconds from a request's arrival to the end of its answer, by route and index.",
            ("route", "index"),
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
        self._in_flight = Gauge("d2llm_http_requests_in_flight", "Requests in progress.", registry=self.registry)
        stages = Histogram(
            "d2llm_stage_seconds",
            f"Seconds per stage of a request: {', '.join(STAGES)}.",
            ("stage",),
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        self._of_stage = {stage: stages.labels(stage) for stage in STAGES}  # shown from the start, as zero
        self._queue = Gauge("d2llm_queue_texts", "Texts waiting to be encoded.", registry=self.registry)
        self._batches = Histogram("d2llm_batch_texts", "Texts per batch.", buckets=_BATCH_TEXTS, registry=self.registry)
        self._batch_seconds = Counter("d2llm_batch_seconds", "Seconds spent encoding batches.", registry=self.registry)
        self._index_version = Gauge(
            "d2llm_index_version", "Version of the served index.", ("index",), registry=self.registry
        )
        self._index_passages = Gauge(
            "d2llm_index_passages", "Passages in that version.", ("index",), registry=self.registry
        )
        self._missing_shards = Gauge(
            "d2llm_index_missing_shards", "Shards left out of searches.", ("index",), registry=self.registry
        )
        self._unreadable = Gauge(
            "d2llm_index_unreadable", "1 while a new version cannot be read.", ("index",), registry=self.registry
        )
        self.registry.register(_Fallbacks())
        Info("d2llm_build", "Version of d2llm.", registry=self.registry).info({"version": __version__})
        ProcessCollector(registry=self.registry)
        self._student: Info | None = None
        self._named: dict[str, Callable[[], Mapping[str, str]]] = {}
        self._stage_listeners: list[StageListener] = []

    def observe(self, stage: str, seconds: float) -> None:
        """Record the seconds of a stage that has just ended; ``stage`` is one of ``STAGES``."""
        if stage not in STAGES:
            raise ValueError(f"'{stage}' is not a stage of a request; the stages are: {', '.join(STAGES)}")
        self._of_stage[stage].observe(seconds)
        for listen in self._stage_listeners:
            listen(stage, seconds)

    def on_stage(self, listener: StageListener) -> None:
        """Also call ``listener`` for every stage."""
        self._stage_listeners.append(listener)

    def observe_batch(self, num_texts: int, seconds: float) -> None:
        """Record a batch of the student."""
        self._batches.observe(num_texts)
        self._batch_seconds.inc(seconds)

    def watch_queue(self, num_queued: Callable[[], int]) -> None:
        """Call ``num_queued`` at each exposition, in the thread that handles it."""
        self._queue.set_function(lambda: float(num_queued()))

    def watch_index(self, name: str, view: Callable[[], IndexView], problem: Callable[[], str]) -> None:
        """Call these at each exposition: the served version of an index, and why a new one cannot be read."""
        self._index_version.labels(name).set_function(lambda: float(view().version))
        self._index_passages.labels(name).set_function(lambda: float(len(view())))
        self._missing_shards.labels(name).set_function(lambda: float(len(view().missing)))
        self._unreadable.labels(name).set_function(lambda: float(bool(problem())))

    def watch_student(self, index: str, named: Callable[[], Mapping[str, str]]) -> None:
        """Call ``named`` at each exposition for the name and fingerprint of an index's student; "" is no index."""
        if self._student is None:
            self._student = Info("d2llm_student", "The served student.", ("index",), registry=self.registry)
        self._named[index] = named

    def begin_request(self) -> None:
        """Record the start of a request."""
        self._in_flight.inc()

    def end_request(self, route: str, method: str, status: int, seconds: float, index: str = "") -> None:
        """Record the end of a request; ``route`` is a template, ``index`` the served index that was used, or ""."""
        self._in_flight.dec()
        self._requests.labels(route, method if method in _METHODS else "OTHER", str(status), index).inc()
        self._seconds.labels(route, index).observe(seconds)

    def exposition(self) -> tuple[bytes, str]:
        """The metrics in Prometheus format, and their content type."""
        if self._student is not None:
            for index, named in self._named.items():
                self._student.labels(index).info({**named()})
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


metrics_router = APIRouter(tags=["operations"])


@metrics_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics of the server, in Prometheus format."""
    telemetry: Telemetry = request.app.state.telemetry
    content, media_type = telemetry.exposition()
    return Response(content, headers={"Content-Type": media_type})
