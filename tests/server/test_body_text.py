"""Request bodies must be UTF-8 without lone surrogates, whether these are escaped or raw bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.server.large_bodies import problem_of_text
from tiny_app import tiny_client

LONE_SURROGATE = "\ud83d"
# Building blocks of JSON strings: lone surrogates, pairs, and text that only looks like them.
PIECES = [r"\\", r"\ud83d", r"\uDFFF", "ud83d", "udc00", r"\u0041", r"\"", "😀"]


def has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@example(r"\\ud83d\udc00", False)  # text that looks like a high surrogate, then a lone low one
@example(r"\ud83d\\udc00", True)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.booleans())
def test_the_check_agrees_with_parsing_the_body(content: str, as_name: bool):
    body = f'{{"a": [1, {{"{content}": null}}]}}' if as_name else f'{{"a": [1, {{"b": "{content}"}}]}}'
    assert (problem_of_text(body.encode()) is not None) == has_lone_surrogate(json.loads(body))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(st.characters()) | st.just(LONE_SURROGATE),
        lambda part: st.lists(part) | st.dictionaries(st.text(st.characters()), part),
    )
)
def test_the_check_agrees_for_any_value(value: Any):
    problem = problem_of_text(json.dumps(value).encode())
    assert (problem is not None) == has_lone_surrogate(value)
    assert problem is None or not has_lone_surrogate(problem.message)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (LONE_SURROGATE, None),
        ({LONE_SURROGATE: 1}, None),
        ({"query": f"a {LONE_SURROGATE}"}, "query"),
        ({"passages": [{"id": "a"}, {"id": "b", "title": LONE_SURROGATE}]}, "passages.1.title"),
        ({"passages": [{"metadata": {"a": 1, LONE_SURROGATE: None}}]}, "passages.0.metadata"),
        ({"passages": [{"metadata": {"a": LONE_SURROGATE}}]}, "passages.0.metadata.a"),
        ({"texts": ["a", [1, 2, LONE_SURROGATE]]}, "texts.1.2"),
    ],
)
def test_the_error_names_the_field(value: Any, field: str | None):
    problem = problem_of_text(json.dumps(value).encode())
    assert problem is not None
    assert (problem.status, problem.field) == (422, field)
    assert "\\ud83d" in problem.message
    assert "surrogate" in problem.message
    assert problem.message.startswith(f"{field}: " if field else "'")


def test_invalid_json_is_left_to_the_route():
    assert problem_of_text(b'{"a": "\\ud83d"') is None


def test_a_body_nested_too_deeply_is_refused():
    problem = problem_of_text(b'{"a": "\\ud83d", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert problem is not None
    assert problem.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"texts": ["\xed\xa0\xbd"]}',  # a lone surrogate as raw bytes
        b'{"texts": ["\xe9"]}',
        '{"texts": ["a"]}'.encode("utf-16"),
        '{"texts": ["a"]}'.encode("utf-16-le"),
        '{"texts": ["\ud800\x80"]}'.encode("utf-16-le", "surrogatepass"),  # valid UTF-8, lone surrogate in UTF-16
        '{"texts": ["a"]}'.encode("utf-32-be"),
    ],
)
def test_encodings_other_than_utf_8_are_refused(body: bytes):
    response = tiny_client().post("/v1/search", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "UTF-8" in response.json()["error"]["message"]


@pytest.mark.parametrize("text", ["😀", "𝕏" * 3, "a\x00b", "\ufeff", "\uffff", "\\ud83d", "\x7f\x85\u2028"])
def test_any_other_text_is_accepted(text: str):
    for ensure_ascii in (True, False):
        content = json.dumps({"texts": [text]}, ensure_ascii=ensure_ascii).encode()
        response = tiny_client().post("/v1/search", content=content, headers={"Content-Type": "application/json"})
        assert response.json() == {"num_texts": 1}
