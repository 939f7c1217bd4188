"""Teachers that grade or rank lists, behind a real endpoint, in every verb that takes a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest

from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.models.teachers.pair_teacher import identify_teacher, load_teacher
from d2llm.ops.rereading import StudentError
from d2llm.recipe.recipe import named_teacher
from d2llm.retrieval.calibrate import write_error
from d2llm.store.shards import Storage
from e2e.command_line import fail, succeed, succeed_with_report, write_lines
from list_endpoint import KINDS, judged_lists, list_teacher, recipe_with_teacher, shared_words
from tiny_server import tiny_passages, tiny_settings, write_tiny_index

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm.server.app import make_app
from live_server import serve, wait_until_ready
from waiting import PATIENCE

QUERY = "the cat and the bread by the ship"


@pytest.fixture(scope="module")
def tiny_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_index(tmp_path_factory.mktemp("list-teachers"))


@pytest.mark.parametrize("kind", KINDS)
def test_judge_orders_passages_by_what_the_model_answers(tmp_path: Path, kind: str) -> None:
    passages = ["no", "the cat and the ship", "the cat"]
    with list_teacher(tmp_path, kind) as (file, endpoint):
        _, report = succeed_with_report("judge", QUERY, *passages, "--teacher", file, folder=tmp_path)
    log_odds = {each["passage"]: each["log_odds"] for each in report["result"]["scores"]}
    assert sorted(passages, key=lambda text: -log_odds[text]) == sorted(passages, key=lambda t: -shared_words(QUERY, t))
    assert len(endpoint.requests) == 2  # the trial, and one list


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_tests_it_labels_with_it_and_learns_from_it(workspace: Path, tmp_path: Path, kind: str) -> None:
    with list_teacher(tmp_path, kind) as (file, endpoint):
        recipe = tmp_path / "recipe.toml"
        teacher = f'kind = "{kind}"\nmodel = "counts-words"\n[teacher.remote]\nurl = "{endpoint.url}"'
        recipe.write_text(recipe_with_teacher(workspace / "tiny.toml", teacher))
        arguments = (recipe, "--out", tmp_path / "run", "--dtype", "float32")
        _, report = succeed_with_report("run", *arguments, folder=tmp_path)
        identity = identify_teacher(named_teacher(str(file)))
        steps = report["result"]
        (row,) = steps["gate"]["sets"]
        assert row["teacher"] == 1  # a query is the beginning of its passage
        assert steps["label"]["teacher"] == identity.fingerprint
        (plan_file,) = (tmp_path / "run" / "plans").glob("*")
        plan = read_plan(plan_file)
        key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"]}
        labels = LabelStore(tmp_path / "run" / "labels", **key, dataset="everyday")
        for entry in plan.entries:
            log_odds = labels.log_odds(entry.query_id)
            assert {*log_odds} == {*entry.passage_ids}
            assert max(log_odds, key=log_odds.__getitem__) in entry.positives
        manifest = json.loads((tmp_path / "run" / "student" / "manifest.json").read_text())
        assert manifest["teacher"] == identity.fingerprint
        asked = len(endpoint.requests)
        _, again = succeed_with_report("gate", *arguments, "--teacher", file, folder=tmp_path)
        assert again["result"]["sets"] == steps["gate"]["sets"]
        assert len(endpoint.requests) == asked + 1  # the trial alone: what it judged is kept


def test_search_has_a_graded_teacher_reread_what_the_student_is_unsure_of(tiny_index: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "queries.jsonl", [{"_id": p.id, "text": p.text} for p in tiny_passages(40)])
    with list_teacher(tmp_path, "graded") as (file, endpoint):
        cascade = ("--reranker", f"cascade:{file}", "--reranker-set", "num_passages=12")
        fail("search", tiny_index, QUERY, *cascade, containing=["calibrate"])
        succeed("index", tiny_index, "calibrate", "--teacher", file, "--queries", tmp_path / "queries.jsonl")
        before = len(endpoint.requests)
        _, report = succeed_with_report("search", tiny_index, QUERY, *cascade, folder=tmp_path)
        reread = report["result"]["rankings"][0]["reranking"]["read"]
        asked = [text for request in endpoint.requests[before + 1 :] for text in judged_lists(request)[1]]
    assert 0 < len(reread) == len(asked) <= 12


def test_search_has_a_listwise_teacher_reorder_the_first_passages_as_one_list(tiny_index: Path, tmp_path: Path) -> None:
    texts = {passage.id: passage.full_text for passage in tiny_passages()}
    with list_teacher(tmp_path, "listwise") as (file, endpoint):
        chosen = ("--reranker", f"teacher:{file}", "--reranker-set", "num_passages=12")
        arguments = ("search", tiny_index, QUERY, *chosen, "--top-k", 5)
        _, report = succeed_with_report(*arguments, folder=tmp_path)
        _, request = endpoint.requests
        write_lines(tmp_path / "queries.jsonl", [{"_id": "q", "text": QUERY}])
        calibrate = ("index", tiny_index, "calibrate", "--teacher", file, "--queries", tmp_path / "queries.jsonl")
        fail(*calibrate, containing=["ranks", "reorder the top"])
        fail("search", tiny_index, QUERY, "--reranker", f"cascade:{file}", containing=["name the reranker teacher"])
    (ranking,) = report["result"]["rankings"]
    assert len(judged_lists(request)[1]) == len(ranking["reranking"]["read"]) == 12
    shared = [shared_words(QUERY, texts[hit["passage"]["id"]]) for hit in ranking["passages"]]
    assert shared == sorted((shared_words(QUERY, text) for text in judged_lists(request)[1]), reverse=True)[:5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_reranks_with_it(tiny_index: Path, tmp_path: Path, kind: str) -> None:
    texts = {passage.id: passage.full_text for passage in tiny_passages()}
    with list_teacher(tmp_path, kind) as (file, endpoint):
        if kind == "graded":
            teacher = load_teacher(named_teacher(str(file)))
            write_error(Storage.open(tiny_index), teacher, "asymmetric", StudentError(1.0, 0.0, 50.0))
        app = make_app(tiny_settings(tiny_index, teacher=str(file), teacher_ms=60_000))
        with serve(app) as address, httpx2.Client(base_url=address, timeout=PATIENCE) as http:
            wait_until_ready(address)
            ways = http.get("/v1/index").json()["rescore"]
            before = len(endpoint.requests)
            body = {"query": QUERY, "top_k": 5, "rescore": "teacher", "teacher_passages": 12}
            reread = http.post("/v1/search", json=body).json()
            lists = [judged_lists(request)[1] for request in endpoint.requests[before:]]
            cascade = http.post("/v1/search", json={"query": QUERY, "rescore": "cascade", "teacher_passages": 3})
            explained = http.post(
                "/v1/explain", json={"query": QUERY, "passage_id": reread["passages"][0]["id"], "teacher": True}
            )
    assert sum(map(len, lists)) == len(reread["reranking"]["read"]) == 12
    shared = [shared_words(QUERY, texts[hit["id"]]) for hit in reread["passages"]]
    expected = sorted((shared_words(QUERY, text) for each in lists for text in each), reverse=True)
    assert shared == expected[:5]
    if kind == "graded":
        assert ways[-2:] == ["cascade", "teacher"]
        assert 0 < len(cascade.json()["reranking"]["read"]) <= 3
        assert explained.json()["teacher"]["log_odds"] == pytest.approx((20 * shared[0] - 70) / 12, abs=1e-3)
    else:
        assert ways[-1] == "teacher"
        assert len(lists) == 1
        assert cascade.status_code == explained.status_code == 400
        assert "ranks the passages of a list" in cascade.json()["error"]["message"]
        assert "ranks the passages of a list" in explained.json()["error"]["message"]
