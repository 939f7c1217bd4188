"""Imitating a teacher's principal components (HPD): the loss by a formula of its own, and what the student keeps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.methods.pretraining.components import _ComponentsOfVectors
from d2llm.models.backbone import Backbone
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Pooling, Pretraining, Recipe
from d2llm.recipe.losses import Objective
from d2llm.training import pretrain
from tiny_data import JUDGEMENTS, tiny_recipe, topics
from tiny_distill import Workspace
from tiny_models import TEXTS, tiny_student_config, write_tiny_model

PASSAGES = [f"{one} {other}" for one in TEXTS for other in TEXTS if one != other]
SETTINGS = {"kind": "components", "batch_texts": 8, "max_tokens": 64}
NARROW = Pooling.of({"kind": "projection", "dim": 6})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert", num_hidden_layers=3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "wide", "bert", hidden_size=64, num_hidden_layers=3)


def new_student(model: Path, pooling: Pooling = NARROW) -> Student:
    config = tiny_student_config(model, pooling=pooling, tuning="full", layers=(0, 2))
    return Student.create(config, device="cpu", dtype="float32")


def on_sphere(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(vectors.shape[1])


def components_of(teacher: Backbone) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean states of all passages, and their first principal directions by a singular value decomposition."""
    means: list[np.ndarray[Any, Any]] = []
    for text in PASSAGES:
        ids = torch.tensor(teacher.tokenize([text], "passage").ids)
        with torch.no_grad():
            means.append(teacher.model(input_ids=ids).last_hidden_state[0].double().mean(dim=0).numpy())
    vectors = on_sphere(np.stack(means))
    return vectors, np.linalg.svd(vectors - vectors.mean(axis=0))[2][:6]


@pytest.mark.parametrize("taught_by", ["itself", "wide"])
def test_vectors_become_the_teachers_components(model: Path, wide: Path, taught_by: str, tmp_path: Path) -> None:
    teacher_model, settings = (model, {}) if taught_by == "itself" else (wide, {"teacher": str(wide)})
    student = new_student(model)
    settings = Pretraining.of(SETTINGS | settings | {"epochs": 8})
    run = pretrain._Pretraining(student, PASSAGES, [], tmp_path / "run", settings, 0)
    linear, found = (
        run.trainer.parameters[f"added.{name}.weight"].detach().double().numpy() for name in ("linear", "components")
    )
    taught, directions = components_of(
        Backbone.load(BackboneConfig(model=str(teacher_model)), device="cpu", dtype="float32")
    )
    agreement = np.sum(found * directions, axis=1)
    np.testing.assert_allclose(np.abs(agreement), 1, rtol=1e-4)
    targets = taught @ (np.sign(agreement)[:, None] * directions).T  # a direction has no sign
    own = components_of(student.backbone)[0]
    with torch.no_grad():
        loss = sum(float(each) for each in run.task.losses(run.texts, random.Random(0)))
    assert loss == pytest.approx(((own @ linear.T - targets) ** 2).mean(), rel=1e-4)
    run.train()
    vectors, wanted = student.encode_passages(PASSAGES).vectors, on_sphere(targets)
    before, after = (np.mean(np.sum(each * wanted, axis=1)) / 6 for each in (on_sphere(own @ linear.T), vectors))
    assert after > before + 0.02  # cosines; before, those of the map that training begins with
    assert torch.equal(student.pooling.stages[0].projection, run.trainer.parameters["added.linear.weight"])
    student.fit_pooling(TEXTS)  # fits nothing any more: eight texts would be too few
    np.testing.assert_array_equal(student.encode_passages(PASSAGES).vectors, vectors)
    again = new_student(model)
    pretrain.pretrain_backbone(again, PASSAGES, tmp_path / "run", run.config)  # takes up what is finished
    np.testing.assert_array_equal(again.encode_passages(PASSAGES).vectors, vectors)


@pytest.mark.parametrize(
    "pooling", ["mean", {"kind": "projection", "dim": 6, "pooling": {"kind": "pma", "num_heads": 4}}]
)
def test_without_a_projection_to_train_it_is_refused(model: Path, pooling: Any, tmp_path: Path) -> None:
    student = new_student(model, Pooling.of(pooling))
    with pytest.raises(InputError, match=r"set student\.pooling to one"):
        pretrain.pretrain_backbone(student, PASSAGES, tmp_path / "run", Pretraining.of(SETTINGS))
    sections = {"backbone": {"layers": (0, 2)}, "pooling": pooling}
    with pytest.raises(ValueError, match=r"set student\.pooling to one"):
        Recipe.model_validate({"student": sections, "training": {"pretraining": SETTINGS}})


def test_a_distillation_goes_on_with_the_trained_projection(model, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path)
    workspace.source = topics(num_passages=48)
    student = tiny_student_config(model, pooling=NARROW, layers=(0, 2))
    trained: list[torch.Tensor] = []
    end = _ComponentsOfVectors.end

    def keep(task: Any, pooling: Any) -> None:
        end(task, pooling)
        trained.append(pooling.projection.detach().clone())

    monkeypatch.setattr(_ComponentsOfVectors, "end", keep)
    settings = {"losses": Objective(JUDGEMENTS), "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    workspace.run(tmp_path / "student-128", recipe=tiny_recipe(student, **settings, pretraining=SETTINGS))
    distilled = Student.load(tmp_path / "student-128", device="cpu", dtype="float32")
    torch.testing.assert_close(distilled.pooling.stages[0].projection.detach(), trained[0], atol=1e-5, rtol=1e-5)


def test_a_teacher_has_as_many_components(model: Path, wide: Path, tmp_path: Path) -> None:
    student = new_student(wide, Pooling.of({"kind": "projection", "dim": 40}))
    settings = Pretraining.of(SETTINGS | {"teacher": str(model)})
    with pytest.raises(InputError, match="have only 32 components"):
        pretrain.pretrain_backbone(student, PASSAGES, tmp_path / "run", settings)
