"""Scores of texts over HTTP: the student's whole score, by the words of the served index or of the background."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

from d2llm import Index, Student
from d2llm.core.types import Passage
from d2llm.models.probabilities import ProbabilityCalibration, TaskCalibration
from d2llm.server.app import make_app
from live_server import patient, serve, wait_until_ready
from scored_student import real_student
from tiny_models import TEXTS
from tiny_server import tiny_settings

QUERY = f"{TEXTS[0]} fig"
LONG = ". ".join(text.capitalize() for text in TEXTS[:9])
DOCUMENTS = [*TEXTS[:5], LONG, "fig fig", TEXTS[2], "绿茶需要八十度的水。"]
FITTED = TaskCalibration(
    slope=0.5, offset=-2.0, num_queries={"a": 40}, num_pairs=400, error_before=0.5, error_after=0.1
)
WHOLE = FITTED.model_copy(update={"terms_slope": 0.9})


@pytest.fixture(scope="module", params=["tokens", "all"])
def student(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    made = real_student(folder, request.param)
    made.calibration = ProbabilityCalibration(
        num_hard=1, num_random=8, tasks={"asymmetric": FITTED}, with_features={"asymmetric": WHOLE}
    )
    made.save(folder / "saved")
    return Student.load(folder / "saved", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def index(student, tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("index") / "texts", student)
    index.upsert([Passage(f"p{n}", text) for n, text in enumerate(DOCUMENTS)])
    return index


@pytest.fixture(scope="module", params=["index", "background"])
def served(request, student, index):
    """The address of a server, by what it weights words, and the index for this in Python."""
    is_index = request.param == "index"
    options = {} if is_index else {"student": student.source}
    with serve(make_app(tiny_settings(index.folder if is_index else None, device="cpu", **options))) as address:
        wait_until_ready(address)
        yield address, index if is_index else None


def post(address, path, body):
    response = patient.post(f"{address}{path}", json=body)
    assert response.status_code == 200, response.text
    return response


def close(scores, expected):
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-3)


def test_every_route_gives_the_whole_score(student, served):
    address, index = served
    expected = student.predict([(QUERY, text) for text in DOCUMENTS], index=index)
    alone = student.score(student.encode_query(QUERY), student.encode_document(DOCUMENTS), "asymmetric")
    assert not np.allclose(expected, alone, rtol=0.01)

    raw = post(address, "/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True})
    assert raw.headers["X-Word-Statistics"] == ("background" if index is None else index.folder.name)
    close([one["score"] for one in sorted(raw.json(), key=lambda one: one["index"])], expected)
    assert raw.json()[0]["index"] == int(np.argmax(expected))

    pairs = {"text_1": [QUERY, TEXTS[1], *[QUERY] * 7], "text_2": DOCUMENTS, "use_activation": False}
    pairs["truncate_prompt_tokens"] = -1
    scored = [one["score"] for one in post(address, "/score", pairs).json()["data"]]
    close(scored, student.predict([*zip(pairs["text_1"], DOCUMENTS, strict=True)], index=index))
    close(post(address, "/v1/rescore", {"query": QUERY, "passages": DOCUMENTS}).json()["scores"], expected)

    probabilities = student.calibration.probabilities(expected, "asymmetric", queries=[QUERY] * len(expected))
    for path, body in (("/v1/rerank", {"model": None}), ("/v2/rerank", {})):
        if path == "/v2/rerank":
            body["model"] = patient.get(f"{address}/v1/models").json()["data"][0]["id"]
        response = post(address, path, {**body, "query": QUERY, "documents": DOCUMENTS})
        results = sorted(response.json()["results"], key=lambda one: one["index"])
        np.testing.assert_allclose([one["relevance_score"] for one in results], probabilities, atol=1e-3)
        assert response.headers["X-Relevance-Score"] == "calibrated; task=asymmetric; base-rate=0.1"


def test_stored_passages_have_the_scores_of_a_search(student, index, served):
    address, named = served
    if named is None:
        return
    found = {one.passage.id: one.score for one in index.search(QUERY, top_k=99)}
    ids = [f"p{n}" for n in range(len(DOCUMENTS))]
    close(post(address, "/v1/rescore", {"query": QUERY, "passage_ids": ids}).json()["scores"], [found[n] for n in ids])
    vector = student.encode_query(QUERY).tolist()
    by_vector = post(address, "/v1/rescore", {"query_vector": vector, "passage_ids": ids}).json()["scores"]
    alone = student.score(np.array(vector, np.float32), student.encode_document(DOCUMENTS), "asymmetric")
    np.testing.assert_allclose(by_vector, alone, rtol=0.02, atol=0.1)  # the index holds bfloat16


def test_an_index_without_parts_gives_uncalibrated_scores(student, tmp_path):
    index = Index.create(tmp_path / "plain", student, token_vectors="none", window_vectors="none")
    index.upsert([Passage("p", "fig")])
    with serve(make_app(tiny_settings(index.folder, device="cpu"))) as address:
        wait_until_ready(address)
        response = post(address, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
        raw = post(address, "/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}).json()
    is_plain = not student.feature_weights("asymmetric", stored=())
    expected = student.predict([(QUERY, text) for text in DOCUMENTS], index=index)
    close([one["score"] for one in sorted(raw, key=lambda one: one["index"])], expected)
    assert response.headers["X-Relevance-Score"].startswith("calibrated" if is_plain else "uncalibrated")
