"""The pace and the retries of a remote teacher's requests to an endpoint on a real socket."""

from __future__ import annotations

import email.utils
import random
import time

import pytest

from d2llm.core.errors import ModelError
from d2llm.models.teachers.remote import RemoteTeacher
from local_endpoint import PAIRS, PLAIN, Reply, Request, always, local_endpoint, remote_config, remote_teacher
from waiting import PATIENCE, until


def test_a_rate_limit_holds_across_calls():
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint, requests_per_minute=600)
        started = time.monotonic()
        teacher.score_pairs(PAIRS[:4], "asymmetric")
        teacher.score_pairs(PAIRS[:3], "asymmetric")
        assert time.monotonic() - started >= 0.6  # six pauses between seven requests
    assert len(endpoint.requests) == 7


def retry_after(kind: str) -> str:
    # An HTTP date has whole seconds, so up to one second is lost.
    return "1" if kind == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_holds_for_all_requests(kind: str):
    def reply(request: Request, number: int) -> Reply:
        if number == 1:
            return Reply({"error": "slow down"}, status=429, headers={"Retry-After": retry_after(kind)})
        if number == 0:
            until(lambda: teacher.endpoint.retries.count, "the refusal of the request beside it")
        return Reply(PLAIN)

    with local_endpoint(reply) as endpoint:
        teacher = remote_teacher(endpoint, concurrency=2)
        assert teacher.score_pairs(PAIRS[:6], "asymmetric").log_odds.tolist() == [1.0] * 6
    assert len(endpoint.requests) == 7
    assert teacher.endpoint.retries.count == 1
    delays = [request.when - endpoint.requests[1].when for request in endpoint.requests[2:]]
    assert min(delays) > 0.9


@pytest.mark.parametrize("failure", ["status", "hang_up", "timeout"])
def test_temporary_failures_are_retried(failure: str, monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append(high) or 0.01)
    replies = {
        "status": Reply({"error": "loading"}, status=503),
        "hang_up": Reply(hang_up=True),
        "timeout": Reply(PLAIN, delay=2.0),
    }
    limit = {"timeout_seconds": 1.0} if failure == "timeout" else {}
    with local_endpoint(lambda request, number: replies[failure] if 1 <= number <= 4 else Reply(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint, concurrency=1, **limit)
        assert teacher.score_pairs(PAIRS[:3], "asymmetric").log_odds.tolist() == [1.0] * 3
    assert len(endpoint.requests) == 7
    assert teacher.endpoint.retries.count == 4
    assert limits == [1, 2, 4, 8]


def test_back_off_grows_to_a_minute(monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append(high) or 0.001)
    with local_endpoint(lambda request, number: Reply(PLAIN) if number == 9 else Reply("busy", status=500)) as endpoint:
        remote_teacher(endpoint).score_pairs(PAIRS[:1], "asymmetric")
    assert limits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_retries_end_after_patience_minutes():
    busy = Reply({"error": "no room"}, status=503, headers={"Retry-After": "0.1"})
    with local_endpoint(lambda request, number: busy) as endpoint:
        teacher = remote_teacher(endpoint, patience_minutes=0.01)
        with pytest.raises(ModelError, match=r"answers 503: .*no room.*retried for up to 0.01 minutes") as caught:
            teacher.score_pairs(PAIRS[:1], "asymmetric")
    assert len(endpoint.requests) == teacher.endpoint.retries.count + 1 <= 6  # 0.6 seconds, in pauses of 0.1
    assert "continues where it stopped" in str(caught.value)


def test_a_delay_beyond_the_patience_is_an_error_each_time():
    busy = Reply({"error": "come back later"}, status=429, headers={"Retry-After": "30"})
    with local_endpoint(lambda request, number: busy) as endpoint:
        teacher = remote_teacher(endpoint, patience_minutes=0.01)
        started = time.monotonic()
        for problem in ("answers 429", r"asks to wait (30|29) seconds"):
            with pytest.raises(ModelError, match=rf"{problem}.*that is longer than patience_minutes \(0.01\)"):
                teacher.score_pairs(PAIRS[:1], "asymmetric")
        assert time.monotonic() - started < PATIENCE
    assert len(endpoint.requests) == 1


def test_a_delay_of_nothing_is_no_reason_to_hurry(monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append(high) or 0.01)
    busy = Reply({"error": "busy"}, status=503, headers={"Retry-After": "0"})
    with local_endpoint(lambda request, number: busy if 1 <= number <= 3 else Reply(PLAIN)) as endpoint:
        remote_teacher(endpoint, concurrency=1).score_pairs(PAIRS[:2], "asymmetric")
    assert limits == [1, 2, 4]


def test_a_server_that_goes_away_is_retried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.05)
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = RemoteTeacher.load(remote_config(endpoint.url, patience_minutes=0.01))
    with pytest.raises(ModelError, match=r"no connection .*retried"):
        teacher.score_pairs(PAIRS[:1], "asymmetric")
    assert teacher.endpoint.retries.count > 3
