"""Kinds of backbones: how a recipe names one, and those that other packages add."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError, RecipeError
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Lora, StudentConfig
from d2llm.recipe.recipe import load_recipe_text
from d2llm.reports.methods import describe_methods
from installed_package import install
from tiny_data import tiny_recipe
from tiny_models import TEXTS, tiny_student_config

THEIRS = """
import torch

from d2llm.core.fingerprint import fingerprint_json
from d2llm.models.backbone import Backbone
from d2llm.models.sources import load_tokenizer
from d2llm.recipe import CustomBackbone


class Hashed(CustomBackbone, kind="hashed"):
    '''A vector for each bucket of tokens.'''

    paper = "Weinberger et al., ICML 2009"
    num_buckets: int = 64

    def open(self, pooling, *, device, compute_dtype, student):
        return HashedTokens(self, pooling).to(device)


class HashedTokens(Backbone):
    dim = 12

    def __init__(self, config, pooling):
        super().__init__(config, pooling)
        self.tokenizer = load_tokenizer(config.model)
        start = torch.randn(config.num_buckets, self.dim, generator=torch.Generator().manual_seed(0))
        self.vectors = torch.nn.Parameter(start, requires_grad=False)

    def fingerprint_base(self):
        return fingerprint_json(["hashed", len(self.vectors)])

    def forward(self, token_ids, mask):
        return self.vectors[token_ids % len(self.vectors)], mask
"""


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_another_package_adds_a_backbone(workspace, tmp_path, monkeypatch, tuning: str):
    site, folder = tmp_path / "site", tmp_path / "student"
    with monkeypatch.context() as patch:
        install(site, THEIRS, BackboneConfig.kinds, {"hashed": "Hashed"}, patch)
        section = (
            f"[student.backbone]\nkind = 'hashed'\nnum_buckets = 50\ntuning = '{tuning}'\nmodel = '{workspace.model}'"
        )
        backbone = load_recipe_text(section, where="recipe.toml").student.backbone
        config = tiny_student_config(workspace.model).model_copy(update={"backbone": backbone})
        start = Student.create(config, device="cpu", dtype="float32")
        report = workspace.run(folder, recipe=tiny_recipe(start.config, learning_rate=1e-2, head_learning_rate=1e-2))
        assert report.steps > 0
        student = Student.load(folder, device="cpu", dtype="float32")
        assert json.loads((folder / "manifest.json").read_text())["config"]["backbone"]["kind"] == "hashed"
        change = (student.backbone.vectors - start.backbone.vectors).abs()
        assert (change.max() > 1e-3) == (tuning == "full")
        vectors = student.encode_passages(TEXTS).vectors
        student.save(tmp_path / "copy")
        again = Student.load(tmp_path / "copy", device="cpu", dtype="float32", engine="auto")
        np.testing.assert_array_equal(again.encode_passages(TEXTS).vectors, vectors)
        assert again.fingerprint == student.fingerprint
        assert describe_methods()["student.backbone"]["hashed"].paper == "Weinberger et al., ICML 2009"
        with pytest.raises(InputError, match="hashed backbone, whose weights cannot be read or exported"):
            _ = student.backbone.model
        with pytest.raises(InputError, match="merge=False"):
            student.save(tmp_path / "merged", merge=True)
        for wrong, message in (("layers = 2", "layers cannot be set for a hashed"), ("tuning = 'lora'", "no adapters")):
            with pytest.raises(RecipeError, match=message):
                load_recipe_text(f"[student.backbone]\nkind = 'hashed'\n{wrong}", where="recipe.toml")
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    with pytest.raises(DataFormatError, match=r"config\.backbone.*no backbone 'hashed'.*install the package"):
        Student.load(folder)


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({}, "minilm"),
        ("e5", "e5"),
        ({"model": "e5"}, "e5"),
        ({"model": "owner/e5"}, "transformers"),
        ({"model": "model2vec"}, "transformers"),  # a folder, since no package has a model of this name
        ({"kind": "e5", "model": "folder"}, "e5"),
        ({"model": "served", "remote": {"url": "http://a/v1", "dimensions": 4}}, "remote"),
        ({"model": "smollm2", "remote": None}, "smollm2"),
    ],
)
def test_what_names_a_kind(section: object, kind: str) -> None:
    backbone = StudentConfig.model_validate({"backbone": section}).backbone
    assert backbone.kind == kind
    written = backbone.model_dump(mode="json")
    assert BackboneConfig.of(written) == backbone
    # A kind that the other settings do not name is written.
    assert ("kind" in written) == (section == {"kind": "e5", "model": "folder"})


def test_a_kind_has_settings_of_its_own() -> None:
    assert BackboneConfig(model="e5").passage_prefix == "passage: "
    assert BackboneConfig(model="minilm", tuning=Lora(rank=4)).passage_prefix == ""
    with pytest.raises(RecipeError, match=r"unknown key 'student\.backbone\.remote'.*setting of kind remote"):
        load_recipe_text("[student.backbone]\nkind = 'minilm'\nremote.dimensions = 4", where="recipe.toml")
