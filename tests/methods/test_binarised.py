"""Trained binary codes (BEBR): the recurrence in NumPy, its gradient, and what an index stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.methods.poolings.binarised import BinarisedPooling, straight_through_sign
from d2llm.models.student import Student
from d2llm.recipe import Pooling
from d2llm.store.vector_formats import make_format
from tiny_models import TEXTS, tiny_student_config, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("name", "bits"), [("binary", 1), ("int3", 3), ("int4", 4)])
def test_the_index_stores_the_trained_codes_as_they_are(model: Path, name: str, bits: int, tmp_path: Path) -> None:
    config = tiny_student_config(model, pooling=Pooling.of({"kind": "binarised", "vector_format": name}))
    student = Student.create(config, device="cpu", dtype="float32")
    pooling = student.pooling
    assert isinstance(pooling, BinarisedPooling)
    with torch.no_grad():
        for parameter in (*pooling.signs, *pooling.back):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    student.save(tmp_path / "student")
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    found = student.encode_passages(TEXTS).vectors
    stored = make_format(name, 32)
    np.testing.assert_allclose(stored.decode(stored.encode(found, TEXTS)), found, atol=1e-5)

    plain = Student.create(tiny_student_config(model, pooling=Pooling.of("auto")), device="cpu", dtype="float32")
    x = unit(plain.encode_passages(TEXTS).vectors.astype(np.float64))
    signs, back = ([each.detach().double().numpy() for each in maps] for maps in (pooling.signs, pooling.back))
    b = np.sign(x @ signs[0].T)
    for recurrence in range(1, bits):
        b = b + np.sign((x - unit(b @ back[recurrence - 1].T)) @ signs[recurrence].T) / 2**recurrence
    assert {*np.unique(b)} <= {*(np.arange(2**bits) * 2 - 2**bits + 1) / 2 ** (bits - 1)}
    np.testing.assert_allclose(unit(found) @ unit(found).T, unit(b) @ unit(b).T, atol=1e-5)


def test_training_begins_with_the_codes_of_any_vector(model: Path) -> None:
    coded, plain = (
        Student.create(tiny_student_config(model, pooling=Pooling.of(kind)), device="cpu", dtype="float32")
        for kind in ("binarised", "auto")
    )
    stored = make_format("binary", 32)
    codes = stored.encode(plain.encode_passages(TEXTS).vectors, TEXTS)
    np.testing.assert_array_equal(stored.encode(coded.encode_passages(TEXTS).vectors, TEXTS), codes)


def test_gradients_pass_where_values_are_small() -> None:
    values = torch.tensor([-3.0, -0.5, 0.0, 0.2, 1.5], requires_grad=True)
    signs = straight_through_sign(values)
    assert signs.tolist() == [-1, -1, 1, 1, 1]
    (signs * torch.arange(1.0, 6.0)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 4, 0]
