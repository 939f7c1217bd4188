"""A student on the vectors of an embedding API as a user makes one: from a recipe to a search and a server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm import Student
from d2llm.core.errors import InputError
from d2llm.core.types import TASKS
from d2llm.recipe import StudentConfig
from e2e.command_line import fail, succeed, succeed_with_report
from e2e.small_corpus import SENTENCES
from local_endpoint import EMBEDDING_DIM, LocalEndpoint, embeddings, local_endpoint
from tiny_server import write_tiny_student

BACKBONE = """[student.backbone]
model = "served"
[student.backbone.remote]
url = "{url}"
dimensions = {dim}
batch_texts = 8
patience_minutes = 0
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def endpoint() -> Iterator[LocalEndpoint]:
    with local_endpoint(embeddings) as running:
        yield running


def write_recipe(workspace: Path, folder: Path, url: str, *, dim: int = EMBEDDING_DIM, more: str = "") -> Path:
    """The session's recipe with another backbone; words count, and the second stage trains the interaction alone."""
    text = (workspace / "tiny.toml").read_text()
    start, end = text.index("[student.backbone]"), text.index("[student.interaction]")
    text = text[:start] + BACKBONE.format(url=url, dim=dim) + text[end:]
    text = text.replace("residual.epochs = 0", "residual.epochs = 1")
    text += "\n[score_features]\nbm25 = true\n" + more
    (folder / "remote.toml").write_text(text)
    return folder / "remote.toml"


@pytest.fixture(scope="module")
def trained(workspace: Path, endpoint: LocalEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was finished, with an index of its student."""
    folder = tmp_path_factory.mktemp("remote")
    recipe = write_recipe(workspace, folder, endpoint.url)
    succeed("run", recipe, "--out", folder / "run", "--dtype", "float32")
    _, report = succeed_with_report(
        "encode",
        workspace / "everyday",
        "--student",
        folder / "run" / "student",
        "--out",
        folder / "index",
        folder=folder,
    )
    assert report["result"]["num_passages"] == 60
    return folder


def asked(endpoint: LocalEndpoint) -> Counter[str]:
    return Counter(text for request in endpoint.requests for text in request.body["input"])


def test_every_text_is_asked_for_once_from_mining_to_the_index(trained: Path, endpoint: LocalEndpoint) -> None:
    assert {*SENTENCES} <= asked(endpoint).keys()
    assert set(asked(endpoint).values()) == {1}
    manifest = json.loads((trained / "run" / "student" / "manifest.json").read_text())
    assert manifest["config"]["backbone"]["remote"]["url"] == endpoint.url


def test_training_changed_the_head(trained: Path, endpoint: LocalEndpoint) -> None:
    student = Student.load(trained / "run" / "student", device="cpu", dtype="float32")
    untrained = Student.create(student.config, device="cpu", dtype="float32")
    np.testing.assert_array_equal(
        student.encode_passages(SENTENCES[:4]).vectors, untrained.encode_passages(SENTENCES[:4]).vectors
    )
    log = (trained / "run" / "student.run" / "log.jsonl").read_text()
    assert "loss" in log
    after = load_file(trained / "run" / "student.run" / "checkpoint.safetensors")
    before = untrained.interaction.state_dict()
    is_trained = {
        task: not torch.equal(after[f"parameter/interaction.{name}"], before[name])
        for task in TASKS
        for name in [f"dots.{task}.query_map"]
    }
    assert is_trained == {"symmetric": False, "asymmetric": True}  # the only data set is asymmetric


def test_search_sends_the_query_alone(trained: Path, endpoint: LocalEndpoint) -> None:
    before = len(endpoint.requests)
    query = SENTENCES[3] + " indeed"
    for _ in range(2):
        result, _ = succeed_with_report("search", trained / "index", query, folder=trained)
        assert SENTENCES[3][:30] in result.stdout
    assert [request.body["input"] for request in endpoint.requests[before:]] == [[query]]
    result = fail("search", trained / "index", query, "--engine", "onnx", containing=["backbone is remote"])


# --- d2llm's own server


def test_the_server_serves_such_an_index(trained: Path, endpoint: LocalEndpoint) -> None:
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from live_server import patient, served

    with served(trained / "index") as address:
        found = patient.post(f"{address}/v1/search", json={"query": SENTENCES[7]}).json()
        assert found["passages"][0]["text"] == SENTENCES[7]
        body = {"input": ["one two", "three"], "model": "student"}
        answer = patient.post(f"{address}/v1/embeddings", json=body).json()
        assert answer["usage"]["prompt_tokens"] == 3 + 2  # three characters count as a token
        assert len(answer["data"][0]["embedding"]) == EMBEDDING_DIM


def test_a_d2llm_server_is_an_embedding_api(tmp_path: Path) -> None:
    """Another student's vectors, of length 1, as the backbone of a new one."""
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from live_server import served

    folder = write_tiny_student(tmp_path)
    local = Student.load(folder, device="cpu", dtype="float32")
    with served(None, student=str(folder)) as address:
        remote = {"url": f"{address}/v1", "dimensions": local.vector_dim, "query_body": {"input_type": "query"}}
        config = {"backbone": {"model": folder.name, "max_passage_tokens": 40, "remote": remote}}
        student = Student.create(StudentConfig.model_validate(config), device="cpu", dtype="float32")
        for encode in ("encode_queries", "encode_passages"):
            vectors = getattr(student, encode)(SENTENCES[:5]).vectors
            expected = getattr(local, encode)(SENTENCES[:5]).vectors
            if encode == "encode_queries":  # the server gives vectors whose inner products are the inner product
                expected = local.query_vectors(expected, "asymmetric")
            expected *= local.vector_dim**0.5 / np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(vectors, expected, atol=1e-4)
        with pytest.raises(InputError, match=r"lower student.backbone.max_passage_tokens"):
            student.backbone.tokenize(["word " * 200], "passage", limit=10_000)
