"""Queries longer than the student reads: the limit, and how each interface reports a truncated query."""

from __future__ import annotations

import json

import pytest

from d2llm import Index
from e2e.command_line import succeed
from tiny_server import write_tiny_index

LONG = "the cat by the sea " * 30
SHORT = "the cat by the sea"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_tiny_index(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def ask(index):
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from live_server import patient, served

    with served(index, model_name="tiny") as address:

        def send(path, body, status=200):
            response = patient.post(address + path, json=body)
            assert response.status_code == status, response.text
            return response

        yield send


def test_rankings_report_a_truncated_query(index):
    rankings = Index.open(index, dtype="float32").search([SHORT, LONG, SHORT])
    assert [ranking.truncated for ranking in rankings] == [False, True, False]


@pytest.mark.parametrize("body", [{}, {"exact": True}, {"hybrid": 0.5}, {"sources": ["bm25"]}], ids=str)
def test_a_search_over_http_reports_a_truncated_query(ask, body):
    assert ask("/v1/search", {"query": LONG} | body).json()["truncated"] is True
    assert ask("/v1/search", {"query": SHORT} | body).json()["truncated"] is False


def test_other_native_endpoints_report_truncation(ask):
    assert ask("/v1/encode", {"texts": [SHORT, LONG], "kind": "query"}).json()["truncated"] == [1]
    response = ask("/v1/rescore", {"query": LONG, "passages": [SHORT, LONG]}).json()
    assert (response["query_truncated"], response["truncated"]) == (True, [1])
    response = ask("/v1/rescore", {"query": SHORT, "passage_ids": ["p1"]}).json()
    assert (response["query_truncated"], response["truncated"]) == (False, [])
    assert ask("/v1/explain", {"query": LONG, "passage_id": "p1"}).json()["query_truncated"] is True
    assert ask("/v1/explain", {"query": SHORT, "passage_id": "p1"}).json()["query_truncated"] is False


def test_the_command_line_warns_once_about_all_long_queries(index, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"_id": name, "text": LONG}) + "\n" for name in ("2", "3")))
    options = ("--queries", queries, "--dtype", "float32", "--json", tmp_path / "r.json")
    result = succeed("search", index, SHORT, *options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert len(lines) == 1
    assert "2 of 3 queries are longer than the 64 tokens that the student reads ('2', '3')" in lines[0]
    rankings = json.loads((tmp_path / "r.json").read_text())["result"]["rankings"]
    assert [ranking["truncated"] for ranking in rankings] == [False, True, True]
    assert "warning" not in succeed("search", index, SHORT, "--dtype", "float32").stderr


@pytest.mark.parametrize(("name", "suggestion"), [("k", "top_k"), ("candidates", "num_candidates"), ("n", "top_k")])
def test_an_unknown_field_gets_a_suggestion(ask, name, suggestion):
    error = ask("/v1/search", {"query": SHORT, name: 3}, 422).json()["error"]
    assert error["field"] == name
    assert f"did you mean '{suggestion}'?" in error["message"]


def test_responses_name_the_student(ask):
    assert ask("/v1/search", {"query": SHORT}).json()["index"]["student"] == "tiny"
    assert ask("/v1/encode", {"texts": [SHORT], "kind": "query"}).json()["student"] == "tiny"
    assert ask("/v1/rescore", {"query": SHORT, "passage_ids": ["p1"]}).json()["student"] == "tiny"
    assert ask("/v1/explain", {"query": SHORT, "passage_id": "p1"}).json()["no_interaction"] is None


def test_a_zero_interaction_weight_is_explained(index):
    student = Index.open(index, dtype="float32").student
    assert student.why_no_interaction("asymmetric") is None
    student.interaction.interaction_weight("asymmetric").zero_()
    assert "weight r is 0 in asymmetric search" in student.why_no_interaction("asymmetric")
    assert student.why_no_interaction("symmetric") is None
