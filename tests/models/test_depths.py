"""States after some layers, against a backbone that was loaded with these layers only; and students cut to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel
from typer.testing import CliRunner

from d2llm import Student
from d2llm.cli.main import app
from d2llm.core.errors import InputError, ModelError
from d2llm.models.backbone import Backbone
from d2llm.models.export.export import export
from d2llm.models.fitted_part import PassageQuality, TermWeights
from d2llm.models.interaction import Interaction
from d2llm.models.pretrained import final_module
from d2llm.models.student_files import check_content
from tiny_models import ARCHITECTURES, TEXTS, TWO_ADAPTERS, randomise, tiny_student_config, write_tiny_model

DEPTHS = (1, 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_a_model_with_these_layers(architecture: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", architecture, num_hidden_layers=3)
    config = tiny_student_config(model).backbone
    whole = Backbone.load(config, device="cpu", dtype="float32")
    inputs = whole.pad(whole.tokenize(TEXTS, "passage").ids)
    with torch.inference_mode():
        states, mask = whole.states_at(*inputs, DEPTHS)
        for depth, found in zip((*DEPTHS, 3), states, strict=True):
            cut = Backbone.load(config.model_copy(update={"layers": depth}), device="cpu", dtype="float32")
            expected, _ = cut(*inputs)
            torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_states_of_bert_are_its_hidden_states(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "bert", num_hidden_layers=3)
    backbone = Backbone.load(tiny_student_config(model).backbone, device="cpu", dtype="float32")
    ids, mask = backbone.pad(backbone.tokenize(TEXTS, "passage").ids)
    plain = AutoModel.from_pretrained(model).eval()
    with torch.inference_mode():
        hidden = plain(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        states, _ = backbone.states_at(ids, mask, DEPTHS)
    for depth, found in zip((*DEPTHS, 3), states, strict=True):
        torch.testing.assert_close(found[mask], hidden[depth][mask], rtol=1e-5, atol=1e-5)


def test_a_model_with_more_than_a_norm_after_its_layers_is_refused() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model, inputs = nn.ModuleDict({"layers": layers}).train(), torch.randn(2, 3, 4)

    def read() -> torch.Tensor:
        return 2 * layers[1](layers[0](inputs)) + 1

    with pytest.raises(ModelError, match=r"'odd' \(ModuleDict\) has more than a norm after its last layer"):
        final_module(model, layers, read, name="odd")
    assert all(module.training for module in model.modules())
    assert isinstance(final_module(model, layers, lambda: layers[1](layers[0](inputs)), name="plain"), nn.Identity)


def trained(model: Path, **backbone: str) -> Student:
    student = Student.create(tiny_student_config(model, **backbone), device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    return student.eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("m") / "bert", "bert", num_hidden_layers=3, initializer_range=0.1)


@pytest.mark.parametrize("kind", ["adapter", "merged", "two adapters"])
def test_a_student_is_cut_to_the_depths_that_it_was_trained_for(bert: Path, tmp_path: Path, kind: str) -> None:
    source = trained(bert, **({"tuning": TWO_ADAPTERS} if kind == "two adapters" else {}))
    content = {"nested_depths": [*DEPTHS], "nested_dims": [8], "tasks": ["asymmetric"], "dev": {}}
    source.save(tmp_path / "whole", merge=kind == "merged", content=content)
    whole = Student.load(tmp_path / "whole", device="cpu", dtype="float32")
    cut = whole.cut(2)
    assert (cut.backbone.num_layers, whole.backbone.num_layers) == (2, 3)
    assert (cut.nested_depths, cut.nested_dims) == ((1,), (8,))
    with torch.inference_mode():
        expected = [
            whole.pool(states[1], mask).numpy()  # after two layers
            for text_kind in ("query", "passage")
            for states, mask in [
                whole.backbone.states_at(*whole.backbone.pad(whole.tokenize(TEXTS, text_kind).ids), DEPTHS)
            ]
        ]
    cut.save(tmp_path / "cut")
    check_content(tmp_path / "cut")
    loaded = Student.load(tmp_path / "cut", device="cpu", dtype="float32")
    assert loaded.fingerprint == cut.fingerprint != whole.fingerprint
    assert loaded.cut(1).backbone.num_layers == 1
    for student in (cut, loaded):
        found = student.encode_queries(TEXTS).vectors, student.encode_passages(TEXTS).vectors
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    # Its score is the inner product, computed here from the head's maps.
    head = loaded.interaction
    assert isinstance(head, Interaction)
    assert head.dots is not None
    dot = head.dots["asymmetric"].state_dict()
    mapped = [expected[0] @ dot["query_map"].T.numpy(), expected[1] @ dot["passage_map"].T.numpy()]
    scores = float(dot["log_scale"].exp()) / loaded.vector_dim * mapped[0][0] @ mapped[1].T
    np.testing.assert_allclose(loaded.score(found[0][0], found[1], "asymmetric"), scores, rtol=1e-3, atol=1e-3)
    assert not loaded.score_features
    assert whole.backbone.num_layers == 3


def test_what_was_fitted_to_all_layers_does_not_stay_with_fewer(bert: Path, tmp_path: Path) -> None:
    trained(bert).save(tmp_path / "whole", content={"nested_depths": [2]})
    whole = Student.load(tmp_path / "whole", device="cpu", dtype="float32")
    weights = (0.0,) * whole.vector_dim
    whole.quality = PassageQuality(weights=weights, num_passages={}, num_relevant={}, auc={})
    whole.term_weights = TermWeights(weights=weights, offset=0.5, usual=0.5, num_words={}, explained={})
    whole.cut(2).save(tmp_path / "cut")
    cut = Student.load(tmp_path / "cut", device="cpu", dtype="float32")
    assert (cut.quality, cut.term_weights) == (None, None)
    assert whole.quality is not None
    assert whole.term_weights is not None


def test_other_depths_are_refused(bert: Path, tmp_path: Path) -> None:
    trained(bert).save(tmp_path / "plain")
    trained(bert).save(tmp_path / "nested", content={"nested_depths": [1]})
    with pytest.raises(InputError, match=r"to be cut to 1 layers; train one with losses\.nested_cross_entropy\.layers"):
        Student.load(tmp_path / "plain", device="cpu").cut(1)
    with pytest.raises(InputError, match="not trained to be cut to 2 layers; cut it to 1"):
        Student.load(tmp_path / "nested", device="cpu").cut(2)
    with pytest.raises(InputError, match="the student folder is in float32"):
        export(Student.load(tmp_path / "nested", device="cpu"), tmp_path / "s", "student", int8=True)


def test_the_command_export_writes_a_student_of_fewer_layers(bert: Path, tmp_path: Path) -> None:
    trained(bert).save(tmp_path / "nested", content={"nested_depths": [1]})
    arguments = ["export", str(tmp_path / "nested"), "--to", "student", "--depth", "1", "--out", str(tmp_path / "cut")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    cut = Student.load(tmp_path / "cut", device="cpu", dtype="float32")
    assert cut.backbone.num_layers == 1
    assert cut.config.backbone.layers == 1
