from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from d2llm.core.errors import MissingExtraError, ModelError
from d2llm.models.lora import (
    adapter_state,
    attach_lora,
    compute_adapter,
    join_adapters,
    load_adapter_state,
    merge_adapter,
    merged_state_dict,
)
from d2llm.recipe import LoraConfig
from tiny_models import randomise

INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def network(out=4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, out, bias=False))


def adapted(seed=0, rank=2, alpha=6.0, out=4) -> nn.Sequential:
    model = network(out)
    attach_lora(model, LoraConfig(rank=rank, alpha=alpha, dropout=0.0), seed=seed)
    randomise(model, seed=seed)
    return model


def test_a_fresh_adapter_changes_nothing():
    model = network()
    expected = model(INPUTS)
    attach_lora(model, LoraConfig())
    assert torch.equal(model(INPUTS), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_adapters_dropout_follows_the_models_mode(training):
    model = network().train(training)
    attach_lora(model, LoraConfig(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


def test_only_the_adapter_is_trainable():
    model = network().bfloat16()
    attach_lora(model, LoraConfig(rank=2))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())


def test_under_autocast_inputs_are_not_widened_on_their_way_to_the_adapter():
    model = adapted().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # as attach_lora leaves a model in bfloat16
    seen = []
    model[3].lora_A["default"].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(INPUTS.bfloat16())
    output.float().sum().backward()
    assert seen == [torch.bfloat16]
    assert model[3].lora_A["default"].weight.grad.dtype == torch.float32


def test_the_state_holds_the_change_of_the_weights():
    """W' = W + (alpha / rank) B A (Hu et al. 2022)."""
    model = adapted()
    state = adapter_state(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "0.lora_down": (2, 6),
        "0.lora_up": (8, 2),
        "3.lora_down": (2, 8),
        "3.lora_up": (4, 2),
    }
    weight = network()[3].weight + state["3.lora_up"] @ state["3.lora_down"]
    hidden = model[:3](INPUTS)
    torch.testing.assert_close(model[3](hidden), hidden @ weight.T)
    layer = model[3]
    torch.testing.assert_close(state["3.lora_up"], 6 / 2 * layer.lora_B["default"].weight)


def test_merged_equals_unmerged():
    model = adapted()
    merged = network()
    merge_adapter(merged, adapter_state(model))
    torch.testing.assert_close(merged(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)
    plain = network()
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(plain(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)


def test_merging_without_an_adapter_changes_nothing():
    state = merged_state_dict(network())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network().state_dict().items())


def test_adapter_state_can_be_loaded():
    model, other = adapted(seed=1), adapted(seed=2)
    assert not torch.allclose(model(INPUTS), other(INPUTS))
    load_adapter_state(other, adapter_state(model))
    torch.testing.assert_close(other(INPUTS), model(INPUTS))


def test_initial_weights_are_seeded_without_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial_weights = []
    for seed in (1, 1, 2):
        model = network()
        torch.manual_seed(5)
        attach_lora(model, LoraConfig(), seed=seed)
        initial_weights.append(adapter_state(model)["0.lora_down"])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(initial_weights[0], initial_weights[1])
    assert not torch.equal(initial_weights[0], initial_weights[2])


def test_joined_adapters_equal_applying_both():
    first = adapter_state(adapted(seed=1, rank=2))
    tuned = network()
    merge_adapter(tuned, first)
    attach_lora(tuned, LoraConfig(rank=3, dropout=0.0))
    randomise(tuned)
    joined = join_adapters(first, adapter_state(tuned))
    assert joined["0.lora_down"].shape == (5, 6)
    merged = network()
    merge_adapter(merged, joined)
    torch.testing.assert_close(merged(INPUTS), tuned(INPUTS), rtol=1e-4, atol=1e-4)
    only_one_layer = {name: tensor for name, tensor in first.items() if name.startswith("0.")}
    assert join_adapters(only_one_layer, {}).keys() == only_one_layer.keys()
    assert join_adapters({}, first).keys() == first.keys()


def test_another_rank_or_architecture_is_not_loaded():
    model = adapted(rank=2)
    before = model(INPUTS)
    # rank 1 would broadcast into rank 2
    for other in (adapted(rank=1), adapted(out=3), adapted(rank=4)):
        with pytest.raises(ModelError, match="layers or its rank differ from those"):
            load_adapter_state(model, adapter_state(other))
    assert torch.equal(model(INPUTS), before)


def test_an_adapter_of_another_architecture_is_not_merged():
    wrong = adapter_state(adapted(out=3))
    model = network()
    before = model(INPUTS)
    with pytest.raises(ModelError, match=r"changes layer '3' \[3 x 8\], which this model does not have"):
        merge_adapter(model, wrong)
    with pytest.raises(ModelError, match=r"changes layer '7.dense'"):
        merge_adapter(model, {"7.dense.lora_down": torch.ones(1, 6), "7.dense.lora_up": torch.ones(8, 1)})
    assert torch.equal(model(INPUTS), before)  # unchanged, although layer 0 would have fitted


@pytest.mark.parametrize(
    "state",
    [
        {"0.lora_down": torch.ones(1, 6)},
        {"0.lora_up": torch.ones(8, 1)},
        {"0.lora_down": torch.ones(2, 6), "0.lora_up": torch.ones(8, 1)},
    ],
)
def test_an_incomplete_adapter_is_rejected(state):
    with pytest.raises(ModelError, match="tensors of layer '0' do not fit each other"):
        merge_adapter(network(), state)


def test_a_second_adapter_is_rejected():
    with pytest.raises(ModelError, match="already has an adapter"):
        attach_lora(adapted(), LoraConfig())


def test_a_model_without_linear_layers_is_rejected():
    with pytest.raises(ModelError, match=r"Sequential has no linear layers.*tuning to 'full'"):
        attach_lora(nn.Sequential(nn.LayerNorm(3)), LoraConfig())


def test_missing_peft_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"LoRA tuning needs .*pip install 'd2llm\[train\]'"):
        attach_lora(network(), LoraConfig())


def test_an_adapter_beside_the_weights_computes_what_a_merged_one_does():
    model = adapted()
    state = adapter_state(model)
    beside, merged = network(), network()
    compute_adapter(beside, state)
    merge_adapter(merged, state)
    torch.testing.assert_close(beside(INPUTS), merged(INPUTS))
    attach_lora(beside, LoraConfig(rank=2, alpha=6.0, dropout=0.0))
    torch.testing.assert_close(beside(INPUTS), merged(INPUTS))
    randomise(beside, seed=3)
    merge_adapter(merged, adapter_state(beside))
    torch.testing.assert_close(beside(INPUTS), merged(INPUTS))


def test_an_adapter_of_another_model_is_not_computed():
    with pytest.raises(ModelError, match=r"changes layer '3' \[4 x 8\], which this model does not have"):
        compute_adapter(network(out=5), adapter_state(adapted()))
