"""What a student's pooling takes from the passages of its data sets, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import WholeText
from d2llm.models.student import Student
from d2llm.models.student_files import check_content
from d2llm.recipe import Pooling
from d2llm.recipe.losses import Objective
from tiny_data import JUDGEMENTS, tiny_recipe, topics
from tiny_distill import LEARNING, Workspace
from tiny_models import DIM, TEXTS, TINY_PMA, tiny_student_config

NUM_PASSAGES = 48


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    workspace.source = topics(num_passages=NUM_PASSAGES)
    return workspace


def test_a_distilled_student_is_whitened_on_the_passages(workspace: Workspace, tmp_path: Path) -> None:
    config = tiny_student_config(workspace.model)
    whitened = config.model_copy(update={"pooling": Pooling(kind="pma", num_heads=4, pooling="whitening")})
    recipe = tiny_recipe(whitened).model_copy(update={"losses": Objective(JUDGEMENTS)})
    workspace.run(tmp_path / "student", recipe=recipe)
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    own = Student.create(config, device="cpu", dtype="float32")
    vectors = own.encode_passages([p.full_text for p in workspace.source.dataset.passages.values()]).vectors
    np.testing.assert_allclose(student.pooling.stages[-2].mean.numpy(), vectors.mean(axis=0), rtol=1e-3, atol=1e-4)


def test_a_distilled_student_has_vectors_of_fewer_dimensions(workspace: Workspace, tmp_path: Path) -> None:
    """Before training they are the principal components of the vectors, here found by an SVD."""
    config = tiny_student_config(workspace.model)
    narrow = config.model_copy(update={"pooling": Pooling(kind="projection", dim=8, pooling=TINY_PMA)})
    source = topics()
    passages = [p.full_text for p in source.dataset.passages.values()]
    vectors = Student.create(config, device="cpu", dtype="float32").encode_passages(passages).vectors
    wide = vectors.astype(np.float64)
    _, _, directions = np.linalg.svd(wide - wide.mean(axis=0))
    projected = wide @ directions[:8].T
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    start = Student.create(narrow, device="cpu", dtype="float32")
    start.fit_pooling(passages)
    assert start.vector_dim == 8
    found = start.encode_passages(passages).vectors
    np.testing.assert_allclose(found @ found.T / 8, projected @ projected.T, rtol=1e-3, atol=1e-4)
    recipe = tiny_recipe(narrow, **LEARNING).model_copy(update={"losses": Objective(JUDGEMENTS)})
    report = workspace.run(tmp_path / "student", recipe=recipe, source=source)
    assert report.best_step > 0
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    check_content(tmp_path / "student")
    assert student.encode_queries(["a"]).vectors.shape == (1, student.vector_dim) == (1, 8)
    assert (student.pooling.projection - start.pooling.projection).abs().max() > 1e-4  # trained
    chunks = student.encode_chunks([(WholeText("Cows drink water."), [(0, 17)])]).vectors
    np.testing.assert_allclose(chunks, student.encode_passages(["Cows drink water."]).vectors, rtol=1e-4, atol=1e-4)


def test_a_projection_must_be_narrower_than_the_backbone(workspace: Workspace) -> None:
    config = tiny_student_config(workspace.model)
    wide = config.model_copy(update={"pooling": Pooling(kind="projection", dim=DIM, pooling=TINY_PMA)})
    with pytest.raises(
        InputError, match=f"pooling.dim is {DIM}, but the vectors to project have only {DIM} components"
    ):
        Student.create(wide, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "pooling",
    [
        {"kind": "pma", "num_heads": 4, "pooling": "whitening"},
        {"kind": "projection", "dim": 8},
        {"kind": "whitening", "pooling": {"kind": "projection", "dim": 8}},
    ],
)
def test_fitting_twice_gives_the_same(workspace: Workspace, pooling: dict[str, Any]) -> None:
    config = tiny_student_config(workspace.model, pooling=Pooling.of(pooling))
    student = Student.create(config, device="cpu", dtype="float32")
    passages = [" ".join(TEXTS[n % 8].split()[n % 5 :] + TEXTS[n % 7].split()) for n in range(2 * DIM)]
    before, raw = student.fingerprint, student.encode_passages(passages).vectors
    student.fit_pooling(passages)
    once, fingerprint = student.encode_passages(passages).vectors, student.fingerprint
    student.fit_pooling(passages)
    np.testing.assert_array_equal(student.encode_passages(passages).vectors, once)
    assert before != fingerprint == student.fingerprint
    assert np.abs(once - raw).max() > 0.1


def test_too_few_passages_and_loaded_students_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    config = tiny_student_config(workspace.model).model_copy(
        update={"pooling": Pooling(kind="pma", num_heads=4, pooling="whitening")}
    )
    student = Student.create(config, device="cpu", dtype="float32")
    with pytest.raises(InputError, match=rf"more than {DIM} passages, .* but there are 8"):
        student.fit_pooling(TEXTS)
    student.save(tmp_path / "student")
    with pytest.raises(InputError, match="was loaded"):
        Student.load(tmp_path / "student", device="cpu").fit_pooling(TEXTS)
