"""The remote teacher against an endpoint on a real socket; tests/e2e/test_remote_server.py uses a real model."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import AnswerTokenError, InputError, MissingExtraError, RecipeError
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.models.teachers.prompts import Prompt, load_prompt
from d2llm.models.teachers.remote import RemoteTeacher, read_log_odds
from d2llm.recipe.recipe import named_teacher
from local_endpoint import (
    PAIRS,
    PLAIN,
    Reply,
    Request,
    always,
    chat_completion,
    completion,
    local_endpoint,
    number_in,
    remote_config,
    remote_teacher,
)
from tiny_models import TEXTS, tiny_teacher_config, tiny_tokenizer, write_tiny_model

KEY = "sk-not-a-real-key-0123456789"

# --- requests and answers


def test_a_request_sends_the_prompt_for_a_single_token():
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint, top_logprobs=7)
        assert isinstance(teacher, PairTeacher)
        scores = teacher.score_pairs([("how cats sleep", "Cats nap.")], "asymmetric", with_features=True)
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
    assert scores.log_odds.tolist() == [1.0]
    assert scores.log_odds.dtype == np.float32
    assert scores.features is None
    assert (scores.num_truncated, scores.num_bounded, scores.num_undecided) == (0, 0, 0)


def test_a_prompt_with_spaces_is_sent_as_it_is_written():
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint, prompt="paper")
        teacher.score_pairs([("how cats sleep", "Cats nap.")], "asymmetric")
    (request,) = endpoint.requests
    assert request.body["prompt"] == load_prompt("paper", "asymmetric").fill("how cats sleep", "Cats nap.")
    assert "#Q: how cats sleep" in request.body["prompt"]
    assert "#P: Cats nap." in request.body["prompt"]


def test_chat_sends_the_prompt_as_a_user_message():
    with local_endpoint(always(chat_completion({" no": -0.25, " yes": -2.0}))) as endpoint:
        scores = remote_teacher(endpoint, api="chat", top_logprobs=5).score_pairs([("a", "b")], "asymmetric")
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
    assert scores.log_odds.tolist() == [-1.75]


def test_chat_shaped_answers_to_completions_are_read():
    with local_endpoint(always(chat_completion({" yes": -0.25, " no": -2.0}))) as endpoint:
        assert remote_teacher(endpoint).score_pairs([("a", "b")], "symmetric").log_odds.tolist() == [1.75]


PROMPT = Prompt("", "", "", " yes", " no")


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({" yes": -1.0, " no": -3.0}, (2.0, True)),
        ({"▁yes": -1.0, "Ġno": -3.0}, (2.0, True)),  # the space as vocabularies write it
        ({" Yes": -0.1, " yes": -1.0, " no": -3.0, "no": -0.2}, (2.0, True)),  # other spellings do not count
        ({" Yes": -0.1, " no": -2.0, " x": -5.0}, (-3.0, False)),
        ({" yes": -0.5, " x": -4.0}, (3.5, False)),
        ({"yes": -0.5, " Yes": -1.0, " NO": -2.0}, (None, False)),
        ({}, (None, False)),
    ],
)
def test_only_the_exact_answer_words_count(top, expected):
    assert read_log_odds(top, PROMPT) == expected


@given(st.lists(st.floats(-8, 8), min_size=4, max_size=12, unique=True), st.integers(2, 12))
def test_a_bound_is_never_on_the_wrong_side(logits, top_n):
    log_probabilities = np.array(logits) - np.log(np.exp(logits).sum())
    by_token = dict(zip([" yes", " no", *map(str, range(len(logits) - 2))], log_probabilities.tolist(), strict=True))
    top = dict(sorted(by_token.items(), key=lambda item: -item[1])[:top_n])
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


def half_answered(request: Request, number: int) -> Reply:
    """Answers for passages 0, 3, ... lack " no", those for 1, 4, ... lack both words, the others have both."""
    kind = number_in(request) % 3
    return Reply(completion([{" yes": -1.0, "x": -4.0}, {"x": -0.1, "Y": -1.0}, {" yes": -3.0, " no": -1.0}][kind]))


def test_missing_answer_words_are_counted(caplog):
    with local_endpoint(half_answered) as endpoint:
        teacher = remote_teacher(endpoint, unanswered="undecided")
        with caplog.at_level(logging.WARNING):
            scores = teacher.score_pairs(PAIRS, "asymmetric")
            teacher.score_pairs(PAIRS, "asymmetric")
    assert scores.log_odds.tolist() == [3.0, 0.0, -2.0] * 4
    assert (scores.num_bounded, scores.num_undecided) == (4, 4)
    (record,) = caplog.records  # warns once, not at every call
    assert "of 12 pairs" in record.getMessage()
    assert "4 log-odds are bounds" in record.getMessage()
    assert "4 undecided" in record.getMessage()


def test_pairs_without_an_answer_are_an_error_by_default():
    with local_endpoint(half_answered) as endpoint, pytest.raises(AnswerTokenError) as caught:
        remote_teacher(endpoint).score_pairs(PAIRS, "asymmetric")
    message = str(caught.value)
    assert "for 4 of 12 pairs neither ' yes' nor ' no' is among the 20 most likely" in message
    assert "'query 1'" in message
    assert "['x', 'Y']" in message
    assert 'unanswered = "undecided"' in message


def test_an_immediate_end_of_text_is_an_error():
    with local_endpoint(always(completion({}))) as endpoint, pytest.raises(AnswerTokenError) as caught:
        remote_teacher(endpoint).score_pairs(PAIRS[:1], "asymmetric")
    assert "'query 0', where the model ended its text at once" in str(caught.value)


def test_unusable_configurations_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"the teacher 'remote:served': teacher.remote is missing; set it"):
        named_teacher("remote:served")
    section = '\ntemplate = "{query} {passage}?"\nyes = " ok"\nno = " ok"\n'
    (tmp_path / "same.toml").write_text(f"[symmetric]{section}[asymmetric]{section}", encoding="utf-8")
    with pytest.raises(AnswerTokenError, match="both ' ok'"):
        RemoteTeacher(remote_config("http://h/v1", prompt=str(tmp_path / "same.toml")))
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(MissingExtraError, match=r"d2llm\[remote\]"):
        RemoteTeacher(remote_config("http://h/v1"))


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
        scores = remote_teacher(endpoint, max_tokens=40, characters_per_token=2.5, concurrency=1).score_pairs(
            pairs, "asymmetric"
        )
    assert scores.num_truncated == 3
    kept = [(text.count("q"), text.count("p")) for text in (prompt_slots(p, prompt) for p in endpoint.prompts)]
    half = room // 2
    assert kept == [(5, room - 5), (5, room - 5), (room - 10, 10), (half, room - half), (0, 0)]
    assert [len(text) for text in endpoint.prompts[:4]] == [100] * 4


def prompt_slots(text: str, prompt: Prompt) -> str:
    return text.removeprefix(prompt.head).removesuffix(prompt.tail).replace(prompt.middle, " ")


def test_a_tokenizer_truncates_like_a_local_teacher(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")  # no weights beside it
    long = " ".join(TEXTS * 3)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[0], long), (long, TEXTS[1]), (long, long)]
    local = CausalTeacher.load(tiny_teacher_config(folder, max_tokens=100), device="cpu", dtype="float32")
    ids, num_truncated = local.tokenize(pairs, "asymmetric")
    with local_endpoint(always(PLAIN)) as endpoint:
        teacher = remote_teacher(endpoint, tokenizer=str(tmp_path / "tokenizer"), max_tokens=100, concurrency=1)
        scores = teacher.score_pairs(pairs, "asymmetric")
    assert scores.num_truncated == num_truncated == 3
    sent = {text: prompt_slots(text, teacher.prompts["asymmetric"]) for text in endpoint.prompts}
    assert sorted(sent.values()) == sorted(
        prompt_slots(local.tokenizer.decode(row[1:]), teacher.prompts["asymmetric"]) for row in ids
    )
    assert f"{TEXTS[0]} {TEXTS[1]}" in sent.values()


@pytest.mark.parametrize(("num_cut", "expected"), [(0, 0), (-3, 0), (1, 12)])
def test_truncation_by_the_server_is_counted(tmp_path: Path, num_cut: int, expected: int):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()

    def reply(request: Request, number: int) -> Reply:
        num_read = len(tokenizer(request.prompt)["input_ids"]) - num_cut
        return Reply(completion({" yes": -1.0, " no": -1.0}, num_prompt_tokens=num_read))

    with local_endpoint(reply) as endpoint:
        scores = remote_teacher(endpoint, tokenizer=str(tmp_path)).score_pairs(PAIRS, "asymmetric")
    assert scores.num_truncated == expected
    assert scores.num_tokens == sum(len(tokenizer(text)["input_ids"]) - num_cut for text in endpoint.prompts)


def test_a_prompt_that_fills_max_tokens_is_rejected():
    with pytest.raises(InputError, match="prompt 'paper' alone fills"):
        RemoteTeacher(remote_config("http://h/v1", prompt="paper", max_tokens=60)).score_pairs(PAIRS, "asymmetric")


# --- identity


def test_the_identity_ignores_address_key_and_pace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    base = remote_config("http://one/v1")
    teacher = RemoteTeacher(base)
    equivalent = [
        remote_config("https://two:99/v1", concurrency=3, requests_per_minute=9, unanswered="undecided"),
        remote_config("http://one/v1", api_key_env="SOME_KEY", timeout_seconds=3, patience_minutes=1),
    ]
    identity = RemoteTeacher.identify(base)
    assert identity == RemoteTeacher.identify(equivalent[0]) == RemoteTeacher.identify(equivalent[1])
    assert identity.fingerprint == teacher.fingerprint
    assert dict(identity.prompts) == {task: teacher.prompt_fingerprint(task) for task in ("symmetric", "asymmetric")}
    assert identity.prompts["symmetric"] != identity.prompts["asymmetric"]

    others = [base.model_copy(update={"model": "other"}), remote_config("http://one/v1", revision="2026-11")]
    assert len({RemoteTeacher.identify(config).fingerprint for config in [base, *others]}) == 3
    other_prompts = [
        remote_config("http://one/v1", prompt="paper"),
        remote_config("http://one/v1", max_tokens=300),
        remote_config("http://one/v1", top_logprobs=5),
        remote_config("http://one/v1", api="chat"),
        remote_config("http://one/v1", characters_per_token=2),
        remote_config("http://one/v1", tokenizer="anything"),
    ]
    assert len({RemoteTeacher.identify(config).prompts["asymmetric"] for config in [base, *other_prompts]}) == 7
    assert {RemoteTeacher.identify(config).fingerprint for config in other_prompts} == {identity.fingerprint}
