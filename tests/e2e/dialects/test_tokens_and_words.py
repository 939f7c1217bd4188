"""Token embeddings, and words weighed by a served index, as the dialects return them."""

from __future__ import annotations

import base64

import httpx2
import numpy as np
import pytest
import torch

from d2llm import Index
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.text_scores import TextScorer
from d2llm.models.token_vectors import TokenProjection
from d2llm.store.word_segment import CountedTerms
from tiny_models import TEXTS
from tiny_server import tiny_passages

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from live_server import served
from tiny_clients import QUERY

LONG_QUERY = " ".join(TEXTS)
"""More tokens than may have vectors in a query."""


@pytest.fixture(scope="module")
def index(folder, student):
    """An index of a student that counts words and tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rarity = [0.0] * 6 + [float(1 + n % 3) for n in range(len(student.backbone.tokenizer) - 6)]
        student.token_projection = TokenProjection(student.backbone.dim, 8, rarity, max_query_tokens=6)
    weights = TaskFeatureWeights(weights={"bm25": 0.5, "maxsim": 1.0}, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": weights})
    student.save(folder / "with-tokens")
    with Index.create(
        folder / "words.index", folder / "with-tokens", dtype="float32", token_vectors="float32"
    ) as index:
        index.upsert(tiny_passages())
        yield index
    student.token_projection, student.score_features = None, ScoreFeatures()


@pytest.fixture(scope="module")
def ask(index):

    with served(index.folder, device="cpu") as address:

        def send(path, body):
            response = httpx2.post(address + path, json=body, timeout=60)
            assert response.status_code == 200, response.text
            return response

        yield send


def maxsim(queries, passages):
    """The mean over a query's tokens of the best product."""
    return [[(np.array(q) @ np.array(p).T).max(axis=1).mean() for p in passages] for q in queries]


def test_products_of_token_embeddings_are_what_the_score_counts(ask, index):
    student, queries = index.student, [QUERY, LONG_QUERY]
    passages = ask("/embed_all", {"inputs": TEXTS}).json()
    tokens = ask("/embed_all", {"inputs": queries, "prompt_name": "query"}).json()
    scorer = TextScorer(student)
    rows, (read, _) = scorer.read_texts(TEXTS), scorer.read_queries(queries)
    for query, scores in zip(read, maxsim(tokens, passages), strict=True):
        expected = rows.best_tokens(query.tokens / query.tokens.size, np.arange(len(TEXTS)))
        assert np.allclose(scores, expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(np.concatenate(passages), axis=1), 1, atol=1e-5)
    assert len(tokens[1]) == 6
    assert np.linalg.norm(tokens[1][0]) < 0.5  # a fraction, since the other tokens have none


def test_vllm_returns_the_same_token_embeddings(ask):
    expected = ask("/embed_all", {"inputs": TEXTS}).json()
    body = {"input": TEXTS, "task": "token_embed"}
    response = ask("/pooling", body).json()
    assert [item["data"] for item in response["data"]] == expected
    for item, tokens in zip(
        ask("/pooling", body | {"encoding_format": "base64"}).json()["data"], expected, strict=True
    ):
        decoded = np.frombuffer(base64.b64decode(item["data"]), "<f4").reshape(-1, 8)
        assert np.allclose(decoded, tokens, atol=1e-6)


def test_sparse_products_are_bm25_in_the_served_index(ask, index):
    passages = tiny_passages()[:10]
    texts = [passage.full_text for passage in passages]
    response = ask("/embed_sparse", {"inputs": texts})
    assert response.headers["x-word-statistics"] == "words.index"
    sparse = [{item["index"]: item["value"] for item in text} for text in response.json()]
    (query,) = ask("/embed_sparse", {"inputs": QUERY, "prompt_name": "query"}).json()
    products = [sum(item["value"] * one.get(item["index"], 0.0) for item in query) for one in sparse]
    words, rows = index.unsharded_view.words, index.unsharded_view.rows([passage.id for passage in passages])
    expected, _ = words.score(words.query(QUERY), rows)
    assert CountedTerms.from_text(QUERY).hashes.size == len(query)
    assert np.allclose(products, expected, rtol=1e-5)


def test_an_answer_has_a_largest_size(index):

    with served(index.folder, device="cpu", max_texts=2) as address:
        assert len(httpx2.post(f"{address}/embed_all", json={"inputs": ["cat dog", "sea"]}, timeout=60).json()) == 2
        for path, body, status in (
            ("/embed_all", {"inputs": LONG_QUERY}, 422),
            ("/pooling", {"input": LONG_QUERY, "task": "token_embed", "truncate_prompt_tokens": -1}, 400),
        ):
            response = httpx2.post(address + path, json=body, timeout=60)
            assert response.status_code == status
            assert "this server returns 64 in an answer (max_texts vectors); send fewer texts" in response.text
