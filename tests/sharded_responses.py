"""Searches over HTTP, to compare a sharded index with the one index that it was made from."""

from __future__ import annotations

from typing import Any

import pytest

from live_server import patient

QUERY = "the cat by the sea"
SEARCHES: list[dict[str, Any]] = [
    {},
    {"top_k": 60},
    {"exact": True},
    {"hybrid": 0.4},
    {"filter": "year >= 2005 and language = 'en'"},
    {"group": "best"},
    {"rescore": "none"},
    {"neighbours": 1},
    {"mmr": 0.5},
]


def search(address: str, *, may_be_away: bool = False, **settings: Any) -> dict[str, Any]:
    """The answer. If it ``may_be_away``, a refusal because no shard answers is one without passages."""
    response = patient.post(f"{address}/v1/search", json={"query": QUERY} | settings)
    if may_be_away and response.status_code == 503:
        assert "no shard of the index answers" in response.text, response.text
        assert response.headers["Retry-After"]
        return {"passages": [], "missing_shards": ["all"]}
    assert response.status_code == 200, response.text
    return response.json()


def results_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    left_out = ("score", "dot_score", "log_odds")  # rounded differently in blocks of another size
    return [{name: value for name, value in result.items() if name not in left_out} for result in answer["passages"]]


def assert_same_responses(address: str, num_shards: int) -> None:
    """A server's indexes "one" and "several", of 60 passages, answer alike."""
    for settings in SEARCHES:
        one, several = (search(f"{address}/indexes/{name}", **settings) for name in ("one", "several"))
        assert results_of(several) == results_of(one), settings
        scores = [[result["score"] for result in answer["passages"]] for answer in (one, several)]
        assert scores[1] == pytest.approx(scores[0], rel=1e-5)
        assert one["missing_shards"] == several["missing_shards"] == []
        assert (one["shards"], several["shards"]) == (None, f"{num_shards}/{num_shards}")
        if several["certificate"] is not None:
            assert several["certificate"]["proved"] == one["certificate"]["proved"] == 10
    for path in ("passages/p7", "documents/d3", "passages"):
        one, several = (patient.get(f"{address}/indexes/{name}/v1/{path}") for name in ("one", "several"))
        assert several.status_code == 200
        assert several.json() == one.json()
    facts = patient.get(f"{address}/indexes/several/v1/index").json()
    assert (facts["num_shards"], facts["missing_shards"], facts["num_passages"]) == (num_shards, [], 60)
