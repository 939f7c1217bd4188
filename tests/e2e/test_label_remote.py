"""Labelling through a remote endpoint: finished labels survive refused requests."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from d2llm.core.errors import ModelError
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingSource
from d2llm.evaluation import pool_scores
from d2llm.models.teachers.prompts import load_prompt
from d2llm.models.teachers.remote import RemoteTeacher
from d2llm.training import label as verb
from local_endpoint import LocalEndpoint, Reply, Request, completion, local_endpoint, remote_config
from tiny_data import topics

NUM_QUERIES = 24
CHUNK = 4  # queries, each with at most ten pairs


def opinion(prompt: str) -> float:
    """Log-odds derived from the whole prompt."""
    return (zlib.crc32(prompt.encode()) % 1000) / 100 - 5


def reply(request: Request, number: int) -> Reply:
    value = opinion(request.prompt)
    return Reply(completion({" yes": -10.0 + value, " no": -10.0}, num_prompt_tokens=7), delay=0.002)


@pytest.fixture(scope="module")
def source() -> TrainingSource:
    return topics(num_train=NUM_QUERIES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 9 * CHUNK)
    monkeypatch.setattr(pool_scores, "_SHARD_SECONDS", 0.0)


def run(source: TrainingSource, store: Path, endpoint: LocalEndpoint) -> verb.LabelReport:
    teacher = remote_config(endpoint.url, concurrency=4, patience_minutes=0)
    return verb.label([source], store, teacher=teacher)


def open_labels(source: TrainingSource, store: Path) -> LabelStore:
    identity = RemoteTeacher.identify(remote_config("http://elsewhere/v1"))
    prompt = identity.prompts[source.task]
    return LabelStore.open_for_reading(store, teacher=identity.fingerprint, prompt=prompt, dataset=source.dataset.name)


def num_pairs(source: TrainingSource) -> int:
    return sum(len(entry.passage_ids) for entry in source.plan.entries)


def assert_complete(source: TrainingSource, store: Path) -> None:
    labels = open_labels(source, store)
    prompt = load_prompt("short", source.task)
    assert labels.num_duplicates == 0
    assert len(labels) == NUM_QUERIES
    for entry in source.plan.entries:
        expected = {
            passage_id: opinion(
                prompt.head
                + source.query_text(entry.query_id)
                + prompt.middle
                + source.passage_text(passage_id)
                + prompt.tail
            )
            for passage_id in entry.passage_ids
        }
        assert labels.log_odds(entry.query_id) == pytest.approx(expected, abs=1e-5)
        assert labels.gram(entry.query_id) is None


def test_labels_are_the_endpoints_log_odds(source: TrainingSource, tmp_path: Path) -> None:
    with local_endpoint(reply) as endpoint:
        report = run(source, tmp_path, endpoint)
        assert (report.queries, report.pairs, report.num_truncated) == (NUM_QUERIES, num_pairs(source), 0)
        assert report.tokens == 7 * num_pairs(source)
        assert len(endpoint.requests) == num_pairs(source) + 1  # plus one to probe the endpoint
        repeated = run(source, tmp_path, endpoint)
    assert (repeated.pairs, repeated.finished_queries) == (0, NUM_QUERIES)
    assert_complete(source, tmp_path)


def test_a_failed_run_resumes_where_it_stopped(source: TrainingSource, tmp_path: Path) -> None:
    first_refused = num_pairs(source) // 2

    def until_the_key_expires(request: Request, number: int) -> Reply:
        return reply(request, number) if number < first_refused else Reply({"error": "expired"}, status=403)

    with local_endpoint(until_the_key_expires) as endpoint, pytest.raises(ModelError, match="refuses access"):
        run(source, tmp_path, endpoint)
    kept_labels = open_labels(source, tmp_path)
    assert kept_labels.num_pairs == first_refused - 1  # every answer but that of the trial
    with local_endpoint(reply) as endpoint:
        report = run(source, tmp_path, endpoint)  # at another address, but the same teacher
        assert len(endpoint.requests) == 1 + report.pairs
    assert (report.finished_pairs, report.pairs) == (first_refused - 1, num_pairs(source) - first_refused + 1)
    assert_complete(source, tmp_path)
