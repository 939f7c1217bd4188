"""The exported numpy head, usable without d2llm, compared with the student's float32 scores."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.core.manifest import read_manifest
from d2llm.core.types import TASKS
from d2llm.models.export.export import export, head_arrays
from d2llm.models.export.numpy_head import NumpyHead, load
from d2llm.models.interaction import make_head
from d2llm.models.scorer import HeadWeights, QueryScorer
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

DIM = 24
TOLERANCE = 2e-6  # relative to the largest score: float32 sums in different orders
FEATURES = ("concat", "product", "difference", "rich")


def make(head, features="rich", **settings):
    torch.manual_seed(0)
    module = make_head(InteractionConfig(head=head, features=features, hidden_dim=40, feature_dim=16, **settings), DIM)
    randomise(module.eval(), scale=0.2)
    return module


def vectors(num, seed):
    return np.random.default_rng(seed).standard_normal((num, DIM)).astype(np.float32)


HEADS = {"cosine": {"head": "cosine"}} | {
    "-".join((head, features, branches, *(["gates"] if gates else []))): {
        "head": head,
        "features": features,
        "branches": branches,
        "gates": gates,
    }
    for head, gates in (("paper", False), ("dot", False), ("dot", True))
    for features in FEATURES
    for branches in ("per_task", "shared")
}
HEADS |= {
    f"dot-only-{'-'.join(tasks) or 'inner product'}": {"head": "dot", "gates": True, "tasks": tasks}
    for tasks in (("symmetric",), ("asymmetric",), ())
}


def student_scorer(head, query, task):
    with torch.inference_mode():
        weights = HeadWeights(head, task, torch.float32) if head.has_interaction(task) else None
    return QueryScorer(head, weights, torch.from_numpy(query), task, 512)


@pytest.mark.parametrize("name", HEADS)
def test_scores_match_the_students(name):
    module, (query,), passages = make(**HEADS[name]), vectors(1, 1), vectors(1100, 2)
    if name.startswith("dot") and module.has_interaction("asymmetric"):
        module.interaction_weight("asymmetric").fill_(0.5)
    numpy_head = NumpyHead(head_arrays(module))
    for task in TASKS:
        scorer = student_scorer(module, query, task)
        expected = scorer(passages)
        scores = numpy_head.score(query, passages, task)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE * max(1, abs(expected).max()))
        assert numpy_head.has_dot == module.has_dot
        assert numpy_head.has_interaction == any(map(module.has_interaction, TASKS))
        if not numpy_head.has_dot:
            continue
        dot_query = numpy_head.query_vectors(query[None], task)[0]
        np.testing.assert_allclose(dot_query, scorer.dot_query, rtol=0, atol=TOLERANCE * abs(dot_query).max())
        assert numpy_head.bound(query[None], task)[0] == pytest.approx(scorer.bound, rel=1e-6)
        if module.has_interaction(task):
            assert abs(scores - passages @ dot_query).max() > 0.05  # the interaction contributes to the score
            bound = module.passage_bound(torch.from_numpy(passages)).detach()
            np.testing.assert_allclose(numpy_head.passage_bound(passages), bound, rtol=0, atol=1e-6)


def test_weights_shared_by_both_tasks_are_stored_once():
    weights = head_arrays(make("dot", gates=True))
    assert weights["passage"].shape == (40, DIM)
    assert weights["symmetric/inner_1_weight"].shape == weights["asymmetric/inner_1_weight"].shape == (40, 40)
    assert "symmetric/passage" not in weights
    assert "passage_gate_weight" in weights


def test_weight_zero_skips_the_interaction(monkeypatch):
    module, (query,), passages = make("dot"), vectors(1, 1), vectors(9, 2)
    module.interaction_weight("symmetric").fill_(0.0)
    numpy_head = NumpyHead(head_arrays(module))
    monkeypatch.setattr(NumpyHead, "_interaction", lambda *_: pytest.fail("the interaction was computed"))
    expected = student_scorer(module, query, "symmetric")(passages)
    np.testing.assert_allclose(numpy_head.score(query, passages, "symmetric"), expected, rtol=0, atol=1e-4)


def test_invalid_arguments_are_rejected():
    query, passages = vectors(1, 1)[0], vectors(3, 2)
    numpy_head = NumpyHead(head_arrays(make("paper")))
    with pytest.raises(ValueError, match="no inner product"):
        numpy_head.query_vectors(query[None], "symmetric")
    with pytest.raises(ValueError, match="no task 'other'"):
        numpy_head.score(query, passages, "other")
    with pytest.raises(ValueError, match=r"got \[24\] and \[3, 23\]"):
        numpy_head.score(query, passages[:, 1:], "symmetric")
    assert numpy_head.score(query, passages[:0], "symmetric").shape == (0,)


# --- the exported folder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "llama")
    student = Student.create(tiny_student_config(folder), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.05)
    return student.eval()


SCRIPT = """
import sys
for package in ("torch", "d2llm", "scipy"):
    sys.modules[package] = None  # importing it fails
import numpy, numpy_head
head = numpy_head.load(".")
vectors = numpy.load("vectors.npy", allow_pickle=False)
numpy.save("scores.npy", head.score(vectors[0], vectors[1:], "asymmetric"))
"""


def test_the_exported_folder_is_self_contained(student, tmp_path):
    folder = tmp_path / "head"
    report = export(student, folder, "numpy")
    assert set(report.files) == {"head.npz", "numpy_head.py"}
    manifest = read_manifest(folder, "export", 1)
    assert manifest["student"] == student.fingerprint
    assert (manifest["format"], manifest["head"], manifest["dim"]) == ("numpy", "dot", 32)

    vectors = student.encode_passages(TEXTS).vectors
    np.save(folder / "vectors.npy", vectors)
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, check=True)
    expected = student.score(vectors[0], vectors[1:], "asymmetric")
    np.testing.assert_allclose(np.load(folder / "scores.npy"), expected, rtol=0, atol=1e-4)


def test_only_exports_are_replaced(student, tmp_path):
    export(student, tmp_path / "head", "numpy")
    export(student, tmp_path / "head", "numpy")
    assert load(tmp_path / "head").has_dot
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="that d2llm did not make"):
        export(student, tmp_path / "mine", "numpy")


def test_int8_is_not_supported_for_the_head(student, tmp_path):
    with pytest.raises(InputError, match="float32"):
        export(student, tmp_path / "head", "numpy", int8=True)


def test_the_shipped_student_has_the_same_scores(tmp_path):
    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    export(student, tmp_path / "head", "numpy")
    head, texts = load(tmp_path / "head"), [*TEXTS, *(f"{a}; {b}" for a in TEXTS for b in TEXTS)]
    (query,), passages = student.encode_queries(["where do ships go?"]).vectors, student.encode_passages(texts).vectors
    for task in TASKS:
        expected = student.score(query, passages, task)
        np.testing.assert_allclose(head.score(query, passages, task), expected, rtol=0, atol=1e-4)
