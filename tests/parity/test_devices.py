"""The same work on a GPU and on the CPU, in float32: vectors, scores, gradients, judgements, written queries.

Without a GPU, the CPU is compared with itself, which tests no more than the comparison. Whole runs are on the device
that is chosen by default in tests/e2e/test_run.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d2llm import Student
from d2llm.data.plan import TrainingPair
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.writers.local import LocalWriter
from d2llm.models.writers.writer import Assignment
from d2llm.recipe import Lora, LoraConfig, TeacherTuningConfig, WriterConfig
from d2llm.training.gradient_cache import backpropagate
from d2llm.training.tune_teacher import accumulate
from tiny_models import TEXTS, randomise, tiny_student_config, tiny_teacher_config, write_tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MANY = [f"{text} {'and so on ' * (number % 9)}{number}" for number, text in enumerate(TEXTS * 4)]
PAIRS = [(query, passage) for query in TEXTS[:2] for passage in TEXTS]
ARCHITECTURES = ("llama", "bert", "modernbert", "gemma2")


def student_on(device: str, model: Path, *, training: bool = False) -> Student:
    """The same random student on any device."""
    config = tiny_student_config(model, tuning=Lora(rank=4, alpha=8.0))
    student = Student.create(config, device="cpu", dtype="float32")
    if training:
        student.prepare_training()
    randomise(student)
    return student.to(device)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_agree(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_and_scores(tmp_path: Path, architecture: str, device: str) -> None:
    model = write_tiny_model(tmp_path / "model", architecture)
    here, there = student_on("cpu", model), student_on(device, model)
    vectors = [student.encode_passages(MANY).vectors for student in (here, there)]
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=1e-4 * np.abs(vectors[0]).max())
    query = here.encode_queries(TEXTS[:1]).vectors[0]
    scores = [student.score(query, vectors[0], task="symmetric", interaction_weight=0.5) for student in (here, there)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part_tokens", [None, 64])
def test_gradients_of_a_student(tmp_path: Path, device: str, part_tokens: int | None) -> None:
    model = write_tiny_model(tmp_path / "model", "modernbert")
    results: list[dict[str, Tensor]] = []
    for target in ("cpu", device):
        student = student_on(target, model, training=True).train()
        ids = student.tokenize(MANY, "passage").ids
        weights = torch.linspace(-1, 1, len(ids) * student.vector_dim, device=target).view(len(ids), -1)

        def loss_of(vectors: Tensor, _: object, weights: Tensor = weights) -> Tensor:
            return (vectors * weights).sum()

        backpropagate(student, ids, loss_of, part_tokens=part_tokens, room=1 << 16, seed=0)
        results.append(gradients(student))
    assert_gradients_agree(results[1], results[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_judgements(tmp_path: Path, architecture: str, device: str) -> None:
    config = tiny_teacher_config(write_tiny_model(tmp_path / "model", architecture))
    here, there = (CausalTeacher.load(config, device=target, dtype="float32") for target in ("cpu", device))
    expected = here.score_pairs(PAIRS, "asymmetric", with_features=True)
    judgements = there.score_pairs(PAIRS, "asymmetric", with_features=True)
    np.testing.assert_allclose(judgements.log_odds, expected.log_odds, rtol=1e-3, atol=1e-3)
    assert expected.features is not None
    assert judgements.features is not None
    np.testing.assert_allclose(judgements.features, expected.features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_teacher(tmp_path: Path, device: str) -> None:
    config = tiny_teacher_config(write_tiny_model(tmp_path / "model", "llama"))
    batch = [TrainingPair(query, passage, "asymmetric", float(query == passage)) for query, passage in PAIRS]
    results: list[dict[str, Tensor]] = []
    for target in ("cpu", device):
        teacher = CausalTeacher.load(config, device=target, dtype="float32")
        teacher.prepare_training(LoraConfig(rank=2, dropout=0.0))
        teacher.train()
        torch.manual_seed(0)
        accumulate(teacher, batch, 128, TeacherTuningConfig(loss="lists"), room=1 << 16)
        results.append(gradients(teacher))
    assert_gradients_agree(results[1], results[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.gpu
def test_a_quantised_teacher_on_a_gpu(tmp_path: Path, bits: int) -> None:
    """Stored in 8 or 4 bits it judges much like itself, and can be tuned."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'd2llm[large]'")
    model = write_tiny_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=128)
    full = CausalTeacher.load(tiny_teacher_config(model), device="cuda", dtype="bfloat16")
    teacher = CausalTeacher.load(tiny_teacher_config(model, quantization=f"{bits}bit"), device="cuda")
    expected = full.score_pairs(PAIRS, "asymmetric").log_odds
    assert np.corrcoef(teacher.score_pairs(PAIRS, "asymmetric").log_odds, expected)[0, 1] > 0.8
    teacher.prepare_training(LoraConfig(rank=2, dropout=0.0), gradient_checkpointing=True)
    teacher.train()
    batch = [TrainingPair(query, passage, "asymmetric", float(query == passage)) for query, passage in PAIRS]
    accumulate(teacher, batch, 512, TeacherTuningConfig())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(teacher).values())


@pytest.mark.parametrize("device", DEVICES)
def test_written_queries(tmp_path: Path, device: str) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1, initializer_range=0.4)
    config = WriterConfig(model=str(model), max_new_tokens=12, max_passage_tokens=30)
    assignments = [Assignment(text, "question", seed=number) for number, text in enumerate(TEXTS)]
    here, there = (LocalWriter.load(config, device=target, dtype="float32") for target in ("cpu", device))
    assert [written.queries for written in there.write(assignments)] == [
        written.queries for written in here.write(assignments)
    ]
