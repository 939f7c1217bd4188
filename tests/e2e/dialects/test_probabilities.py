"""The scores in [0, 1] that the dialects return, from a student with calibrated scores and from one without."""

from __future__ import annotations

import shutil

import httpx2
import numpy as np
import pytest

from d2llm.models.probabilities import ProbabilityCalibration, TaskCalibration
from tiny_models import TEXTS

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
from tiny_clients import NAME, QUERY, logits_of, serving, sigmoid

SLOPE, OFFSET = 0.5, -2.0
RERANK = {"model": NAME, "query": QUERY, "documents": TEXTS}
SCORE = {"text_1": QUERY, "text_2": TEXTS}
ROUTES = [
    ("/v2/rerank", RERANK, "relevance_score"),
    ("/v1/rerank", RERANK, "relevance_score"),
    ("/rerank", {"query": QUERY, "texts": TEXTS}, "score"),
    ("/rerank", RERANK, "relevance_score"),
    ("/score", SCORE, "score"),
]
RAW = [("/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True}), ("/score", SCORE | {"use_activation": False})]


@pytest.fixture(scope="module")
def calibrated(folder, student):
    shutil.copytree(folder / "student-0", folder / "calibrated")
    fitted = TaskCalibration(
        slope=SLOPE, offset=OFFSET, num_queries={"a": 40}, num_pairs=400, error_before=0.5, error_after=0.01
    )
    calibration = ProbabilityCalibration(num_hard=1, num_random=8, tasks={"asymmetric": fitted})
    calibration.write(folder / "calibrated", student.fingerprint)
    with serving(folder / "calibrated", model_name=NAME) as address:
        yield address


def post_json(address, path, body):
    response = httpx2.post(address + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response, response.json()


def scores_of(content, name):
    """The scores in the order of the documents."""
    results = content if isinstance(content, list) else content.get("results", content.get("data"))
    return [result[name] for result in sorted(results, key=lambda result: result["index"])]


@pytest.mark.parametrize(("path", "body", "name"), ROUTES)
def test_calibrated_scores_are_probabilities_and_marked_so(calibrated, student, path, body, name):
    response, content = post_json(calibrated, path, body)
    expected = sigmoid(SLOPE * logits_of(student, QUERY, TEXTS).astype(np.float64) + OFFSET)
    assert np.allclose(scores_of(content, name), expected, atol=1e-6)
    assert response.headers["X-Relevance-Score"] == "calibrated; task=asymmetric; base-rate=0.1"


@pytest.mark.parametrize(("path", "body", "name"), ROUTES)
def test_uncalibrated_scores_are_sigmoids_and_marked_so(address, student, path, body, name):
    response, content = post_json(address, path, body)
    assert np.allclose(scores_of(content, name), sigmoid(logits_of(student, QUERY, TEXTS)), atol=1e-6)
    assert response.headers["X-Relevance-Score"].startswith("uncalibrated; task=asymmetric")


@pytest.mark.parametrize(("path", "body"), RAW)
def test_raw_scores_stay_raw(calibrated, student, path, body):
    response, content = post_json(calibrated, path, body)
    assert np.allclose(scores_of(content, "score"), logits_of(student, QUERY, TEXTS), atol=1e-5)
    assert "X-Relevance-Score" not in response.headers
