"""Which device and number format this machine computes fastest with, and reading a model's output without training."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.fallbacks import fell_back
from d2llm.core.memory import available_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The requested device, or else CUDA, Apple's MPS, or the CPU, in that order.

    Raises:
        InputError: there is no such device on this machine.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises what each back end likes
            present = devices_here()
            # Of a device that is there the reason helps, such as a full memory; of one that is not it is pages long.
            is_there = str(device).partition(":")[0] in {name.partition(":")[0] for name in present}
            reason = f" ({str(error).splitlines()[0].rstrip('.')})" if is_there else ""
            raise InputError(
                f"device '{device}' cannot be used here{reason}; name one that is here ({', '.join(present)}), or none"
            ) from error
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def devices_here() -> list[str]:
    """The names of the devices of this machine that can be computed on."""
    accelerators = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *accelerators, *(["mps"] if torch.backends.mps.is_available() else [])]


@cache
def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), where it is several times faster.

    oneDNN has to agree: ONEDNN_MAX_CPU_ISA can keep it from using what the CPU has. No is a safe answer, and the one
    given for CPUs other than x86, where this was never measured.
    """
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, flag, lambda: False)() for flag in flags):
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError) as error:  # not in every version of torch; the flags must do
        fell_back("asking oneDNN for bfloat16", f"{error}; the CPU's flags are believed", level=logging.INFO)
        return torch.backends.mkldnn.is_available()


@cache
def can_fuse_bfloat16_layers() -> bool:
    """Whether torch can run a bfloat16 layer and its ReLU on this CPU as one oneDNN operation on reordered weights.

    The operation is what torch's compiler emits and not part of its public interface. It is missing from builds without
    oneDNN (macOS, most aarch64 wheels) and refuses CPUs without AVX512 or AVX-NE-CONVERT, so it is tried once, on a
    small layer, and counts as there only if its result is right.
    """
    weight = torch.linspace(-1, 1, 32 * 32).view(32, 32).bfloat16()
    inputs, bias = weight.flip(0), weight[0].clone()
    expected = torch.nn.functional.linear(inputs.float(), weight.float(), bias.float()).relu_()
    try:
        result = fused_bfloat16_layer(inputs, pack_bfloat16_weight(weight), bias)
    except (AttributeError, RuntimeError) as error:  # no such operation in this build; not on this CPU
        fell_back("fused bfloat16 layers", f"{error}; layers are computed one by one", level=logging.INFO)
        return False
    is_right = bool((result.float() - expected).abs().max() <= 0.02 * expected.max())
    if not is_right:
        fell_back("fused bfloat16 layers", "their result is wrong on this CPU; layers are computed one by one")
    return is_right


def pack_bfloat16_weight(weight: Tensor) -> Tensor:
    """A layer's weights [out, in] in oneDNN's own order, for ``fused_bfloat16_layer`` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def fused_bfloat16_layer(inputs: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """relu(W x + b), where ``can_fuse_bfloat16_layers``: inputs [n, in], packed weights, bias [out] -> [n, out]."""
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "relu", [], "")


def choose_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The requested number format, or else bfloat16 where ``device`` is fast with it, or else float32.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in _DTYPES:
            raise InputError(f"unknown dtype '{dtype}'; use one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu" and cpu_has_fast_bfloat16():
        return torch.bfloat16
    return torch.float32


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still take where ``device`` keeps its tensors; None where nobody says."""
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_by_torch
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return available_memory()


def tokens_at_a_time(device: torch.device) -> int:
    """Tokens of one forward and backward pass: of more at a time none is faster on a CPU, and all take memory."""
    return 512 if device.type == "cpu" else 2048


def use_plain_attention_on_cpu(model: Any) -> None:
    """Let a model of ``transformers`` be trained with plain attention where it computes on a CPU.

    There the backward pass of the fused attention takes several times the plain one's at the length of a passage.
    """
    if next(model.parameters()).device.type == "cpu":
        model.set_attn_implementation("eager")


@contextmanager
def inference(model: nn.Module) -> Generator[None]:
    """No gradients and no dropout inside the block, also in the middle of a training run."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
