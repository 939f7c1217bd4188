"""The remote teacher against an endpoint on a real socket; tests/e2e/test_remote_server.py asks a real model."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import (
    AnswerTokenError,
    D2LLMError,
    InputError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
)
from d2llm.core.recipe import TeacherConfig
from d2llm.models.judge import Judge
from d2llm.models.prompts import Prompt, load_prompt
from d2llm.models.remote_teacher import RemoteTeacher, read_log_odds
from d2llm.models.teacher import Teacher
from local_endpoint import LocalEndpoint, Reply, Request, chat_completion, completion, local_endpoint
from tiny_models import TEXTS, tiny_teacher_config, tiny_tokenizer, write_tiny_model

KEY = "sk-not-a-real-key-0123456789"
PLAIN = completion({" yes": -0.5, " no": -1.5, " maybe": -3.0})
PAIRS = [(f"query {n}", f"passage {n}") for n in range(12)]


def config_for(url: str, *, prompt: str = "short", max_tokens: int = 350, **remote: object) -> TeacherConfig:
    values = {"kind": "remote", "model": "served", "prompt": prompt, "max_tokens": max_tokens}
    return TeacherConfig.model_validate(values | {"remote": {"url": url} | remote})


def teacher_for(endpoint: LocalEndpoint, **settings: object) -> RemoteTeacher:
    return RemoteTeacher(config_for(endpoint.url, **settings))


def always(body: object, **reply: object):
    return lambda request, number: Reply(body, **reply)


def number_in(request: Request) -> int:
    """n of "passage n" in the short prompt."""
    return int(request.prompt.split("passage ")[1].split("\n")[0])


def error_of(reply, *, times: int = 1, **settings: object) -> D2LLMError:
    """The error of judging one pair, which took this many requests."""
    with local_endpoint(reply) as endpoint:
        teacher = teacher_for(endpoint, patience_minutes=0, **settings)
        with pytest.raises(D2LLMError) as caught:
            teacher.judge(PAIRS[:1], "asymmetric")
        assert len(endpoint.requests) == times
    assert "served" in str(caught.value) or endpoint.url in str(caught.value)
    return caught.value


# --- question and answer


def test_the_question_is_the_prompt_sets_and_one_token_is_asked_for():
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = teacher_for(endpoint, top_logprobs=7)
        assert isinstance(teacher, Judge)
        judged = teacher.judge([("how cats sleep", "Cats nap.")], "asymmetric", with_features=True)
    (request,) = endpoint.requests
    assert request.path == "/v1/completions"
    assert request.body == {
        "model": "served",
        "prompt": "Query: how cats sleep\nPassage: Cats nap.\nDoes the passage answer the query?",
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 7,
    }
    assert "Authorization" not in request.headers
    assert judged.log_odds.tolist() == [1.0]
    assert judged.log_odds.dtype == np.float32
    assert judged.features is None
    assert (judged.num_truncated, judged.num_bounded, judged.num_undecided) == (0, 0, 0)


def test_chat_asks_the_same_as_a_users_message():
    with local_endpoint(always(chat_completion({" no": -0.25, " yes": -2.0}))) as endpoint:
        judged = teacher_for(endpoint, api="chat", top_logprobs=5).judge([("a", "b")], "asymmetric")
    (request,) = endpoint.requests
    assert request.path == "/v1/chat/completions"
    content = "Query: a\nPassage: b\nDoes the passage answer the query?"
    assert request.body == {
        "model": "served",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert judged.log_odds.tolist() == [-1.75]


def test_completions_may_be_answered_in_the_form_of_chat():
    with local_endpoint(always(chat_completion({" yes": -0.25, " no": -2.0}))) as endpoint:
        assert teacher_for(endpoint).judge([("a", "b")], "symmetric").log_odds.tolist() == [1.75]


PROMPT = Prompt("", "", "", " yes", " no")


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({" yes": -1.0, " no": -3.0}, (2.0, True)),
        ({"▁yes": -1.0, "Ġno": -3.0}, (2.0, True)),  # as vocabularies write the space
        ({" Yes": -0.1, " yes": -1.0, " no": -3.0, "no": -0.2}, (2.0, True)),  # other tokens are other answers
        ({" Yes": -0.1, " no": -2.0, " x": -5.0}, (-3.0, False)),
        ({" yes": -0.5, " x": -4.0}, (3.5, False)),
        ({"yes": -0.5, " Yes": -1.0, " NO": -2.0}, (None, False)),
        ({}, (None, False)),
    ],
)
def test_exactly_the_prompts_answer_words_count(top, expected):
    assert read_log_odds(top, PROMPT) == expected


@given(
    st.lists(st.floats(-8, 8), min_size=4, max_size=12, unique=True),
    st.integers(2, 12),
)
def test_a_bound_is_never_on_the_wrong_side(logits, top_n):
    whole = np.array(logits) - np.log(np.exp(logits).sum())
    named = dict(zip([" yes", " no", *map(str, range(len(logits) - 2))], whole.tolist(), strict=True))
    top = dict(sorted(named.items(), key=lambda item: -item[1])[:top_n])
    truth = logits[0] - logits[1]
    value, is_exact = read_log_odds(top, PROMPT)
    if {" yes", " no"} <= set(top):
        assert is_exact
        assert value == pytest.approx(truth, abs=1e-9)
    elif " yes" in top:
        assert not is_exact
        assert -1e-9 <= value <= truth + 1e-9
    elif " no" in top:
        assert not is_exact
        assert truth - 1e-9 <= value <= 1e-9
    else:
        assert value is None


def half_known(request: Request, number: int) -> Reply:
    """Passages 0, 3, 6 ... lack no, 1, 4, ... lack both, the others have both."""
    kind = number_in(request) % 3
    return Reply(completion([{" yes": -1.0, "x": -4.0}, {"x": -0.1, "Y": -1.0}, {" yes": -3.0, " no": -1.0}][kind]))


def test_what_the_endpoint_leaves_unsaid_is_counted(caplog):
    with local_endpoint(half_known) as endpoint:
        teacher = teacher_for(endpoint, unanswered="undecided")
        with caplog.at_level(logging.WARNING):
            judged = teacher.judge(PAIRS, "asymmetric")
            teacher.judge(PAIRS, "asymmetric")
    assert judged.log_odds.tolist() == [3.0, 0.0, -2.0] * 4
    assert (judged.num_bounded, judged.num_undecided) == (4, 4)
    (record,) = caplog.records  # once, not at every call
    assert "of 12 pairs" in record.getMessage()
    assert "4 log-odds are bounds" in record.getMessage()
    assert "4 undecided" in record.getMessage()


def test_pairs_without_an_answer_are_an_error_by_default():
    with local_endpoint(half_known) as endpoint, pytest.raises(AnswerTokenError) as caught:
        teacher_for(endpoint).judge(PAIRS, "asymmetric")
    message = str(caught.value)
    assert "for 4 of 12 pairs neither ' yes' nor ' no' is among the 20 likeliest" in message
    assert "'query 1'" in message
    assert "['x', 'Y']" in message
    assert 'unanswered = "undecided"' in message


def test_an_answer_that_ends_at_once_is_no_answer():
    error = error_of(always(completion({})))
    assert isinstance(error, AnswerTokenError)
    assert "'query 0', where the model ended its text without a word" in str(error)


# --- many requests


def answer_by_number(request: Request, number: int) -> Reply:
    value = float(number_in(request))
    return Reply(completion({" yes": -1.0, " no": -1.0 - value}), delay=random.Random(number).uniform(0, 0.03))


def test_answers_belong_to_their_pairs_and_requests_under_way_are_bounded():
    done: list[int] = []
    with local_endpoint(answer_by_number) as endpoint:
        judged = teacher_for(endpoint, concurrency=3).judge(PAIRS, "asymmetric", advance=done.append)
        assert judged.log_odds.tolist() == [float(n) for n in range(12)]
        assert endpoint.most_at_once == 3
        assert sum(done) == 12
        assert len(teacher_for(endpoint).judge([], "asymmetric").log_odds) == 0


def test_pairs_of_one_query_go_out_one_after_the_other():
    pairs = [(f"query {n % 3}", f"passage {n}") for n in range(9)]
    with local_endpoint(answer_by_number) as endpoint:
        judged = teacher_for(endpoint, concurrency=1).judge(pairs, "asymmetric")
    assert judged.log_odds.tolist() == [float(n) for n in range(9)]
    assert [number_in(request) for request in endpoint.requests] == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_a_rate_limit_holds_across_calls():
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = teacher_for(endpoint, requests_per_minute=600)
        teacher.judge(PAIRS[:4], "asymmetric")
        teacher.judge(PAIRS[:3], "asymmetric")
    times = [request.when for request in endpoint.requests]
    assert len(times) == 7
    # A slow machine may shift one arrival against the next, but not the whole.
    assert times[-1] - times[0] >= 0.55
    assert min(np.diff(times)) > 0.05


def test_it_works_inside_a_notebooks_event_loop():
    async def cell(teacher: RemoteTeacher) -> list[float]:
        return teacher.judge(PAIRS[:2], "asymmetric").log_odds.tolist()

    with local_endpoint(always(PLAIN)) as endpoint:
        assert asyncio.run(cell(teacher_for(endpoint))) == [1.0, 1.0]


def test_ctrl_c_does_not_wait_for_what_is_under_way():
    with local_endpoint(always(PLAIN, delay=8)) as endpoint:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            teacher_for(endpoint).judge(PAIRS, "asymmetric")
        assert time.monotonic() - started < 4


# --- an endpoint in trouble


def wait_of_two_seconds(kind: str) -> str:
    # A date has whole seconds: up to one is lost.
    return "1" if kind == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_pause_that_the_endpoint_names_holds_for_all_requests(kind: str):
    def reply(request: Request, number: int) -> Reply:
        if number == 1:
            return Reply({"error": "slow down"}, status=429, headers={"Retry-After": wait_of_two_seconds(kind)})
        return Reply(PLAIN, delay=0.05)

    with local_endpoint(reply) as endpoint:
        teacher = teacher_for(endpoint, concurrency=2)
        assert teacher.judge(PAIRS[:6], "asymmetric").log_odds.tolist() == [1.0] * 6
    assert len(endpoint.requests) == 7
    assert teacher.endpoint.num_retries == 1
    after = [request.when - endpoint.requests[1].when for request in endpoint.requests[2:]]
    assert min(after) > 0.9


@pytest.mark.parametrize("trouble", ["status", "hang_up", "timeout"])
def test_an_endpoint_that_fails_for_a_while_is_tried_again(trouble: str, monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append(high) or 0.01)
    bad = {
        "status": Reply({"error": "loading"}, status=503),
        "hang_up": Reply(hang_up=True),
        "timeout": Reply(PLAIN, delay=0.6),
    }
    with local_endpoint(lambda request, number: bad[trouble] if 1 <= number <= 4 else Reply(PLAIN)) as endpoint:
        teacher = teacher_for(endpoint, concurrency=1, timeout_seconds=0.3)
        assert teacher.judge(PAIRS[:3], "asymmetric").log_odds.tolist() == [1.0] * 3
    assert len(endpoint.requests) == 7
    assert teacher.endpoint.num_retries == 4
    assert limits == [1, 2, 4, 8]


def test_back_off_grows_to_a_minute(monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append(high) or 0.001)
    with local_endpoint(lambda request, number: Reply(PLAIN) if number == 9 else Reply("busy", status=500)) as endpoint:
        teacher_for(endpoint).judge(PAIRS[:1], "asymmetric")
    assert limits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_patience_ends():
    started = time.monotonic()
    busy = Reply({"error": "no room"}, status=503, headers={"Retry-After": "0.1"})
    with (
        local_endpoint(lambda request, number: busy) as endpoint,
        pytest.raises(ModelError, match=r"answers 503: .*no room.*tried again for up to 0.01 minutes") as caught,
    ):
        teacher_for(endpoint, patience_minutes=0.01).judge(PAIRS[:1], "asymmetric")
    assert 0.4 < time.monotonic() - started < 3
    assert 4 <= len(endpoint.requests) <= 7
    assert "goes on with what is not finished" in str(caught.value)


def test_an_address_where_nobody_answers_is_an_error_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        started = time.monotonic()
        with pytest.raises(ModelError, match=rf"^{url}/completions cannot be reached: .*start the server there"):
            RemoteTeacher.load(config_for(url))
        assert time.monotonic() - started < 5


def test_a_server_that_goes_away_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.05)
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = RemoteTeacher.load(config_for(endpoint.url, patience_minutes=0.01))
    with pytest.raises(ModelError, match=r"no connection .*tried again"):
        teacher.judge(PAIRS[:1], "asymmetric")
    assert teacher.endpoint.num_retries > 3


def test_loading_asks_once():
    with local_endpoint(always(PLAIN)) as endpoint:
        RemoteTeacher.load(config_for(endpoint.url), device="cuda", dtype="bfloat16")
        assert len(endpoint.requests) == 1
    error = None
    with local_endpoint(always({"detail": "no such key"}, status=401)) as endpoint:
        with pytest.raises(ModelError, match="refuses access") as caught:
            RemoteTeacher.load(config_for(endpoint.url))
        error = str(caught.value)
    assert "set teacher.remote.api_key_env" in error


# --- keys


def test_a_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    with caplog.at_level(logging.DEBUG), local_endpoint(always(PLAIN)) as endpoint:
        teacher = teacher_for(endpoint, api_key_env="SOME_KEY")
        teacher.judge(PAIRS[:1], "asymmetric")
        assert endpoint.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        endpoint.reply = lambda request, number: Reply(f"no: {request.headers['Authorization']}", status=403)
        with pytest.raises(ModelError) as caught:
            teacher.judge(PAIRS[:1], "asymmetric")
        assert len(endpoint.requests) == 2  # a refused key is not tried again
    message = str(caught.value)
    assert "refuses the key (403): 'no: Bearer ***'; check the key in SOME_KEY" in message
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(teacher) + repr(teacher.config)
    assert KEY not in shown
    assert KEY not in teacher.config.model_dump_json()


@pytest.mark.parametrize(
    ("value", "problem"), [(None, "is not set"), ("  ", "is not set"), ("schlüssel", "characters")]
)
def test_no_usable_key(monkeypatch: pytest.MonkeyPatch, value: str | None, problem: str):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(InputError, match=f"SOME_KEY .*{problem}"):
        RemoteTeacher(config_for("http://127.0.0.1:9/v1", api_key_env="SOME_KEY"))


# --- refusals


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
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
        (Reply(completion({" yes": -0.1})), ModelError, "only that of the token it chose"),
        (Reply("<html>hello</html>"), ModelError, "give the address of an OpenAI-compatible endpoint"),
        (Reply({"choices": []}), ModelError, "no completion"),
        (Reply([]), ModelError, "no completion"),
        (Reply("", 307, {"Location": "/elsewhere"}), ModelError, "refuses the request (307)"),
        (Reply({"error": "something else"}, 422), ModelError, '\'{"error": "something else"}\''),
    ],
)
def test_refusals_say_what_to_do_and_are_not_tried_again(reply: Reply, kind: type, says: str):
    error = error_of(lambda request, number: reply)
    assert type(error) is kind
    assert says in str(error)


def test_long_answers_are_quoted_in_part():
    assert len(str(error_of(always("x" * 10_000, status=418)))) < 600


def test_configurations_that_cannot_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(InputError, match=r"write \[teacher.remote\] with url"):
        RemoteTeacher(TeacherConfig(kind="remote", model="served"))
    section = '\ntemplate = "{query} {passage}?"\nyes = " ok"\nno = " ok"\n'
    (tmp_path / "same.toml").write_text(f"[symmetric]{section}[asymmetric]{section}", encoding="utf-8")
    with pytest.raises(AnswerTokenError, match="both ' ok'"):
        RemoteTeacher(config_for("http://h/v1", prompt=str(tmp_path / "same.toml")))
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(MissingExtraError, match=r"d2llm\[remote\]"):
        RemoteTeacher(config_for("http://h/v1"))


# --- length


def test_without_a_tokenizer_characters_are_counted():
    prompt = load_prompt("short", "asymmetric")
    room = int(40 * 2.5) - len(prompt.head + prompt.middle + prompt.tail)
    pairs = [
        ("q" * 5, "p" * (room - 5)),  # just fits
        ("q" * 5, "p" * (room - 4)),
        ("q" * 300, "p" * 10),
        ("q" * 300, "p" * 300),
        ("", ""),
    ]
    with local_endpoint(always(PLAIN)) as endpoint:
        judged = teacher_for(endpoint, max_tokens=40, characters_per_token=2.5, concurrency=1).judge(
            pairs, "asymmetric"
        )
    assert judged.num_truncated == 3
    kept = [(text.count("q"), text.count("p")) for text in (prompt_slots(p, prompt) for p in endpoint.prompts)]
    half = room // 2
    assert kept == [(5, room - 5), (5, room - 5), (room - 10, 10), (half, room - half), (0, 0)]
    assert [len(text) for text in endpoint.prompts[:4]] == [100] * 4


def prompt_slots(text: str, prompt: Prompt) -> str:
    return text.removeprefix(prompt.head).removesuffix(prompt.tail).replace(prompt.middle, " ")


def test_with_a_tokenizer_the_same_is_kept_as_by_a_local_teacher(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")  # no weights beside it
    long = " ".join(TEXTS * 3)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[0], long), (long, TEXTS[1]), (long, long)]
    local = Teacher.load(tiny_teacher_config(folder, max_tokens=100), device="cpu", dtype="float32")
    ids, num_truncated = local.tokenize(pairs, "asymmetric")
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = teacher_for(endpoint, tokenizer=str(tmp_path / "tokenizer"), max_tokens=100, concurrency=1)
        judged = teacher.judge(pairs, "asymmetric")
    assert judged.num_truncated == num_truncated == 3
    sent = {text: prompt_slots(text, teacher.prompts["asymmetric"]) for text in endpoint.prompts}
    assert sorted(sent.values()) == sorted(
        prompt_slots(local.tokenizer.decode(one[1:]), teacher.prompts["asymmetric"]) for one in ids
    )
    assert f"{TEXTS[0]} {TEXTS[1]}" in sent.values()


@pytest.mark.parametrize(("less", "expected"), [(0, 0), (-3, 0), (1, 12)])
def test_what_the_server_cuts_by_itself_is_counted(tmp_path: Path, less: int, expected: int):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()

    def reply(request: Request, number: int) -> Reply:
        read = len(tokenizer(request.prompt)["input_ids"]) - less
        return Reply(completion({" yes": -1.0, " no": -1.0}, num_prompt_tokens=read))

    with local_endpoint(reply) as endpoint:
        judged = teacher_for(endpoint, tokenizer=str(tmp_path)).judge(PAIRS, "asymmetric")
    assert judged.num_truncated == expected
    assert judged.num_tokens == sum(len(tokenizer(text)["input_ids"]) - less for text in endpoint.prompts)


def test_a_prompt_that_fills_the_limit():
    with pytest.raises(InputError, match="prompt 'paper' alone fills"):
        RemoteTeacher(config_for("http://h/v1", prompt="paper", max_tokens=60)).judge(PAIRS, "asymmetric")


# --- identity


def test_the_address_and_the_pace_are_no_part_of_the_identity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    one = config_for("http://one/v1")
    teacher = RemoteTeacher(one)
    same = [
        config_for("https://two:99/v1", concurrency=3, requests_per_minute=9, unanswered="undecided"),
        config_for("http://one/v1", api_key_env="SOME_KEY", timeout_seconds=3, patience_minutes=1),
    ]
    identity = RemoteTeacher.identify(one)
    assert identity == RemoteTeacher.identify(same[0]) == RemoteTeacher.identify(same[1])
    assert identity.fingerprint == teacher.fingerprint
    assert dict(identity.prompts) == {task: teacher.prompt_fingerprint(task) for task in ("symmetric", "asymmetric")}
    assert identity.prompts["symmetric"] != identity.prompts["asymmetric"]

    others = [one.model_copy(update={"model": "other"}), config_for("http://one/v1", revision="2026-11")]
    assert len({RemoteTeacher.identify(config).fingerprint for config in [one, *others]}) == 3
    asked_otherwise = [
        config_for("http://one/v1", prompt="paper"),
        config_for("http://one/v1", max_tokens=300),
        config_for("http://one/v1", top_logprobs=5),
        config_for("http://one/v1", api="chat"),
        config_for("http://one/v1", characters_per_token=2),
        config_for("http://one/v1", tokenizer="anything"),
    ]
    assert len({RemoteTeacher.identify(config).prompts["asymmetric"] for config in [one, *asked_otherwise]}) == 7
    assert {RemoteTeacher.identify(config).fingerprint for config in asked_otherwise} == {identity.fingerprint}
