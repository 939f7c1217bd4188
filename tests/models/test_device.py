from __future__ import annotations

import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.models.device import choose_device, choose_dtype, cpu_has_fast_bfloat16, devices_here, inference

CPU = torch.device("cpu")


def test_a_device_asked_for_is_taken():
    assert choose_device("cpu") == CPU
    assert choose_device(CPU) == CPU
    assert choose_device() in (CPU, torch.device("cuda"), torch.device("mps"))


@pytest.mark.parametrize("name", ["toaster", "cuda:99", "mps", "xpu"])
def test_a_device_that_is_not_there_is_told_in_one_line(name):
    if name in devices_here():
        pytest.skip("it is there")
    with pytest.raises(InputError, match=f"device '{name}' cannot be used here") as told:
        choose_device(name)
    assert f"use one of {', '.join(devices_here())}, or leave it out" in str(told.value)
    assert len(str(told.value)) < 120 or name == "cuda:99"


def test_dtype_by_name_by_value_and_by_machine(monkeypatch):
    assert choose_dtype(CPU, "float16") == torch.float16
    assert choose_dtype(CPU, torch.float64) == torch.float64
    monkeypatch.setattr("d2llm.models.device.cpu_has_fast_bfloat16", lambda: True)
    assert choose_dtype(CPU) == torch.bfloat16
    monkeypatch.setattr("d2llm.models.device.cpu_has_fast_bfloat16", lambda: False)
    assert choose_dtype(CPU) == torch.float32
    with pytest.raises(InputError, match="unknown dtype 'float8'; use one of float32, bfloat16, float16"):
        choose_dtype(CPU, "float8")


def test_fast_bfloat16_is_a_plain_answer():
    assert cpu_has_fast_bfloat16() in (True, False)


def test_inference_puts_the_training_mode_back():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).train()
    with inference(model):
        assert not model[0].training
        assert torch.equal(model(torch.ones(100)), torch.ones(100))
        assert torch.is_inference_mode_enabled()
    assert model.training
    assert model[0].training
    with pytest.raises(KeyError), inference(model):
        raise KeyError
    assert model[0].training
    model.eval()
    with inference(model):
        pass
    assert not model.training
