"""Token embeddings as a ``MultiVectorEncoder`` of sentence-transformers and as a model of PyLate."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
import torch

from d2llm import Student, export
from d2llm.core.errors import InputError
from d2llm.models.row_features import mean_of_cosines
from d2llm.models.token_vectors import TokenProjection, skipped_tokens
from late_import import late_import
from tiny_models import TEXTS, write_trained_student

library = late_import("sentence_transformers", reason="pip install 'd2llm[sentence-transformers]'")

QUERIES, PASSAGES = TEXTS[:3], [*TEXTS[2:], " ".join(TEXTS * 4), "a"]
PYLATE = os.environ.get("D2LLM_PYLATE_PYTHON")
PROGRAM = """
import json, sys
import numpy as np
from pylate import models, rank

job = json.load(open(sys.argv[1]))
model = models.ColBERT(job["folder"], device="cpu")
queries, passages = (model.encode(job[name], is_query=False) for name in ("queries", "passages"))
ids = [[str(n) for n in range(len(passages))]] * len(queries)
ranked = rank.rerank(documents_ids=ids, queries_embeddings=queries, documents_embeddings=[passages] * len(queries))
json.dump([{one["id"]: one["score"] for one in ranking} for ranking in ranked], open(sys.argv[2], "w"))
"""


def add_projection(student: Student) -> None:
    size = len(student.backbone.tokenizer)
    skipped = {*skipped_tokens(student.backbone.tokenizer), size - 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rarity = [0.0 if token in skipped else 1.0 + token % 3 for token in range(size)]
        student.token_projection = TokenProjection(student.backbone.dim, 8, rarity).eval()


@pytest.fixture(scope="module", params=["tiny", "d2llm-minilm"])
def student(request, tmp_path_factory):
    if request.param != "tiny":
        return Student.load(request.param, device="cpu", dtype="float32")
    prefixes = {"query_prefix": "rain ", "passage_prefix": "the "}
    student = Student.load(write_trained_student(tmp_path_factory.mktemp("tiny"), **prefixes), dtype="float32")
    add_projection(student)
    return student


@pytest.fixture(scope="module")
def folders(student, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for to in ("multi-vector-encoder", "pylate"):
        assert "modules.json" in export(student, root / to, to).files
    return root


def tokens_of(student, texts, kind):
    return student.encode_with_tokens(texts, kind).tokens.split()


def maxsims(student):
    """d2llm's own MaxSim of each query with each passage: a mean of cosines."""
    passages = tokens_of(student, PASSAGES, "passage")
    queries = map(mean_of_cosines, tokens_of(student, QUERIES, "query"))
    return [[(query @ passage.T).max(axis=1).sum() for passage in passages] for query in queries]


def assert_same(vectors, rows):
    assert len(vectors) == len(rows)
    for actual, expected in zip(vectors, rows, strict=True):
        np.testing.assert_allclose(actual, expected / np.sqrt(expected.shape[1]), atol=1e-5)


def test_the_library_computes_the_students_token_embeddings(student, folders):
    model = library.MultiVectorEncoder(str(folders / "multi-vector-encoder"), device="cpu")
    queries, passages = model.encode_query(QUERIES), model.encode_document(PASSAGES)
    assert_same(queries, tokens_of(student, QUERIES, "query"))
    assert_same(passages, tokens_of(student, PASSAGES, "passage"))
    np.testing.assert_allclose(model.similarity(queries, passages), maxsims(student), atol=1e-5)


def test_pylates_form_is_read_by_the_library_too(student, folders):
    model = library.MultiVectorEncoder(str(folders / "pylate"), device="cpu")
    passages = model.encode_document(PASSAGES)
    assert_same(passages, tokens_of(student, PASSAGES, "passage"))
    queries = model.encode_document(QUERIES, prompt_name="query")
    assert_same(queries, tokens_of(student, QUERIES, "query"))
    counts = np.array([len(query) for query in queries])[:, None]
    np.testing.assert_allclose(model.similarity(queries, passages).numpy() / counts, maxsims(student), atol=1e-5)


@pytest.mark.skipif(PYLATE is None, reason="set D2LLM_PYLATE_PYTHON to a Python with PyLate (see CONTRIBUTING.md)")
def test_pylate_computes_the_same_scores(student, folders, tmp_path):
    if student.config.backbone.query_prefix:
        pytest.skip("its encode has a prompt for all texts of a call")
    job = {"folder": str(folders / "pylate"), "queries": QUERIES, "passages": PASSAGES}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [PYLATE, "-P", "-c", PROGRAM, str(tmp_path / "job.json"), str(tmp_path / "scores.json")]
    subprocess.run(command, check=True, timeout=280, env=os.environ | {"PYTHONPATH": ""})
    scores = json.loads((tmp_path / "scores.json").read_text())
    counts = [len(query) for query in tokens_of(student, QUERIES, "query")]
    actual = [
        [ranked[str(n)] / count for n in range(len(PASSAGES))] for ranked, count in zip(scores, counts, strict=True)
    ]
    # Beside longer passages, PyLate counts the worst cosine with one as 0, not below: left out is the one of one token.
    np.testing.assert_allclose(np.array(actual)[:, :-1], np.array(maxsims(student))[:, :-1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("d2llm-minilm-cosine", "no token embeddings"), ("int8", "the pylate folder is in float32")],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, problem):
    student = Student.load("d2llm-minilm-cosine", device="cpu", dtype="float32")
    with pytest.raises(InputError, match=problem):
        export(student, tmp_path / "out", "pylate", int8=name == "int8")
    assert not (tmp_path / "out").exists()
