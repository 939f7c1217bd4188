"""A student whose backbone is kept in 8 or 4 bits (QLoRA), against plain weights that were quantised by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError, RecipeError
from d2llm.models.export.sentence_transformers import why_not_plain
from d2llm.models.lora import adapter_state
from d2llm.models.student import Student
from d2llm.recipe import Lora
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes: pip install 'd2llm[large]'")


def tuned(model, quantization):
    config = tiny_student_config(model, tuning=Lora(rank=4, alpha=8.0, quantization=quantization))
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.1)
    return student.eval()


def vectors(student):
    return student.encode_passages(TEXTS).vectors


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_four_bits_and_adapters_are_computed_and_loaded(tmp_path, architecture):
    student = tuned(write_tiny_model(tmp_path / "model", architecture), "4bit")
    plain = tuned(tmp_path / "model", "none")
    assert not np.allclose(vectors(student), vectors(plain), rtol=1e-2)
    adapter = adapter_state(student.backbone.model)
    quantised, expected = (dict(one.backbone.model.named_modules()) for one in (student, plain))
    names = {name.rpartition(".")[0] for name in adapter}
    for name in names:
        weight = quantised[name].base_layer.weight
        change = adapter[f"{name}.lora_up"] @ adapter[f"{name}.lora_down"]
        with torch.no_grad():
            expected[name].base_layer.weight.copy_(functional.dequantize_4bit(weight, weight.quant_state) + change)
            expected[name].lora_B["default"].weight.zero_()
    np.testing.assert_allclose(vectors(student), vectors(plain), rtol=1e-3, atol=1e-3)
    student.save(tmp_path / "saved")
    loaded = Student.load(tmp_path / "saved", device="cpu", dtype="float32", engine="auto")
    assert loaded.fingerprint == student.fingerprint
    np.testing.assert_allclose(vectors(loaded), vectors(student), rtol=1e-3, atol=1e-3)


def test_eight_bits_train_and_what_needs_plain_weights_is_refused(tmp_path):
    student = tuned(write_tiny_model(tmp_path / "model"), "8bit")
    student.train()(*student.backbone.pad([[5, 6, 7]])).square().sum().backward()
    gradients = [weight.grad for name, weight in student.backbone.named_parameters() if "lora_A" in name]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    reason = "its weights are kept in 8 bits"
    assert why_not_plain(student.config) == reason
    with pytest.raises(InputError, match=f"one set of weights, which this student cannot give: {reason}"):
        student.save(tmp_path / "merged", merge=True)
    student.save(tmp_path / "saved")
    with pytest.raises(InputError, match=reason):
        Student.load(tmp_path / "saved", device="cpu", engine="openvino")


def test_two_adapters_are_refused():
    with pytest.raises(RecipeError, match='needs quantization = "none"'):
        Lora(adapters="two", quantization="4bit")
