"""What a student was trained for, in embeddings: widths (``dimensions``), and an adapter for each kind of text."""

from __future__ import annotations

import httpx2
import numpy as np
import pytest

from d2llm import Student
from tiny_models import TEXTS, TWO_ADAPTERS, write_trained_student

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from tiny_clients import NAME, serving, unit


def test_vectors_are_cut_to_the_widths_that_the_student_was_trained_for(folder, student, tmp_path):
    Student.load(folder / "student-0", device="cpu", dtype="float32").save(
        tmp_path / "nested", content={"nested_dims": [8]}
    )
    passages = student.encode_passages(TEXTS).vectors[:, :8]
    queries = student.query_vectors(student.encode_queries(TEXTS).vectors)[:, :8]
    with serving(tmp_path / "nested", model_name=NAME) as address:

        def post(path: str, body: dict) -> httpx2.Response:
            return httpx2.post(address + path, json=body, timeout=60)

        for kind, expected in (("passage", passages), ("query", queries)):
            body = {"input": TEXTS, "model": f"{NAME}:{kind}", "dimensions": 8}
            answer = post("/v1/embeddings", body).json()
            vectors = [item["embedding"] for item in answer["data"]]
            np.testing.assert_allclose(vectors, unit(expected), atol=1e-5)
            body = {"inputs": TEXTS, "prompt_name": kind, "dimensions": 8}
            np.testing.assert_allclose(post("/embed", body).json(), unit(expected), atol=1e-5)
            raw = post("/embed", body | {"normalize": False}).json()
            np.testing.assert_allclose(raw, expected, rtol=1e-4, atol=1e-4)
        refused = post("/v1/embeddings", {"input": "a", "model": NAME, "dimensions": 7})
        assert refused.status_code == 400
        assert "not trained to be cut to 7; leave dimensions out, or set it to 8 or 32" in refused.text
        whole = post("/v1/embeddings", {"input": "a", "model": NAME, "dimensions": 32}).json()
        assert len(whole["data"][0]["embedding"]) == 32


def test_the_kind_of_text_decides_which_adapter_reads_it(tmp_path):
    folder = write_trained_student(tmp_path, tuning=TWO_ADAPTERS)
    student = Student.load(folder, device="cpu", dtype="float32")
    passages = student.encode_passages(TEXTS).vectors
    queries = student.query_vectors(student.encode_queries(TEXTS).vectors)
    as_passages = student.query_vectors(passages)
    assert np.abs(unit(queries) - unit(as_passages)).max() > 0.01
    with serving(folder, model_name=NAME) as address:
        for kind, expected in (("passage", passages), ("query", queries)):
            body = {"input": TEXTS, "model": NAME, "input_type": kind}
            answer = httpx2.post(f"{address}/v1/embeddings", json=body, timeout=60).json()
            np.testing.assert_allclose([item["embedding"] for item in answer["data"]], unit(expected), atol=1e-5)
