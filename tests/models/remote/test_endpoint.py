"""The remote teacher's endpoint on a real socket: many requests, keys and refusals."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2llm.core.errors import D2LLMError, InputError, ModelError, ModelNotFoundError
from d2llm.models.teachers.remote import RemoteTeacher
from local_endpoint import (
    PAIRS,
    PLAIN,
    Reply,
    Request,
    always,
    completion,
    local_endpoint,
    number_in,
    remote_config,
    remote_teacher,
)
from waiting import PATIENCE, until

KEY = "sk-not-a-real-key-0123456789"


def error_of(reply, *, times: int = 1, **settings: object) -> D2LLMError:
    """The error raised by scoring one pair, after exactly ``times`` requests."""
    with local_endpoint(reply) as endpoint:
        teacher = remote_teacher(endpoint, patience_minutes=0, **settings)
        with pytest.raises(D2LLMError) as caught:
            teacher.score_pairs(PAIRS[:1], "asymmetric")
        assert len(endpoint.requests) == times
    assert "served" in str(caught.value) or endpoint.url in str(caught.value)
    return caught.value


# --- many requests


def answer_by_number(request: Request, number: int) -> Reply:
    value = float(number_in(request))
    return Reply(completion({" yes": -1.0, " no": -1.0 - value}), delay=random.Random(number).uniform(0, 0.03))


def test_answers_match_their_pairs_with_limited_concurrency():
    done: list[int] = []
    three_at_once = threading.Barrier(3, timeout=60)

    def reply(request: Request, number: int) -> Reply:
        three_at_once.wait()
        return answer_by_number(request, number)

    with local_endpoint(reply) as endpoint:
        scores = remote_teacher(endpoint, concurrency=3).score_pairs(PAIRS, "asymmetric", advance=done.append)
        assert scores.log_odds.tolist() == [float(n) for n in range(12)]
        assert endpoint.most_at_once == 3
        assert sum(done) == 12
        assert len(remote_teacher(endpoint).score_pairs([], "asymmetric").log_odds) == 0


def test_pairs_of_one_query_are_sent_consecutively():
    pairs = [(f"query {n % 3}", f"passage {n}") for n in range(9)]
    with local_endpoint(answer_by_number) as endpoint:
        scores = remote_teacher(endpoint, concurrency=1).score_pairs(pairs, "asymmetric")
    assert scores.log_odds.tolist() == [float(n) for n in range(9)]
    assert [number_in(request) for request in endpoint.requests] == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_judging_works_inside_a_notebooks_event_loop():
    async def cell(teacher: RemoteTeacher) -> list[float]:
        return teacher.score_pairs(PAIRS[:2], "asymmetric").log_odds.tolist()

    with local_endpoint(always(PLAIN)) as endpoint:
        assert asyncio.run(cell(remote_teacher(endpoint))) == [1.0, 1.0]


def test_calls_share_one_connection():
    """A search with a remote backbone is one call; to connect takes longer than many an answer."""
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint)
        for _ in range(3):
            assert teacher.score_pairs(PAIRS[:1], "asymmetric").log_odds.tolist() == [1.0]
        assert endpoint.connections == 1


def test_calls_from_several_threads_share_the_connections():
    with local_endpoint(answer_by_number) as endpoint, ThreadPoolExecutor(4) as threads:
        teacher = remote_teacher(endpoint, concurrency=2)
        scores = threads.map(
            lambda n: teacher.score_pairs(PAIRS[n : n + 3], "asymmetric").log_odds.tolist(), (0, 3, 6, 9)
        )
        assert [*scores] == [[float(n + k) for k in range(3)] for n in (0, 3, 6, 9)]
        assert endpoint.most_at_once == 2
        assert endpoint.connections <= 2


def test_a_connection_that_the_server_has_closed_is_opened_again():
    with local_endpoint(lambda request, number: Reply(PLAIN, hang_up=number == 1)) as endpoint:
        teacher = remote_teacher(endpoint)
        for _ in range(3):
            assert teacher.score_pairs(PAIRS[:1], "asymmetric").log_odds.tolist() == [1.0]
        assert endpoint.connections == 2
        assert len(endpoint.requests) == 4  # one of them without an answer


def test_the_connections_of_an_endpoint_that_is_gone_are_closed():
    with local_endpoint(always(PLAIN)) as endpoint:
        remote_teacher(endpoint).score_pairs(PAIRS[:1], "asymmetric")
        gc.collect()  # teacher and endpoint refer to each other
        until(lambda: endpoint.connections == endpoint.disconnections == 1, "the end of the connection")


def test_a_forked_process_opens_connections_of_its_own():
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint)
        teacher.score_pairs(PAIRS[:1], "asymmetric")
        child = multiprocessing.get_context("fork").Process(target=teacher.score_pairs, args=(PAIRS[:1], "asymmetric"))
        child.start()
        child.join(PATIENCE)
        assert child.exitcode == 0
        assert endpoint.connections == 2


@pytest.fixture
def _ctrl_c_interrupts():
    """Sets the default SIGINT handler, which Python lacks if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_does_not_wait_for_pending_requests():
    with local_endpoint(always(PLAIN, delay=2 * PATIENCE)) as endpoint:

        def press() -> None:
            until(lambda: endpoint.requests, "a request")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            remote_teacher(endpoint).score_pairs(PAIRS, "asymmetric")
        assert time.monotonic() - started < PATIENCE


# --- first requests


def test_an_unreachable_address_is_an_error_at_once():
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))  # bound but not listening, so it refuses connections
        url = f"http://127.0.0.1:{unanswered.getsockname()[1]}/v1"
        started = time.monotonic()
        with pytest.raises(ModelError, match=rf"^{url}/completions cannot be reached: .*start the server there"):
            RemoteTeacher.load(remote_config(url))
        assert time.monotonic() - started < 30  # no retries, unlike for a server that goes away


def test_loading_sends_one_request():
    with local_endpoint(always(PLAIN)) as endpoint:
        RemoteTeacher.load(remote_config(endpoint.url), device="cuda", dtype="bfloat16")
        assert len(endpoint.requests) == 1
    error = None
    with local_endpoint(always({"detail": "no such key"}, status=401)) as endpoint:
        with pytest.raises(ModelError, match="refuses access") as caught:
            RemoteTeacher.load(remote_config(endpoint.url))
        error = str(caught.value)
    assert "set teacher.remote.api_key_env" in error


# --- keys


def test_a_key_is_sent_but_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    with caplog.at_level(logging.DEBUG), local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint, api_key_env="SOME_KEY")
        teacher.score_pairs(PAIRS[:1], "asymmetric")
        assert endpoint.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        endpoint.reply = lambda request, number: Reply(f"no: {request.headers['Authorization']}", status=403)
        with pytest.raises(ModelError) as caught:
            teacher.score_pairs(PAIRS[:1], "asymmetric")
        assert len(endpoint.requests) == 2  # a refused key is not retried
    message = str(caught.value)
    assert "refuses the key (403): 'no: Bearer ***'; check the key in SOME_KEY" in message
    output = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(teacher) + repr(teacher.config)
    assert KEY not in output
    assert KEY not in teacher.config.model_dump_json()


@pytest.mark.parametrize(
    ("value", "problem"), [(None, "is not set"), ("  ", "is not set"), ("schlüssel", "characters")]
)
def test_an_unusable_key_is_reported(monkeypatch: pytest.MonkeyPatch, value: str | None, problem: str):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(InputError, match=f"SOME_KEY .*{problem}"):
        RemoteTeacher(remote_config("http://127.0.0.1:9/v1", api_key_env="SOME_KEY"))


# --- refusals


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (Reply({"error": {"message": "The model `served` does not exist."}}, 404), ModelNotFoundError, "teacher.model"),
        (Reply({"error": {"message": "The model `served` does not exist"}}, 400), ModelNotFoundError, "teacher.model"),
        (
            Reply({"error": {"message": "This model's maximum context length is 512 tokens, however ..."}}, 400),
            InputError,
            "lower teacher.max_tokens",
        ),
        (Reply({"error": {"type": "exceed_context_size_error"}}, 400), InputError, "lower teacher.max_tokens"),
        (Reply("too large", 413), InputError, "lower teacher.max_tokens"),
        (Reply({"error": "Requested sample logprobs of 50, greater than 20"}, 400), ModelError, "top_logprobs"),
        (Reply({"error": "logprobs is not supported for this model"}, 500), ModelError, "start the server so"),
        (Reply(completion(None)), ModelError, "start the server so"),
        (Reply(completion({" yes": -0.1})), ModelError, "only that of the chosen token"),
        (Reply("<html>hello</html>"), ModelError, "give the address of an OpenAI-compatible endpoint"),
        (Reply({"choices": []}), ModelError, "did not answer with a completion"),
        (Reply([]), ModelError, "did not answer with a completion"),
        (Reply("", 307, {"Location": "/elsewhere"}), ModelError, "refuses the request (307)"),
        (Reply({"error": "something else"}, 422), ModelError, '\'{"error": "something else"}\''),
    ],
)
def test_refusals_say_what_to_do_and_are_not_retried(reply: Reply, kind: type, message: str):
    error = error_of(lambda request, number: reply)
    assert type(error) is kind
    assert message in str(error)


def test_long_error_bodies_are_shortened():
    assert len(str(error_of(always("x" * 10_000, status=418)))) < 600
