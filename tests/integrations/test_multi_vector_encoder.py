"""A ColBERT-like model of sentence-transformers or PyLate as the token embeddings of an index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm import Index, Student, export
from d2llm.core.errors import IndexMismatchError, InputError
from d2llm.models.token_vectors import TokenProjection
from late_import import late_import
from tiny_models import TEXTS, write_tiny_model, write_trained_student
from tiny_server import tiny_settings

library = late_import("sentence_transformers", reason="pip install 'd2llm[sentence-transformers]'")
integration = late_import("d2llm.integrations.sentence_transformers")

QUERY = TEXTS[0]
SETTINGS = {"vector_format": "float32", "token_vectors": "float32"}


def write_colbert(folder, seed=0):
    """A random model with a prompt of its own for queries, expansion to 12 tokens, and full stops left out."""
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = [
            Transformer(str(write_tiny_model(folder / "backbone", "bert")), query_length=12, document_length=30),
            Dense(32, 8, bias=False, activation_function=None, module_input_name="token_embeddings"),
            MultiVectorMask(["."]),
            Normalize("token_embeddings"),
        ]
    model = library.MultiVectorEncoder(modules=modules, prompts={"query": "the ", "document": "a "}, device="cpu")
    model.save(str(folder / f"colbert-{seed}"))
    return folder / f"colbert-{seed}"


def write_pylate(folder):
    """A random model in the form of PyLate."""
    student = Student.load(write_trained_student(folder / "exported"), device="cpu", dtype="float32")
    rarity = [0.0] * 6 + [1.0] * (len(student.backbone.tokenizer) - 6)
    student.token_projection = TokenProjection(student.backbone.dim, 8, rarity)
    export(student, folder / "pylate", "pylate")
    return folder / "pylate"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Student.load(write_trained_student(tmp_path_factory.mktemp("student")), device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=[write_colbert, write_pylate], ids=["MultiVectorEncoder", "PyLate"])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("colbert"))


def scores_of(ranking):
    return {result.passage.id: result.score for result in ranking.passages}


def test_an_index_counts_the_models_maxsim(plain, folder, tmp_path):
    model = library.MultiVectorEncoder(str(folder), device="cpu")
    student = integration.StudentWithTokens(plain, folder, weight=3.0)
    index = Index.create(tmp_path / "tiny.index", student, **SETTINGS)
    index.upsert([{"id": str(n), "text": text} for n, text in enumerate(TEXTS)])
    index.close()
    again = integration.StudentWithTokens(plain, model, weight=3.0)
    with Index.open(tmp_path / "tiny.index", again) as index:
        query, passages = model.encode_query(QUERY), model.encode_document(TEXTS)
        expected = 3.0 * model.similarity(query, passages)[0].numpy() / len(query)
        scores = scores_of(index.search(QUERY, top_k=len(TEXTS)))
        without = scores_of(index.search(QUERY, top_k=len(TEXTS), score_features={}))
        added = [scores[str(n)] - without[str(n)] for n in range(len(TEXTS))]
        np.testing.assert_allclose(added, expected, atol=1e-3)
        assert np.ptp(expected) > 0.05
    with pytest.raises(InputError, match="does not say where its student is"):
        Index.open(tmp_path / "tiny.index").search(QUERY)


def test_documents_are_split_and_another_model_is_refused(plain, tmp_path):
    student = integration.StudentWithTokens(plain, write_colbert(tmp_path))
    index = Index.create(tmp_path / "tiny.index", student)
    index.upsert_documents([{"id": "long", "text": " ".join(TEXTS * 8)}])
    assert len(index) > 1
    assert len(index.search([QUERY, TEXTS[1]], top_k=2)[1]) == 2
    index.close()
    other = integration.StudentWithTokens(plain, write_colbert(tmp_path, seed=1))
    with pytest.raises(IndexMismatchError):
        Index.open(tmp_path / "tiny.index", other).search(QUERY)


def test_a_server_refuses_such_an_index_with_the_reason(plain, tmp_path):
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    from d2llm.server.app import load_models
    from d2llm.server.telemetry import Telemetry

    plain.save(tmp_path / "plain")
    index = Index.create(tmp_path / "tiny.index", integration.StudentWithTokens(plain, write_colbert(tmp_path)))
    with pytest.raises(InputError, match="does not say where its student is"):
        load_models(tiny_settings(index.folder), Telemetry(), [], index.storage)
    named = tiny_settings(index.folder, student=str(tmp_path / "plain"), device="cpu")
    with pytest.raises(IndexMismatchError, match=r"has None; use .*StudentWithTokens exists only in Python"):
        load_models(named, Telemetry(), [], index.storage)


def test_a_weight_of_0_is_refused(plain, tmp_path):
    with pytest.raises(InputError, match="weight is 0"):
        integration.StudentWithTokens(plain, write_colbert(tmp_path), weight=0)
