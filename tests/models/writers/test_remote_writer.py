"""The remote writer against an endpoint on a real socket; its requests have tests of their own."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError, RecipeError
from d2llm.core.types import Passage
from d2llm.fitting.write_queries import DraftStore, WritingBudget, passage_hash, write_queries
from d2llm.models.remote import endpoint as remote_endpoint
from d2llm.models.writers.remote import RemoteWriter
from d2llm.models.writers.writer import Assignment, Writer, load_writer, write_until_error
from d2llm.recipe import WriterConfig, WriterEndpointConfig
from d2llm.recipe.recipe import named_writer
from local_endpoint import LocalEndpoint, Reply, Request, always, chat, local_endpoint
from tiny_models import TEXTS, tiny_tokenizer
from waiting import until

TEA = Assignment("Boiling water makes green tea bitter.", "question", 2, title="Green tea", seed=7)
ADDRESS = "http://h/v1"


def config(url: str, *, remote: dict[str, Any] | None = None, **settings: Any) -> WriterConfig:
    values = {"kind": "remote", "model": "served", "remote": {"url": url} | (remote or {})}
    return WriterConfig.model_validate(values | settings)


def writer(endpoint: LocalEndpoint, **settings: Any) -> RemoteWriter:
    return RemoteWriter(config(endpoint.url, **settings))


def test_a_request_sends_the_prompt_and_the_sampling():
    with local_endpoint(always(chat("1. why is it bitter?\n2. how hot?\n"))) as endpoint:
        model = writer(endpoint, temperature=0.5, top_p=0.9, max_new_tokens=30)
        assert isinstance(model, Writer)
        [written] = model.write([TEA])
    [request] = endpoint.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "served",
        "messages": [{"role": "user", "content": model.prompts["question"].fill(TEA)}],
        "max_tokens": 60,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
    }
    assert written.queries == ("why is it bitter?", "how hot?")
    assert (written.num_prompt_tokens, written.num_written_tokens, written.num_dropped) == (100, 20, 0)
    assert not written.truncated
    assert not written.tokens_are_estimated
    assert written.problem is None


def test_completions_are_read_and_fields_can_be_changed():
    body = {"choices": [{"text": "green tea bitter\n", "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    remote = {"api": "completions", "leave_out": ["seed", "max_tokens"], "extra_body": {"max_completion_tokens": 99}}
    with local_endpoint(always(body)) as endpoint:
        [written] = writer(endpoint, remote=remote).write([Assignment("Tea.", "keywords")])
    [request] = endpoint.requests
    assert request.path == "/v1/completions"
    assert set(request.body) == {"model", "prompt", "temperature", "top_p", "max_completion_tokens"}
    assert written.queries == ("green tea bitter",)
    assert written.num_prompt_tokens == 3
    assert written.num_written_tokens == 6  # 17 characters at 3 a token
    assert written.tokens_are_estimated


def test_results_are_in_the_order_of_the_assignments():
    four_at_once = threading.Barrier(4, timeout=60)

    def reply(request: Request, number: int) -> Reply:
        four_at_once.wait()
        topic = request.prompt.split("about topic ")[1].split(".")[0]
        return Reply(chat(f"what is topic {topic}?"), delay=0.02 * (number % 3))

    done: list[int] = []
    assignments = [Assignment(f"This is about topic {n}.", "question") for n in range(12)]
    with local_endpoint(reply) as endpoint:
        written = writer(endpoint, remote={"concurrency": 4}).write(assignments, advance=done.append)
        assert endpoint.most_at_once == 4
        assert writer(endpoint).write([]) == []
    assert [item.queries for item in written] == [(f"what is topic {n}?",) for n in range(12)]
    assert sum(done) == 12


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply(chat("")), "the answer is empty"),
        (Reply(chat(None, reason="length")), "the answer is empty"),
        (Reply(chat("Sure! Here you are:")), "no query in the answer 'Sure! Here you are:'"),
        (Reply(chat("what is", reason="length")), "ended at the length limit"),
        (Reply(chat(None, refusal="no")), "the endpoint refuses to answer: no"),
        (Reply(chat("", reason="content_filter")), "refuses to answer: its content filter"),
        (Reply({"error": {"code": "content_filter"}}, 400), r"refuses this text \(400\): .*content_filter"),
    ],
)
def test_an_answer_without_queries_is_a_problem_not_an_error(reply: Reply, problem: str):
    fine = Reply(chat("what is tea?"))
    replies = [fine, reply, fine]
    with local_endpoint(lambda request, number: replies[number]) as endpoint:
        written = writer(endpoint, remote={"concurrency": 1}).write([TEA] * 3)
    assert [item.queries for item in written] == [("what is tea?",), (), ("what is tea?",)]
    assert re.search(problem, written[1].problem or "")
    assert written[0].problem is written[2].problem is None


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (Reply({"error": "The model `served` does not exist"}, 404), ModelNotFoundError, "check writer.model and"),
        (Reply({"error": "no"}, 401), ModelError, "set writer.remote.api_key_env"),
        (Reply({"error": "context length exceeded"}, 400), InputError, "lower writer.max_passage_tokens"),
        (Reply({"error": "Unsupported parameter: 'max_tokens'"}, 400), ModelError, r"check \[writer.remote\]"),
        (Reply({"choices": []}), ModelError, "did not answer with a completion"),
        (Reply({"choices": [{"message": {"content": [1]}}]}), ModelError, "did not answer with a completion"),
    ],
)
def test_refusals_name_the_writers_settings(reply: Reply, kind: type[Exception], message: str):
    with local_endpoint(lambda request, number: reply) as endpoint, pytest.raises(kind, match=message):
        load_writer(config(endpoint.url))
    assert len(endpoint.requests) == 1


def test_estimated_tokens_are_reported_once(caplog: pytest.LogCaptureFixture):
    with local_endpoint(always(chat("what is tea?", usage=None))) as endpoint, caplog.at_level(logging.WARNING):
        model = writer(endpoint, remote={"characters_per_token": 0.5})
        [written] = model.write([TEA])
        model.write([TEA])
    assert written.tokens_are_estimated
    assert written.num_written_tokens == 24  # 12 characters at half a character a token
    assert written.num_prompt_tokens == 2 * len(endpoint.prompts[0])
    [record] = caplog.records
    assert "they are estimated at 0.5 characters each" in record.getMessage()


def test_passages_are_cut_and_counted(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    long = " ".join(TEXTS)
    with local_endpoint(always(chat("what is it?"))) as endpoint:
        written = writer(endpoint, remote={"tokenizer": str(tmp_path)}, max_passage_tokens=16).write(
            [Assignment(long, "question"), Assignment(TEXTS[0], "question")]
        )
    assert [item.truncated for item in written] == [True, False]
    [cut] = {prompt.split("<passage>\n")[1].split("\n</passage>")[0] for prompt in endpoint.prompts} - {TEXTS[0]}
    assert long.startswith(cut)
    assert len(tiny_tokenizer()(cut, add_special_tokens=False)["input_ids"]) <= 16


def test_a_writer_without_an_address_is_rejected():
    with pytest.raises(RecipeError, match=r"the writer 'remote:served': writer.remote is missing; set it"):
        named_writer("remote:served")


def test_the_identity_ignores_address_key_pace_and_price():
    base = RemoteWriter(config(ADDRESS)).fingerprint
    paced = {"url": "http://other/v1", "concurrency": 2, "requests_per_minute": 3, "patience_minutes": 1}
    assert RemoteWriter(config(ADDRESS, remote=paced | {"price_per_million_prompt_tokens": 1})).fingerprint == base
    others = [
        {"model": "other"},
        {"temperature": 0.1},
        {"top_p": 0.5},
        {"max_new_tokens": 10},
        {"max_passage_tokens": 99},
        {"remote": {"revision": "2026-11"}},
        {"remote": {"api": "completions"}},
        {"remote": {"extra_body": {"thinking": False}}},
        {"remote": {"leave_out": ["seed"]}},
        {"remote": {"characters_per_token": 1}},
    ]
    assert len({base, *(RemoteWriter(config(ADDRESS, **settings)).fingerprint for settings in others)}) == 11


def test_the_cost_needs_both_prices():
    prices = {"price_per_million_prompt_tokens": 0.5, "price_per_million_written_tokens": 2.0}
    assert WriterEndpointConfig(url=ADDRESS, **prices).cost(3_000_000, 500_000) == pytest.approx(2.5)
    assert WriterEndpointConfig(url=ADDRESS, price_per_million_prompt_tokens=0.5).cost(1, 1) is None
    assert WriterEndpointConfig(url=ADDRESS).cost(1, 1) is None


def empty_after(number: int) -> Callable[[Request, int], Reply]:
    """So many answers, and then the account is empty."""

    def reply(request: Request, index: int) -> Reply:
        if index >= number:
            return Reply({"error": "the account is empty"}, 403)
        return Reply(chat(f"what is {request.prompt.split('about topic ')[-1].split()[0]} about?"))

    return reply


def test_an_error_loses_no_query_that_was_written(tmp_path: Path):
    passages = [Passage(f"p{n}", f"This passage is about topic t{n} and its care in winter. " * 3) for n in range(8)]
    settings: dict[str, Any] = {"kinds": {"question": 1.0}, "budget": WritingBudget()}
    with local_endpoint(empty_after(5)) as endpoint:
        model = writer(endpoint, remote={"concurrency": 1, "revision": "1"})
        store = DraftStore(tmp_path, model.fingerprint)
        with pytest.raises(ModelError, match="the account is empty"):
            write_queries(passages, model, store, config=model.config, **settings)
        assert len(DraftStore(tmp_path, model.fingerprint)) == 5
        endpoint.reply = empty_after(99)
        report = write_queries(passages, model, store, config=model.config, **settings)
        assert len(endpoint.requests) == 5 + 1 + 3
    assert report.num_queries == len(DraftStore(tmp_path, model.fingerprint)) == 8
    asked = endpoint.prompts[:5] + endpoint.prompts[6:]
    assert len({*asked}) == 8
    for passage in passages:
        draft = store.get((passage_hash(passage), "question"))
        assert draft is not None
        assert draft.queries == (f"what is {passage.id.replace('p', 't')} about?",)


def test_ctrl_c_loses_no_answer(monkeypatch: pytest.MonkeyPatch):
    released, waits = threading.Event(), remote_endpoint.wait

    def reply(request: Request, number: int) -> Reply:
        if number >= 3:
            released.wait(60)
        return Reply(chat("what is tea?"))

    def interrupted(running: Any, timeout: float) -> Any:
        until(lambda: running[0].done() or len(endpoint.requests) > 3)
        if not running[0].done():
            raise KeyboardInterrupt
        return waits(running, timeout=timeout)

    with local_endpoint(reply) as endpoint:
        model = writer(endpoint, remote={"concurrency": 1})
        monkeypatch.setattr(remote_endpoint, "wait", interrupted)
        written = write_until_error(model, [TEA] * 6)
        released.set()
    assert isinstance(written.error, KeyboardInterrupt)
    assert [*written.by_index] == [0, 1, 2]
