"""How long a search waits while another request has a lot of work for the student."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from attacked_server import AttackedServer, attacked
from tiny_models import TEXTS

LONGEST_SHARE = 0.25
"""Of the large request's time that a search may wait: without turns it waits for most of it."""


@pytest.fixture(scope="module")
def server() -> Iterator[AttackedServer]:
    with attacked() as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/encode", "/v1/embeddings"])
def test_a_search_does_not_wait_for_long_texts_of_another_request(server: AttackedServer, path: str):
    text = (" ".join(TEXTS) + " ") * 1_000
    texts = [f"{number} {text[:14_000]}" for number in range(1_000)]
    body = {
        "/v1/rerank": {"query": TEXTS[0], "documents": texts, "return_documents": False},
        "/v1/encode": {"kind": "passage", "texts": texts},
        "/v1/embeddings": {"model": "student-0", "input": texts, "truncate": "END"},
    }[path]
    attack = server.under(lambda: server.post(path, body))
    assert attack.answer.status == 200, attack.answer.body
    assert attack.longest_wait < max(2.0, LONGEST_SHARE * attack.answer.seconds)
