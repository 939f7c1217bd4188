"""Kinds of poolings: what the section asks of them, and those that other packages add."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from d2llm.core.errors import DataFormatError
from d2llm.models.student import Student
from d2llm.recipe import AutoPooling, Pooling, StudentConfig
from d2llm.recipe.recipe import load_recipe_text
from installed_package import install
from tiny_data import tiny_recipe
from tiny_distill import Workspace
from tiny_models import TEXTS, tiny_student_config

THEIRS = """
import torch

from d2llm.models.pooling import TextPooling
from d2llm.recipe import Pooling


class Largest(Pooling, kind="largest"):
    '''The largest value of each component.'''

    scale: float = 1.0
    '''Factor of the states.'''

    def pool(self, states, mask):
        return (self.scale * states).masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)


class OneQuery(Pooling, kind="one_query"):
    '''A learned query attends over the tokens.'''

    def module(self, backbone):
        return Attention(backbone.dim)


class Attention(TextPooling):
    def __init__(self, dim):
        super().__init__(dim)
        self.query = torch.nn.Parameter(torch.randn(dim) / dim)

    def forward(self, states, mask):
        weights = (states.float() @ self.query).masked_fill(~mask, -torch.inf).softmax(dim=1)
        return (weights.unsqueeze(-1) * states.float()).sum(dim=1)
"""
KINDS = {"largest": "Largest", "one_query": "OneQuery"}


@pytest.mark.parametrize("text", ["largest", "{ kind = 'projection', dim = 8, pooling = 'one_query' }", "one_query"])
def test_another_package_adds_a_pooling(workspace, tmp_path, monkeypatch, text: str):
    site, folder = tmp_path / "site", tmp_path / "student"
    with monkeypatch.context() as patch:
        install(site, THEIRS, Pooling.kinds, KINDS, patch)
        named = text if text.startswith("{") else f"'{text}'"
        pooling = load_recipe_text(f"[student]\npooling = {named}", where="recipe.toml").student.pooling
        start = Student.create(tiny_student_config(workspace.model, pooling=pooling), device="cpu", dtype="float32")
        report = workspace.run(folder, recipe=tiny_recipe(start.config, learning_rate=1e-3, head_learning_rate=1e-2))
        assert report.steps > 0
        student = Student.load(folder, device="cpu", dtype="float32")
        vectors = student.encode_passages(TEXTS).vectors
        assert np.abs(vectors - start.encode_passages(TEXTS).vectors).max() > 1e-3
        student.save(tmp_path / "copy", merge=True)
        again = Student.load(tmp_path / "copy", device="cpu", dtype="float32")
        np.testing.assert_allclose(again.encode_passages(TEXTS).vectors, vectors, rtol=1e-4, atol=1e-5)
        assert again.fingerprint == student.fingerprint
        # Padding and the other texts of a batch do not count.
        np.testing.assert_allclose(again.encode_passages(TEXTS[:1]).vectors[0], vectors[0], rtol=1e-4, atol=1e-5)
        names = {name for name, _ in student.pooling.named_parameters()}
        assert any(name.endswith("query") for name in names) == ("one_query" in text)
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    kind = "largest" if "largest" in text else "one_query"
    with pytest.raises(DataFormatError, match=rf"config\.pooling.*no pooling '{kind}'.*install the package"):
        Student.load(folder)


def test_a_pooling_of_ones_own_is_known_at_once(workspace: Workspace) -> None:
    class Signed(Pooling, kind="signed_for_a_test"):
        """The mean of the signs."""

        def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (states.sign() * mask.unsqueeze(-1)).sum(dim=1)

    config = tiny_student_config(workspace.model, pooling=Pooling(kind="signed_for_a_test"))
    student = Student.create(config, device="cpu", dtype="float32")
    text = TEXTS[:1]
    with torch.inference_mode():
        states, mask = student.backbone(*student.backbone.pad(student.backbone.tokenize(text, "passage").ids))
    expected = states[mask].sign().sum(dim=0).numpy()
    expected *= np.sqrt(len(expected)) / np.linalg.norm(expected)
    np.testing.assert_allclose(student.encode_passages(text).vectors[0], expected, rtol=1e-5)
    assert isinstance(config.pooling, Signed)


@pytest.mark.parametrize(
    ("pooling", "own"),
    [
        ("auto", "auto"),
        ("weighted_mean", "weighted_mean"),
        ({"kind": "pma", "pooling": "last"}, "last"),
        ({"kind": "pma", "pooling": "last", "warm_start": False}, "last"),
        ({"kind": "whitening", "pooling": {"kind": "projection", "dim": 8, "pooling": "first"}}, "first"),
    ],
)
def test_the_own_pooling_has_no_weights(pooling: object, own: str) -> None:
    config = StudentConfig.model_validate({"pooling": pooling})
    assert config.pooling.weightless.kind == own
    assert not config.pooling.weightless.is_trained


def test_what_is_trained_says_so() -> None:
    poolings = [Pooling(kind="pma"), Pooling(kind="projection", dim=8), Pooling(kind="whitening", pooling="pma")]
    assert all(pooling.is_trained for pooling in poolings)
    assert not AutoPooling().is_trained
    assert not Pooling(kind="whitening").is_trained
