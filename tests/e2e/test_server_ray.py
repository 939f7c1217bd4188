"""A server whose shards and students are on a Ray cluster of two nodes: answers, losses, and updates."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'd2llm[ray-serve]'")

from d2llm import Student
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights, WordsFactor
from d2llm.retrieval.shard import shard
from d2llm.server.app import make_app
from live_server import patient, serve, wait_until_ready
from sharded_responses import QUERY, assert_same_responses, results_of, search
from tiny_cluster import pids_of_actors
from tiny_server import tiny_settings, write_tiny_index, write_tiny_student
from waiting import PATIENCE, until

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "cluster.md"
NUM_SHARDS = 2


@contextmanager
def served(index: Any, cluster: Any, **settings: Any) -> Generator[tuple[str, Any]]:
    """The address of a server on the cluster, and what it serves; everything on it is as small as it may be."""
    small = {"shard_cpus": 0.1, "student_cpus": 0.1, "runner": f"ray:{cluster.address}"}
    app = make_app(tiny_settings(index, **(small | settings)))
    with serve(app) as address:
        wait_until_ready(address)
        yield address, app.state.serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index, and the same in several shards."""
    folder = tmp_path_factory.mktemp("served")
    student = Student.load(write_tiny_student(folder), dtype="float32")
    factor = WordsFactor(slopes=(0.0,) * 4, offset=0.0, lowest=-9.0, highest=9.0, nearest_slope=-0.1)
    fitted = TaskFeatureWeights(weights={"bm25": 1.0}, words_factor=factor, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": fitted})
    student.save(folder / "student-0")
    shard(write_tiny_index(folder), folder / "sharded", NUM_SHARDS)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path, cluster: Any) -> Generator[tuple[str, Any]]:
    """A server of both."""
    with served({"one": folder / "index", "several": folder / "sharded"}, cluster) as server:
        yield server


def pids_of_shards(serving: Any, name: str) -> list[list[int]]:
    """The processes of each shard's actors."""
    import ray

    shards = serving.indexes[name]._cluster._shards
    asked = [[one.actor.__ray_call__.remote(lambda _: os.getpid()) for one in each.replicas] for each in shards]
    return [ray.get(one) for one in asked]


def encoder_of(serving: Any, name: str) -> Any:
    return serving.now(name).models._encoder


@contextmanager
def searching(address: str, **settings: Any) -> Generator[list[dict[str, Any]]]:
    """Search in two threads all the time; yields the list of the answers so far. Errors end it with the block."""
    answers: list[dict[str, Any]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(search(address, **settings))

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            yield answers
        finally:
            done.set()
            for one in asking:  # why there are no more answers
                one.result()


def until_answer(answers: list[dict[str, Any]], is_it: Callable[[dict[str, Any]], bool], what: str) -> None:
    """Wait for an answer to a search that began from now on."""
    begin = len(answers) + 2  # two may have begun before
    until(lambda: any(map(is_it, answers[begin:])), what)


def test_answers_are_those_of_one_index(both):
    address, serving = both
    assert_same_responses(address, NUM_SHARDS)
    assert not encoder_of(serving, "several")._away.is_set()


def test_a_wrong_filter_is_the_clients_fault(both):
    refused = patient.post(f"{both[0]}/indexes/several/v1/search", json={"query": QUERY, "filter": "colour = 'grey'"})
    assert refused.status_code == 400
    assert "colour" in refused.text


def test_all_shards_change_at_once(both):
    """Each change writes to several shards; every answer shows all of a change or nothing of it."""
    address = f"{both[0]}/indexes/several"

    def write(generation: int) -> None:
        new = [{"id": f"g{n}", "text": f"{QUERY} {n}", "metadata": {"year": generation}} for n in range(12)]
        response = patient.post(f"{address}/v1/passages", json={"passages": new})
        assert response.status_code == 200, response.text

    write(3000)
    with searching(address, top_k=12, filter="year >= 3000") as answers:
        for generation in (3001, 3002, 3003):
            write(generation)
            until_answer(answers, lambda one: is_of(one, generation), "an answer with the change")  # noqa: B023
    for answer in answers:
        assert answer["missing_shards"] == []
        years = {result["metadata"]["year"] for result in answer["passages"]}
        assert (len(answer["passages"]), len(years)) == (12, 1)
    assert patient.get(f"{address}/v1/index").json()["num_passages"] == 72
    for n in range(12):
        assert patient.delete(f"{address}/v1/passages/g{n}").status_code == 200


def is_of(answer: dict[str, Any], generation: int) -> bool:
    return {result["metadata"]["year"] for result in answer["passages"]} == {generation}


def test_a_shard_that_dies_is_named_until_its_replacement_has_joined(both):
    """No answer fails or is wrong; those without the shard say so, and the others are whole."""
    address, serving = f"{both[0]}/indexes/several", both[1]
    whole = results_of(search(address, top_k=60))
    with searching(address, top_k=60) as answers:
        os.kill(pids_of_shards(serving, "several")[1][0], signal.SIGKILL)
        until_answer(answers, lambda one: one["missing_shards"] == [1], "an answer without the shard")
        refused = patient.post(f"{address}/v1/passages", json={"passages": [{"id": "x", "text": "a cat"}]})
        assert refused.status_code in (200, 503)  # 200 if the shard has come back by now
        until_answer(answers, lambda one: not one["missing_shards"], "an answer with the shard")
    if refused.status_code == 200:
        patient.delete(f"{address}/v1/passages/x")
    all_ids = [result["id"] for result in whole]
    for answer in answers:
        found = [result["id"] for result in answer["passages"] if result["id"] != "x"]
        assert answer["missing_shards"] in ([], [1])
        if not answer["missing_shards"]:
            assert found == all_ids
        else:
            assert answer["shards"] == "1/2"
            assert 0 < len(found) < 60
            assert set(found) < set(all_ids)
    assert results_of(search(address, top_k=60)) == whole


def test_without_replicas_the_server_encodes(both):
    address, serving = f"{both[0]}/indexes/several", both[1]
    whole = results_of(search(address))
    encoder = encoder_of(serving, "several")
    with searching(address) as answers:
        os.kill(encoder._handle.ping.remote().result(), signal.SIGKILL)
        begin = len(answers)
        until(lambda: len(answers) > begin + 4, "answers")
    assert all(results_of(answer) == whole for answer in answers)
    until(lambda: not encoder._away.is_set(), "a replica that answers")
    assert results_of(search(address)) == whole


def test_the_command_of_the_page_loses_nothing_with_two_actors_of_a_shard(folder, both, cluster, tmp_path):
    """As a process of its own, with the command in docs/how-to/cluster.md; it also ends as it should."""
    shard(folder / "index", tmp_path / "single", 1)
    [line] = re.findall(r"^d2llm (serve .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert "shard_replicas=2" in line
    words = line.replace("docs.shards", str(tmp_path / "single")).replace("10.0.0.5:6379", cluster.address).split()
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "d2llm", *words, "--port", "0", "--device", "cpu", "--json", str(ready)]
    small = {"D2LLM_SERVE_SHARD_CPUS": "0.1", "D2LLM_SERVE_STUDENT_REPLICAS": "0"}
    before = pids_of_actors(cluster)
    with subprocess.Popen(command, env=os.environ | small, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: ready.is_file() or process.poll() is not None, "a server that is ready")
            assert process.poll() is None, process.stderr and process.stderr.read()
            address = json.loads(ready.read_text())["result"]["url"]
            whole = results_of(search(address, top_k=60))
            own = pids_of_actors(cluster) - before
            assert len(own) == 2
            with searching(address, top_k=60) as answers:
                os.kill(min(own), signal.SIGKILL)
                begin = len(answers)
                until(lambda: len(answers) > begin + 20, "answers")
            assert all(answer["missing_shards"] == [] and results_of(answer) == whole for answer in answers)
        finally:
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    until(lambda: not own & pids_of_actors(cluster), "actors that end with the server")


def test_a_shard_that_cannot_be_opened_is_an_error_unless_it_is_allowed(folder, cluster, tmp_path):
    shard(folder / "index", tmp_path / "sharded", 2)
    (tmp_path / "sharded" / "shard-0001").rename(tmp_path / "away")
    small = {"shard_cpus": 0.1, "student_replicas": 0, "runner": f"ray:{cluster.address}"}
    with serve(make_app(tiny_settings(tmp_path / "sharded", **small))) as address:
        assert "shard 1 of 2" in str(wait_until_ready(address, "broken"))
    with served(tmp_path / "sharded", cluster, student_replicas=0, allow_missing_shards=True) as (address, _):
        answer = search(address, top_k=60)
        assert answer["missing_shards"] == [1]
        assert 20 < len(answer["passages"]) < 60
        (tmp_path / "away").rename(tmp_path / "sharded" / "shard-0001")
        until(lambda: search(address)["missing_shards"] == [], "an answer with the shard")
        assert len(search(address, top_k=60)["passages"]) == 60


def test_a_cluster_without_room_is_refused(folder, cluster):
    settings = tiny_settings(folder / "sharded", runner=f"ray:{cluster.address}", shard_cpus=4, student_replicas=0)
    with serve(make_app(settings)) as address:
        problem = str(wait_until_ready(address, "broken"))
    assert "2 shards with 1 actors each, of 4 CPUs, need 8 CPUs, but the cluster has 2" in problem
    assert "shard_cpus" in problem


def test_an_agent_over_standard_streams_has_every_tool(folder, cluster, tmp_path):
    pytest.importorskip("mcp", reason="needs the extra 'mcp'")
    from agent_clients import ask_program, call

    shutil.copytree(folder / "index", tmp_path / "one")
    shard(folder / "index", tmp_path / "several", NUM_SHARDS)
    calls = [
        ("search", {"query": QUERY, "top_k": 4, "filter": "year >= 2003"}),
        ("read", {"passage_id": "p7"}),
        ("read", {"document_id": "d3"}),
        ("list_documents", {}),
        ("similar", {"passage_id": "p7"}),
        ("upsert", {"documents": [{"id": "new", "text": "a crane on a barge"}]}),
        ("read", {"document_id": "new"}),
        ("delete", {"document_id": "new"}),
        ("list_documents", {"limit": 3}),
    ]

    async def work(client):
        answers = [await call(client, tool, index=name, **made) for name in ("one", "several") for tool, made in calls]
        return answers[: len(calls)], answers[len(calls) :]

    settings = [f"--set={name}" for name in ("shard_cpus=0.1", "student_cpus=0.1", "max_student_replicas=1")]
    runner = ("--student", folder / "student-0", "--runner", f"ray:{cluster.address}", "--writable", *settings)
    one, several = ask_program(work, tmp_path / "one", tmp_path / "several", *runner)
    differing = {"index": "", "version": 0, "seconds": 0.0}
    assert [answer | differing for answer in several] == [answer | differing for answer in one]
    assert one[6]["text"] == "a crane on a barge"
