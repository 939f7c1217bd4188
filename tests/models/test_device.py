from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, GPT2Config, Qwen2Config, T5Config

from d2llm.core.errors import InputError
from d2llm.models.device import (
    choose_device,
    choose_dtype,
    cpu_has_fast_bfloat16,
    devices_here,
    inference,
    size_of_states,
    tokens_to_read,
    tokens_to_train,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # nothing is put there
GIB = 1 << 30
MINILM, SMOLLM2, SEVEN_BILLION = 6 * 384, 30 * 576, 28 * 3584
"""Sizes of the states of a token."""


def test_a_requested_device_is_used():
    assert choose_device("cpu") == CPU
    assert choose_device(CPU) == CPU
    assert choose_device() in (CPU, torch.device("cuda"), torch.device("mps"))


@pytest.mark.parametrize("name", ["toaster", "cuda:99", "mps", "xpu"])
def test_an_unavailable_device_gets_a_one_line_error(name):
    if name in devices_here():
        pytest.skip("it is there")
    with pytest.raises(InputError, match=f"device '{name}' cannot be used here") as raised:
        choose_device(name)
    assert f"use one of {', '.join(devices_here())}, or leave it out" in str(raised.value)
    assert len(str(raised.value)) < 120 or name == "cuda:99"


def test_dtype_by_name_by_value_and_by_default(monkeypatch):
    assert choose_dtype(CPU, "float16") == torch.float16
    assert choose_dtype(CPU, torch.float64) == torch.float64
    monkeypatch.setattr("d2llm.models.device.cpu_has_fast_bfloat16", lambda: True)
    assert choose_dtype(CPU) == torch.bfloat16
    monkeypatch.setattr("d2llm.models.device.cpu_has_fast_bfloat16", lambda: False)
    assert choose_dtype(CPU) == torch.float32
    with pytest.raises(InputError, match="unknown dtype 'float8'; use one of float32, bfloat16, float16"):
        choose_dtype(CPU, "float8")


@pytest.mark.parametrize("flag", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bfloat16_is_fast_if_the_cpu_and_onednn_have_it(flag, monkeypatch):
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in flags:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not cpu_has_fast_bfloat16.__wrapped__()
    monkeypatch.setattr(torch.cpu, flag, lambda: True)
    assert cpu_has_fast_bfloat16.__wrapped__() == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_inference_restores_the_training_mode():
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


def test_a_cpu_reads_few_tokens_at_a_time():
    assert {tokens_to_read(CPU, size) for size in (0, MINILM, SEVEN_BILLION)} == {512}
    assert {tokens_to_train(CPU, size) for size in (0, MINILM, SEVEN_BILLION)} == {512}


def test_an_accelerator_reads_more_tokens_with_a_small_model():
    assert [tokens_to_read(CUDA, size) for size in (0, MINILM, SMOLLM2)] == [32_768] * 3
    assert tokens_to_read(CUDA, SEVEN_BILLION) == 8_192


@pytest.mark.parametrize(
    ("gib", "size", "checkpointed", "least", "most"),
    [
        (80, MINILM, False, 32_768, 32_768),
        (80, 0, False, 32_768, 32_768),  # token embeddings, without layers
        (80, SMOLLM2, False, 6_000, 9_000),
        (80, SEVEN_BILLION, False, 2_048, 2_048),
        (80, SEVEN_BILLION, True, 16_000, 32_768),
        (16, SEVEN_BILLION, True, 4_096, 8_192),
        (8, SMOLLM2, False, 2_048, 2_048),
    ],
)
def test_parts_in_training_fit_the_memory_of_an_accelerator(monkeypatch, gib, size, checkpointed, least, most):
    monkeypatch.setattr("d2llm.models.device._whole_memory", lambda device: gib * GIB)
    assert least <= tokens_to_train(CUDA, size, checkpointed=checkpointed) <= most


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), GPT2Config(), Qwen2Config()])
def test_the_size_of_the_states_of_any_architecture(config):
    expected = {"bert": 12 * 768, "t5": 6 * 512, "gpt2": 12 * 768, "qwen2": 32 * 4096}
    assert size_of_states(SimpleNamespace(config=config)) == expected[config.model_type]
