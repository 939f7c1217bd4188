"""A body is UTF-8 without half surrogates, whichever way it is written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.server.body_text import problem_of_text
from tiny_app import tiny_client

HALF = "\ud83d"
# What strings of JSON are written with, so that halves, pairs, and what only looks like them come side by side.
PIECES = [r"\\", r"\ud83d", r"\uDFFF", "ud83d", "udc00", r"\u0041", r"\"", "😀"]


def has_half(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@example(r"\\ud83d\udc00", False)  # text that looks like the first half, and a second half
@example(r"\ud83d\\udc00", True)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.booleans())
def test_it_agrees_with_a_full_look_at_what_is_read(written: str, as_name: bool):
    body = f'{{"a": [1, {{"{written}": null}}]}}' if as_name else f'{{"a": [1, {{"b": "{written}"}}]}}'
    assert (problem_of_text(body.encode()) is not None) == has_half(json.loads(body))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(st.characters()) | st.just(HALF),
        lambda part: st.lists(part) | st.dictionaries(st.text(st.characters()), part),
    )
)
def test_it_agrees_on_any_value(value: Any):
    problem = problem_of_text(json.dumps(value).encode())
    assert (problem is not None) == has_half(value)
    assert problem is None or not has_half(problem.message)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (HALF, None),
        ({HALF: 1}, None),
        ({"query": f"a {HALF}"}, "query"),
        ({"passages": [{"id": "a"}, {"id": "b", "title": HALF}]}, "passages.1.title"),
        ({"passages": [{"metadata": {"a": 1, HALF: None}}]}, "passages.0.metadata"),
        ({"passages": [{"metadata": {"a": HALF}}]}, "passages.0.metadata.a"),
        ({"texts": ["a", [1, 2, HALF]]}, "texts.1.2"),
    ],
)
def test_it_says_where(value: Any, field: str | None):
    problem = problem_of_text(json.dumps(value).encode())
    assert problem is not None
    assert (problem.status, problem.field) == (422, field)
    assert "\\ud83d" in problem.message
    assert "surrogate" in problem.message
    assert problem.message.startswith(f"{field}: " if field else "'")


def test_what_is_no_json_is_left_to_its_route():
    assert problem_of_text(b'{"a": "\\ud83d"') is None


def test_a_body_too_deep_to_be_looked_at_is_refused():
    problem = problem_of_text(b'{"a": "\\ud83d", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert problem is not None
    assert problem.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"texts": ["\xed\xa0\xbd"]}',  # a half in bytes
        b'{"texts": ["\xe9"]}',
        '{"texts": ["a"]}'.encode("utf-16"),
        '{"texts": ["a"]}'.encode("utf-16-le"),
        '{"texts": ["\ud800\x80"]}'.encode("utf-16-le", "surrogatepass"),  # valid as UTF-8, but a half as UTF-16
        '{"texts": ["a"]}'.encode("utf-32-be"),
    ],
)
def test_another_encoding_than_utf_8_is_refused(body: bytes):
    answer = tiny_client().post("/v1/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["😀", "𝕏" * 3, "a\x00b", "\ufeff", "\uffff", "\\ud83d", "\x7f\x85\u2028"])
def test_any_other_text_is_read(text: str):
    for ensure_ascii in (True, False):
        content = json.dumps({"texts": [text]}, ensure_ascii=ensure_ascii).encode()
        answer = tiny_client().post("/v1/search", content=content, headers={"Content-Type": "application/json"})
        assert answer.json() == {"num_texts": 1}
