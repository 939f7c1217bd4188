"""Students with fewer neurons: which go, what the others take over, and what cannot be pruned."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from d2llm.core.errors import InputError
from d2llm.models.neurons import keep_columns, prune_neurons
from d2llm.models.student import Student
from tiny_models import TEXTS, TWO_ADAPTERS, randomise, tiny_student_config, write_tiny_model

DAMPING = 1e-3


def new_student(folder: Path, architecture: str, **settings: Any) -> Student:
    """A student with an adapter, saved and loaded."""
    write_tiny_model(folder / "model", architecture)
    student = Student.create(tiny_student_config(folder / "model", **settings), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    student.save(folder / "student")
    return Student.load(folder / "student", device="cpu", dtype="float32")


def linear(module: torch.nn.Module, name: str) -> torch.nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    return layer


def least_squares(weight: np.ndarray, inputs: np.ndarray, kept: list[int]) -> tuple[np.ndarray, float]:
    """The weights of some inputs that give what all give, as nearly as damping lets them, and the square error."""
    damping = DAMPING * (inputs**2).mean(axis=0).mean()
    rows = np.concatenate([inputs / len(inputs) ** 0.5, damping**0.5 * np.eye(inputs.shape[1])])
    solution = np.linalg.lstsq(rows[:, kept], rows @ weight.T, rcond=None)[0]
    return solution.T, float(((rows[:, kept] @ solution - rows @ weight.T) ** 2).sum())


def test_columns_that_others_replace_go_first() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((200, 6)) @ generator.standard_normal((6, 6))
    weight = generator.standard_normal((3, 6))
    covariance = torch.from_numpy(inputs.T @ inputs / len(inputs))
    remaining = list(range(6))
    for count in (5, 4, 3):  # the best of those that remain, at every step
        choices = combinations(remaining, count)
        remaining = list(min(choices, key=lambda kept: least_squares(weight, inputs, list(kept))[1]))
        kept, smaller = keep_columns(torch.from_numpy(weight), covariance, count)
        assert kept.tolist() == remaining
        np.testing.assert_allclose(smaller, least_squares(weight, inputs, remaining)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_what_stays_makes_up_for_what_goes(tmp_path: Path, architecture: str) -> None:
    student = new_student(tmp_path, architecture)
    inputs: list[torch.Tensor] = []
    layer, down = ("encoder.layer.0", "output.dense") if architecture == "bert" else ("layers.0", "mlp.down_proj")
    up = ("intermediate.dense",) if architecture == "bert" else ("mlp.gate_proj", "mlp.up_proj")
    before = student.backbone.model.get_submodule(layer)
    hook = before.get_submodule(down).register_forward_hook(lambda _, args, __: inputs.append(args[0].flatten(0, 1)))
    for ids in student.backbone.tokenize(TEXTS, "passage").ids:
        student.backbone.model(input_ids=torch.tensor([ids]))
    hook.remove()
    states = torch.cat(inputs).detach().double().numpy()
    prune_neurons(student, TEXTS, 0.5).save(tmp_path / "pruned", merge=True)
    pruned = Student.load(tmp_path / "pruned", device="cpu", dtype="float32")
    after = pruned.backbone.model.get_submodule(layer)
    old, new = (linear(module, down) for module in (before, after))
    assert (pruned.backbone.model.config.intermediate_size, tuple(new.weight.shape)) == (24, (32, 24))
    rows = {name: [linear(module, name).weight for module in (before, after)] for name in up}
    all_rows, kept_rows = next(iter(rows.values()))
    kept = [int((all_rows == row).all(dim=1).nonzero()[0, 0]) for row in kept_rows]
    assert all(torch.equal(of_all[kept], of_kept) for of_all, of_kept in rows.values())
    mean = states.mean(axis=0) * (architecture == "bert")  # without a bias, nothing makes up for the mean
    weight = old.weight.detach().double().numpy()
    np.testing.assert_allclose(new.weight.detach(), least_squares(weight, states - mean, kept)[0], atol=1e-3)
    if architecture == "bert":
        expected = (states @ weight.T).mean(axis=0) + old.bias.detach().numpy()
        given = (states[:, kept] @ new.weight.detach().double().numpy().T).mean(axis=0) + new.bias.detach().numpy()
        np.testing.assert_allclose(given, expected, atol=1e-4)
    assert pruned.fingerprint != student.fingerprint
    plain = AutoModel.from_pretrained(tmp_path / "pruned" / "backbone")
    assert plain.config.intermediate_size == 24


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    student = new_student(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="no texts"):
        prune_neurons(student, [], 0.5)
    with pytest.raises(InputError, match=r"keep is 1\.5"):
        prune_neurons(student, TEXTS, 1.5)
    with pytest.raises(InputError, match="are not linear layers into"):
        prune_neurons(new_student(tmp_path / "modernbert", "modernbert"), TEXTS, 0.5)
    with pytest.raises(InputError, match="adapters of their own"):
        prune_neurons(new_student(tmp_path / "two", "bert", tuning=TWO_ADAPTERS), TEXTS, 0.5)
    student.prepare_training()
    with pytest.raises(InputError, match="adapters in training"):
        prune_neurons(student, TEXTS, 0.5)
