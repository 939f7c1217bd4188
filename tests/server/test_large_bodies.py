"""Large bodies: what an attacker can send with a read key, and how long others wait for it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from attacked_server import AttackedServer, attacked
from d2llm.core.names import did_you_mean
from d2llm.server.large_bodies import num_values, read_json
from d2llm.server.schemas import SearchRequest

LONGEST_WAIT = (
    5.0  # seconds on a busy machine; the first form of the first attack took more than a minute on an idle one
)
MAX_BYTES = 1 << 30
SIZE = 12 << 20


def many(head: bytes, item: bytes, tail: bytes, size: int = SIZE) -> bytes:
    return head + b",".join([item] * (size // (len(item) + 1))) + tail


def names(number: int) -> bytes:
    return b",".join(b'"n%x":1' % index for index in range(number))


ATTACKS = {
    "unknown names, .9 MB": ("/v1/search", lambda: b'{"query":"x",' + names(100_000) + b"}", 422),
    "unknown names, 16 MB": ("/v1/search", lambda: b'{"query":"x",' + names(1_300_000) + b"}", 422),
    "unknown names in OpenAI's interface": (
        "/v1/embeddings",
        lambda: b'{"input":"x","model":"m",' + names(500_000) + b"}",
        400,
    ),
    "unknown names in Cohere's interface": ("/v2/rerank", lambda: b'{"query":"x",' + names(500_000) + b"}", 422),
    "one long unknown name": ("/v1/search", lambda: b'{"query":"x","' + b"quer" * (SIZE // 4) + b'":1}', 422),
    "more values than bytes for them": ("/v1/encode", lambda: many(b'{"kind":"query","texts":[', b"[]", b"]}"), 413),
    "numbers in place of texts": ("/v1/encode", lambda: many(b'{"kind":"query","texts":[', b"1234567", b"]}"), 422),
    "objects in place of vectors": (
        "/v1/rescore",
        lambda: many(b'{"query":"x","passage_vectors":[', b'{"a": 0}', b"]}"),
        413,
    ),
    "texts in place of numbers": (
        "/v1/rescore",
        lambda: many(b'{"query":"x","passage_vectors":[[', b'"1234567"', b"]]}"),
        422,
    ),
    "half of a surrogate pair at the end": (
        "/v1/search",
        lambda: b"{" + names(1_000_000) + b',"query":"\\ud83d"}',
        422,
    ),
    "many documents of an agent": (
        "/mcp",
        lambda: many(
            b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"upsert","arguments":{"documents":[',
            b'{"id":"x","text":"a"}',
            b"]}}}",
        ),
        413,
    ),
    "a long model": ("/v1/embeddings", lambda: b'{"input":"x","model":"' + b"m" * SIZE + b'"}', 404),
    "a long filter": ("/v1/search", lambda: many(b'{"query":"x","filter":"', b"year = 1 AND year", b'"}'), 400),
    "a long id": ("/v1/explain", lambda: b'{"query":"x","passage_id":"' + b"i" * SIZE + b'"}', 422),
    "no JSON at the end": ("/v1/search", lambda: b'{"query":"x",' + names(1_000_000), 400),
}
"""A path, the body, which is made when it is sent, and the status of the answer."""


@pytest.fixture(scope="module")
def server() -> Iterator[AttackedServer]:
    with attacked() as running:
        yield running


@pytest.mark.parametrize("name", ATTACKS)
def test_others_hardly_wait_for_a_large_body(server: AttackedServer, name: str):
    path, body, status = ATTACKS[name]
    content = body()
    attack = server.under(lambda: server.post(path, content))
    assert attack.answer.status == status, attack.answer.body
    assert len(json.dumps(attack.answer.body)) < 20_000
    assert attack.longest_wait < LONGEST_WAIT
    assert attack.grown < MAX_BYTES


def test_large_bodies_are_answered_as_small_ones_are(server: AttackedServer):
    small = server.post("/v1/search", {"query": "the cat by the sea"})
    large = server.post("/v1/search", b" " * SIZE + b'{"query": "the cat by the sea"}')
    assert large.status == 200
    assert large.body["passages"] == small.body["passages"]
    width = server.get("/v1/index").body["student"]["dim"]
    vectors = [[0.5] * width, *[[0.25] * width] * 5_000]
    scores = [
        server.post("/v1/rescore", {"query": "cat", "passage_vectors": part}).body["scores"]
        for part in (vectors[:2], vectors)
    ]
    assert scores[1][:2] == pytest.approx(scores[0])
    body = {"query": "x", "documents": ["a cat"] * 2, "top_n": 1}
    answer = server.post("/rerank", b" " * 100_000 + json.dumps(body).encode())
    assert answer.body["results"][0]["index"] == 0, answer.body


def test_the_first_unknown_fields_suggest_what_may_be_meant(server: AttackedServer):
    answer = server.post("/v1/search", {"query": "x", "topk": 1, **{f"n{index}": 1 for index in range(1_000)}})
    assert answer.body["error"]["message"] == (
        "topk: there is no such field; did you mean 'top_k'? (and at least 100 more)"
    )
    assert did_you_mean("topk" * 100, SearchRequest.model_fields) == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)


MANY = [0] * 21_000  # after them, values are counted exactly, and parsed in Python


@settings(max_examples=examples(50))
@given(json_values, st.booleans())
def test_many_values_are_counted_outside_of_strings_and_parsed_alike(value: object, ascii_only: bool):
    def count(part: object) -> int:
        """Containers, which may be empty, and what is in them after the first."""
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return isinstance(part, dict | list) + max(0, len(list(parts)) - 1) + sum(map(count, parts))

    body = json.dumps([MANY, value], ensure_ascii=ascii_only).encode()
    assert num_values(body) == 1 + count([MANY, value])
    assert read_json(body) == json.loads(body)
