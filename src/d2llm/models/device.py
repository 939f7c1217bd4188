"""Which device and number format this machine computes fastest with."""

from __future__ import annotations

from typing import Any

import torch

from d2llm.core.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or else CUDA, Apple's MPS, or the CPU, in that order.

    Raises:
        InputError: the device asked for does not exist, or not here.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises what each back end likes
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(f"device '{device}' cannot be used here ({reason}); try cpu, or name none") from error
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), where it is several times faster."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def choose_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The number format asked for, or else bfloat16 where ``device`` is fast with it, or else float32.

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


def use_plain_attention_on_cpu(model: Any) -> None:
    """Let a model of ``transformers`` be trained with plain attention where it computes on a CPU.

    There the backward pass of the fused attention takes several times the plain one's at the length of a passage.
    """
    if next(model.parameters()).device.type == "cpu":
        model.set_attn_implementation("eager")
