"""Means and variances as one inner product: the divergence by torch, an index of them, and the start as a cosine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from d2llm.core.errors import InputError
from d2llm.methods.poolings.multivariate import MultivariatePooling
from d2llm.models.export.export import export
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig, Pooling, StudentConfig
from d2llm.retrieval.index import Index
from tiny_models import TEXTS, tiny_student_config, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert")


def student_of(model: Path, pooling: str, head: str) -> Student:
    values = {"pooling": Pooling.of(pooling), "interaction": InteractionConfig.model_validate({"head": head})}
    config = StudentConfig.model_validate(tiny_student_config(model).model_dump() | values)
    return Student.create(config, device="cpu", dtype="float32")


@pytest.mark.parametrize("vector_format", ["float32", "int8"])
def test_the_inner_product_is_the_divergence_in_an_index_too(model: Path, vector_format: str, tmp_path: Path) -> None:
    student, plain = student_of(model, "multivariate", "divergence"), student_of(model, "auto", "cosine")
    pooling = student.pooling
    assert isinstance(pooling, MultivariatePooling)
    with torch.no_grad():
        pooling.spread.weight += 0.05 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        pooling.mean += 0.05 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        y = torch.from_numpy(plain.encode_passages(TEXTS).vectors)
        means, variances = y @ pooling.mean.T, (y @ pooling.spread.weight.T + pooling.spread.bias).exp().log1p()
    student.save(tmp_path / "student")
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    normals = [Independent(Normal(mean, variance.sqrt()), 1) for mean, variance in zip(means, variances, strict=True)]
    divergences = np.array([kl_divergence(normals[0], other) for other in normals])
    passages = student.encode_passages(TEXTS).vectors
    scores = student.score(student.encode_query(TEXTS[0]), passages, "asymmetric")
    np.testing.assert_allclose(scores - scores[0], -20 * divergences / 32, atol=1e-3)
    assert not student.why_no_interaction("asymmetric").endswith("cosine")

    index = Index.create(tmp_path / "index", student, vector_format=vector_format)
    index.upsert([{"id": str(row), "text": text} for row, text in enumerate(TEXTS)])
    found = index.search(TEXTS[0], top_k=3, exact=True)
    assert [int(result.passage.id) for result in found] == np.argsort(divergences)[:3].tolist()


def test_training_begins_with_the_cosine(model: Path) -> None:
    first, second = (
        student.predict([(TEXTS[0], text) for text in TEXTS], with_features=False)
        for student in (student_of(model, "multivariate", "divergence"), student_of(model, "auto", "cosine"))
    )
    np.testing.assert_allclose(first - first[0], second - second[0], atol=1e-4)
    vectors = student_of(model, "multivariate", "divergence").encode_passages(TEXTS).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 65**0.5, rtol=1e-5)


def test_head_and_pooling_need_one_another(model: Path, tmp_path: Path) -> None:
    for pooling, head in (("multivariate", "cosine"), ("auto", "divergence")):
        with pytest.raises(
            ValueError, match=f"pooling is {pooling} and interaction.head is {head}.*set both or neither"
        ):
            student_of(model, pooling, head)
    with pytest.raises(InputError, match="export another way"):
        export(student_of(model, "multivariate", "divergence"), tmp_path / "numpy", "numpy")
