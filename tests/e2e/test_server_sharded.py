"""A server with a sharded index: the answers of one index, and what it does without a shard."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm import Index
from d2llm.retrieval.shard import shard
from d2llm.server.app import make_app
from live_server import patient, serve, served, wait_until_ready
from sharded_responses import assert_same_responses, results_of, search
from tiny_server import tiny_passages, tiny_settings, write_tiny_index
from waiting import until


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """An index in three shards, beside the one that it was made from."""
    shard(write_tiny_index(tmp_path), tmp_path / "sharded", 3)
    return tmp_path / "sharded"


def test_answers_are_those_of_one_index(sharded: Path):
    with served({"one": sharded.parent / "index", "several": sharded}) as address:
        assert_same_responses(address, 3)
        assert patient.get(f"{address}/indexes/one/v1/index").json()["num_shards"] is None


def test_changes_are_seen_when_they_are_answered(sharded: Path):
    with served(sharded) as address:
        new = [{"id": f"new{n}", "text": f"a zebra by the sea {n}", "metadata": {"colour": "grey"}} for n in range(9)]
        response = patient.post(f"{address}/v1/passages", json={"passages": new})
        assert response.status_code == 200, response.text
        assert len(search(address, filter="colour = 'grey'", top_k=20)["passages"]) == 9
        assert patient.get(f"{address}/v1/passages/new3").json()["text"] == "a zebra by the sea 3"
        assert patient.delete(f"{address}/v1/passages/new3").json()["num_deleted"] == 1
        assert patient.get(f"{address}/v1/passages/new3").status_code == 404
        assert patient.get(f"{address}/v1/index").json()["num_passages"] == 68
        assert patient.get(f"{address}/v1/index/snapshots").json() == {"snapshots": []}
        refused = patient.post(f"{address}/v1/index/snapshots", json={"name": "monday"})
        assert refused.status_code == 400
        assert "not possible for a sharded index" in refused.text
        assert str(sharded.parent) not in refused.text


def test_a_missing_shard_is_an_error_unless_it_is_allowed(sharded: Path):
    (sharded / "shard-0001").rename(sharded.parent / "away")
    with serve(make_app(tiny_settings(sharded))) as address:
        problem = wait_until_ready(address, "broken")
        assert "shard 1 of 3" in str(problem)
    with served(sharded, allow_missing_shards=True) as address:
        answer = search(address, top_k=60)
        assert answer["missing_shards"] == [1]
        assert 20 < len(answer["passages"]) < 60
        assert search(address, exact=True)["missing_shards"] == [1]


def test_a_shard_may_go_and_come_back(sharded: Path):
    """No answer fails, none is silently partial, and the shard is searched again as soon as it is there."""
    with served(sharded, allow_missing_shards=True) as address:
        whole = search(address, top_k=60)
        assert whole["missing_shards"] == []
        (sharded / "shard-0002").rename(sharded.parent / "away")
        until(lambda: search(address)["missing_shards"] == [2], "an answer without the shard")
        partial = search(address, top_k=60)
        others = {result["id"] for result in partial["passages"]}
        assert [result["id"] for result in whole["passages"] if result["id"] in others] == [
            result["id"] for result in partial["passages"]
        ]
        assert patient.get(f"{address}/v1/index").json()["missing_shards"] == [2]
        assert 'd2llm_index_missing_shards{index="sharded"} 1.0' in patient.get(f"{address}/metrics").text
        refused = patient.post(f"{address}/v1/passages", json={"passages": [{"id": "x", "text": "a cat"}]})
        assert refused.status_code == 503
        assert "cannot be changed while shard 2 is missing" in refused.text
        assert refused.headers["Retry-After"] == "30"
        (sharded.parent / "away").rename(sharded / "shard-0002")
        until(lambda: search(address)["missing_shards"] == [], "an answer with the shard")
        assert results_of(search(address, top_k=60)) == results_of(whole)
        assert 'd2llm_index_missing_shards{index="sharded"} 0.0' in patient.get(f"{address}/metrics").text


def test_the_tiny_index_has_passages_in_every_shard(sharded: Path):
    view = Index.open(sharded).view
    assert [len(part) > 5 for part in view.segments] == [True] * 3
    assert len(view) == len(tiny_passages())
