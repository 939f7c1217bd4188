"""Low-rank adapters: trained through PEFT, stored and merged as plain tensors, so that loading needs no PEFT.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: W' = W + (alpha / rank) B A.
A student's adapter has PEFT's names on disk, so that transformers and sentence-transformers can load it with PEFT.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from d2llm.core.errors import ModelError
from d2llm.core.extras import require
from d2llm.recipe import LoraConfig

_Model = TypeVar("_Model", bound=nn.Module)
_ADAPTER = "default"  # PEFT's name for the only adapter
_DOWN, _UP = ".lora_down", ".lora_up"
_PEFT_PREFIX, _PEFT_ENDS = "base_model.model.", {_DOWN: ".lora_A.weight", _UP: ".lora_B.weight"}


def attach_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> None:
    """Freeze ``model`` and add a trainable float32 adapter to each of its linear layers, in place.

    A model in another number format must then compute under ``torch.autocast``.

    Raises:
        MissingExtraError: ``peft`` is not installed.
        ModelError: the model already has an adapter, or no linear layer to adapt.
    """
    if has_adapters(model):
        raise ModelError("the model already has an adapter; load it again to start with a new one")
    # d2llm's forward passes do not use a BERT's pooler, and a T5's head may share its weights with the embeddings.
    unused = ("pooler", "lm_head")
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in unused)
    ]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layers for adapters; set tuning to 'full' or 'frozen', or use "
            "another model"
        )
    # PEFT imports bitsandbytes where it is installed, which warns that it lacks a kernel for weights in 4 bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    peft = require("peft", extra="train", purpose="LoRA tuning")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    for _, layer in _adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast would undo it at once: two passes over the input for nothing
    model.train(model.training)  # new dropout layers start in training mode, even if the model is not
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def sharing_copy(model: _Model) -> _Model:
    """A copy of a model that shares its weights, so that it takes no memory until adapters differ."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def own_linear_weights(model: nn.Module) -> None:
    """Give the linear layers of a ``sharing_copy`` weights of their own, which can then be changed in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are attached to ``model``."""
    return bool(_adapted_layers(model))


def train_adapters_only(model: nn.Module, mode: bool) -> None:
    """Set training mode for the adapters only: frozen layers run without dropout, as in inference."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train(mode)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter of ``model`` as plain tensors: ``<layer>.lora_down`` [rank, in], scaled ``.lora_up`` [out, rank]."""
    state: dict[str, Tensor] = {}
    for name, layer in _adapted_layers(model):
        state[name + _DOWN] = layer.lora_A[_ADAPTER].weight.detach().float().cpu().clone()
        state[name + _UP] = (layer.lora_B[_ADAPTER].weight.detach().float() * layer.scaling[_ADAPTER]).cpu()
    return state


def with_peft_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as PEFT names them in files; two adapters and other weights, which it cannot name, stay."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, dot, part = name.rpartition(".")
        if dot + part not in _PEFT_ENDS or ":" in name:
            return state
        named[f"{_PEFT_PREFIX}{layer}{_PEFT_ENDS[dot + part]}"] = tensor
    return named


def with_plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``with_peft_names``."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ends = (name.removesuffix(theirs) + ours for ours, theirs in _PEFT_ENDS.items() if name.endswith(theirs))
        is_named = name.startswith(_PEFT_PREFIX)
        plain[next(ends, name).removeprefix(_PEFT_PREFIX) if is_named else name] = tensor
    return plain


def peft_config(state: dict[str, Tensor], base: str) -> dict[str, Any]:
    """What PEFT needs to know of an adapter, beside its tensors, to add it to the model ``base``."""
    ranks = {name.removesuffix(_DOWN): len(tensor) for name, tensor in state.items() if name.endswith(_DOWN)}
    rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the tensors are scaled
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load tensors made by ``adapter_state`` into the adapters attached to ``model``, of the same layers and rank."""
    layers = dict(_adapted_layers(model))
    shapes = {name: tensor.shape for name, tensor in adapter_state(model).items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        raise ModelError(
            "the adapter's layers or its rank differ from those of the attached adapter; use the model and the rank "
            "it was trained with"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A[_ADAPTER].weight.copy_(state[name + _DOWN])
            layer.lora_B[_ADAPTER].weight.copy_(state[name + _UP] / layer.scaling[_ADAPTER])


def merge_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Merge an adapter permanently into the weights of a plain ``model``, in place: W + up @ down, in float32.

    Raises:
        ModelError: a layer of the adapter does not exist in ``model`` or has another shape; ``model`` is unchanged.
    """
    with torch.no_grad():
        for layer, down, up in _layers_of(model, state):
            change = up.float() @ down.float()
            layer.weight.copy_(layer.weight.float() + change.to(layer.weight.device))


def compute_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let the layers of a plain ``model`` compute an adapter beside their quantised weights: W x + up down x.

    The adapter stays frozen; another one can be attached for training (``attach_lora``).

    Raises:
        ModelError: as ``merge_adapter``.
    """
    for layer, down, up in _layers_of(model, state):
        device = layer.weight.device
        layer.register_forward_hook(_ComputedAdapter(down.to(device), up.to(device)))


class _ComputedAdapter:
    """A hook that adds an adapter's result to that of its layer."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self._down, self._up = down, up

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del layer
        states = inputs[0].to(output.dtype)
        change = nn.functional.linear(states, self._down.to(output.dtype))
        return output + nn.functional.linear(change, self._up.to(output.dtype))


def _layers_of(model: nn.Module, state: dict[str, Tensor]) -> list[tuple[nn.Linear, Tensor, Tensor]]:
    """The layers of an adapter, each with its ``lora_down`` and ``lora_up``; a ``ModelError`` if one does not fit."""
    modules = dict(model.named_modules())
    layers: list[tuple[nn.Linear, Tensor, Tensor]] = []
    for name in sorted({key.removesuffix(_DOWN).removesuffix(_UP) for key in state}):
        layer, up, down = modules.get(name), state.get(name + _UP), state.get(name + _DOWN)
        if up is None or down is None or up.shape[1] != down.shape[0]:
            raise ModelError(f"the adapter's tensors of layer '{name}' do not fit each other; restore its file")
        if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != (up.shape[0], down.shape[1]):
            raise ModelError(
                f"the adapter changes layer '{name}' [{up.shape[0]} x {down.shape[1]}], which this model does not "
                "have; use the model that the adapter was trained on"
            )
        layers.append((layer, down, up))
    return layers


def join_adapters(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter that makes the changes of both: their ranks are concatenated."""
    joined = dict(first)
    for name, tensor in second.items():
        tensors = [first[name], tensor] if name in first else [tensor]
        joined[name] = torch.cat(tensors, dim=0 if name.endswith(_DOWN) else 1)
    return joined


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of a model with attached adapters in the plain model's form: adapters merged, PEFT's names removed."""
    state = {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    adapter = adapter_state(model)
    for name, _ in _adapted_layers(model):
        weight = state[f"{name}.weight"]
        change = (adapter[name + _UP] @ adapter[name + _DOWN]).to(weight.device)
        state[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return state


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, cast(Any, module)) for name, module in model.named_modules() if hasattr(module, "lora_A")]
