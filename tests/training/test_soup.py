"""Students whose weights are the average of others' (model soups), by numpy and by the vectors they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from d2llm.core.errors import InputError
from d2llm.models.student import Student
from d2llm.recipe import Full, Lora, Pooling
from d2llm.training import soup as module
from d2llm.training.soup import greedy_soup, soup
from tiny_data import topics
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert")


def trained(model: Path, folder: Path, *, seed: int, **backbone: Any) -> Student:
    """A student with weights as of its own training, saved and loaded."""
    student = Student.create(tiny_student_config(model, **backbone), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, seed=seed, scale=0.1)
    student.eval()
    student.save(folder / f"{seed}")
    return Student.load(folder / f"{seed}", device="cpu", dtype="float32")


@pytest.mark.parametrize("tuning", [Lora(rank=4, alpha=8.0), Full()])
def test_weights_are_the_mean_of_merged_weights(model: Path, tmp_path: Path, tuning: Any) -> None:
    students = [trained(model, tmp_path, seed=seed, tuning=tuning) for seed in (1, 2, 3)]
    fractions = np.array([0.5, 0.3, 0.2])
    folders: list[Path] = []
    for index, student in enumerate(students):
        folders.append(tmp_path / f"merged-{index}")
        student.save(folders[-1], merge=True)
    averaged = soup(students, [5, 3, 2])
    averaged.save(tmp_path / "soup")
    for file in ("backbone/model.safetensors", "head.safetensors"):
        written, *singles = (load_file(folder / file) for folder in (tmp_path / "soup", *folders))
        assert all(written.keys() == single.keys() for single in singles)
        for name, weights in written.items():
            mean = sum(
                share * single[name].astype(np.float64) for share, single in zip(fractions, singles, strict=True)
            )
            np.testing.assert_allclose(weights, mean, rtol=1e-5, atol=1e-6, err_msg=name)
    read = Student.load(tmp_path / "soup", device="cpu", dtype="float32")
    vectors = read.encode_passages(TEXTS).vectors
    np.testing.assert_allclose(vectors, averaged.encode_passages(TEXTS).vectors, atol=1e-5)
    assert read.fingerprint == averaged.fingerprint not in {student.fingerprint for student in students}
    assert not np.allclose(vectors, students[0].encode_passages(TEXTS).vectors, atol=0.1)
    same = soup([students[0]] * 2)
    np.testing.assert_allclose(
        same.encode_passages(TEXTS).vectors, students[0].encode_passages(TEXTS).vectors, atol=1e-4
    )


def test_ranks_of_adapters_may_differ_and_nothing_else(model: Path, tmp_path: Path) -> None:
    first = trained(model, tmp_path, seed=1)
    assert soup([first, trained(model, tmp_path, seed=2, tuning=Lora(rank=2, alpha=4.0))])
    other = trained(model, tmp_path, seed=3, pooling=Pooling.of("mean"))
    with pytest.raises(InputError, match=r"not of one shape: .*pooling.kind \(was pma, is mean\)"):
        soup([first, other])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="positive number for each of 2 students"):
            soup([first, first], weights)
    with pytest.raises(InputError, match="needs two students or more; 1 given"):
        soup([first])


def test_the_greedy_soup_leaves_out_what_does_harm(model, tmp_path, monkeypatch):
    students = [trained(model, tmp_path, seed=seed) for seed in (1, 2, 3, 4)]
    names = {student.fingerprint: index for index, student in enumerate(students)}
    measured = {(0,): 0.5, (1,): 0.7, (2,): 0.4, (3,): 0.6, (1, 3): 0.7, (1, 3, 0): 0.6, (1, 3, 2): 0.8}

    def mean_value(result: Any) -> float:
        return measured[result]

    def evaluate(student: Student, dev_sets: Any) -> Any:
        members = [names[name] for name, _ in student._recorded.get("soup", [(student.fingerprint, 1.0)])]
        return tuple(members)

    monkeypatch.setattr(module, "evaluate_dev", evaluate)
    monkeypatch.setattr(module, "mean_value", mean_value)
    monkeypatch.setattr(module, "choose_interaction_weights", lambda result: {"asymmetric": 0.25})
    found = greedy_soup(students, [topics()])
    assert found.kept == (1, 3, 2)
    assert (found.value, found.values) == (0.8, (0.5, 0.7, 0.4, 0.6))
    assert float(found.student.interaction.interaction_weight("asymmetric")) == 0.25
    expected = soup([students[index] for index in found.kept])
    for (_, one), (_, other) in zip(
        expected.backbone.named_parameters(), found.student.backbone.named_parameters(), strict=True
    ):
        assert torch.equal(one, other)
