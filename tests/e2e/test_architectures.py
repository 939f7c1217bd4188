"""Tiny random models of many architectures, end to end: load, encode, score, train, save and reload."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from d2llm.models.student import Student
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.recipe import LoraConfig, TeacherConfig
from tiny_models import ARCHITECTURES, DECODERS, DIM, TEXTS, tiny_student_config, tiny_teacher_config, write_tiny_model

QUERIES, PASSAGES = [" ".join(text.split()[:4]) for text in TEXTS[:4]], TEXTS[:4]
PAIRS = [(query, passage) for query in QUERIES[:2] for passage in PASSAGES]


def score(student: Student) -> np.ndarray:
    queries, passages = student.encode_queries(QUERIES).vectors, student.encode_passages(PASSAGES).vectors
    return np.stack([student.score(query, passages, "asymmetric") for query in queries])


def training_loss(student: Student) -> torch.Tensor:
    """Cross-entropy of each query over all passages; the passage at its own position is the positive."""
    backbone = student.backbone
    queries = student(*backbone.pad(student.tokenize(QUERIES, "query").ids))
    passages = student(*backbone.pad(student.tokenize(PASSAGES, "passage").ids))
    return functional.cross_entropy(student.interaction(queries, passages, "asymmetric").logits, torch.arange(4))


def train(model: torch.nn.Module, loss, *, steps: int, rate: float) -> tuple[float, float]:
    """Runs a few steps of AdamW and returns the loss before and after."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    first = float(loss().detach())
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    return first, float(loss().detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_student_trains_saves_and_reloads(architecture, tmp_path):
    folder = write_tiny_model(tmp_path / "model", architecture, **without_dropout(architecture))
    student = Student.create(tiny_student_config(folder), device="cpu", dtype="float32")
    untrained = score(student)
    assert untrained.shape == (4, 4)
    assert np.abs(untrained).max() <= 20 * (1 + 1e-5)  # 20 times a cosine
    vectors = student.encode_passages(PASSAGES).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), DIM**0.5, rtol=1e-5)

    student.prepare_training()
    adapters = {name: p.detach().clone() for name, p in student.named_parameters() if "lora_" in name}
    before, after = train(student, lambda: training_loss(student), steps=3, rate=5e-3)
    assert after < before
    changed = [
        name for name, p in student.named_parameters() if name in adapters and not torch.equal(p, adapters[name])
    ]
    # lora_B of every layer changes in the first step, lora_A from the second on.
    assert len(changed) == len(adapters) > 0

    expected = score(student)
    assert np.abs(expected - untrained).max() > 0.1
    for merge in (False, True):
        student.save(tmp_path / "student", merge=merge)
        loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
        assert loaded.fingerprint == student.fingerprint
        np.testing.assert_allclose(score(loaded), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_teacher_trains_saves_and_reloads(architecture, tmp_path):
    folder = write_tiny_model(tmp_path / "model", architecture, **without_dropout(architecture))
    teacher = CausalTeacher.load(tiny_teacher_config(folder), device="cpu", dtype="float32")
    untrained = teacher.score_pairs(PAIRS, "asymmetric", with_features=True)
    assert np.isfinite(untrained.log_odds).all()
    assert untrained.features.shape == (8, DIM)

    labels = torch.tensor([float(query == passage[: len(query)]) for query, passage in PAIRS])
    assert labels.sum() == 2

    def loss():
        log_odds, _ = teacher(*teacher.pad(teacher.tokenize(PAIRS, "asymmetric")[0]), "asymmetric")
        return functional.binary_cross_entropy_with_logits(log_odds, labels)

    teacher.prepare_training(LoraConfig(rank=4, alpha=8.0, dropout=0.0))
    before, after = train(teacher, loss, steps=5, rate=5e-3)
    assert after < before

    expected = teacher.score_pairs(PAIRS, "asymmetric").log_odds
    (tmp_path / "teacher").mkdir()
    fingerprint = teacher.save(tmp_path / "teacher", {})
    loaded = CausalTeacher.load(TeacherConfig(model=str(tmp_path / "teacher")), device="cpu", dtype="float32")
    assert loaded.fingerprint == fingerprint
    np.testing.assert_allclose(loaded.score_pairs(PAIRS, "asymmetric").log_odds, expected, rtol=0, atol=1e-4)


def without_dropout(architecture: str) -> dict[str, float]:
    """Disables dropout, so that the losses before and after training can be compared."""
    if architecture in ("bert", "xlm_roberta"):
        return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {}
