"""Loading a teacher that is large for one device: quantised while it is loaded, or spread over several GPUs."""

from __future__ import annotations

from typing import Any

import torch

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.models.quantization import EXTRA, quantized_options
from d2llm.recipe import LocalTeacherConfig, Quantization


def check_device(config: LocalTeacherConfig, device: str | torch.device | None) -> None:
    """Raise an ``InputError`` if a device is named for a teacher that is to be spread over all GPUs."""
    if config.device_map is not None and str(device) not in {"None", "cuda"}:
        raise InputError(
            f"teacher '{config.model}' is to be spread over all GPUs (device_map is {config.device_map}), so it cannot "
            f"be on {device} alone; leave the device out, or the device_map"
        )


def loading_options(
    config: LocalTeacherConfig, quantization: Quantization, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Options of ``load_pretrained`` that put the weights where they belong; empty if the model is moved afterwards.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
    """
    options = quantized_options(quantization, device=device, dtype=dtype, what="teacher")
    if config.device_map is not None:
        require("accelerate", extra=EXTRA, purpose="a teacher on several GPUs")
        options["device_map"] = config.device_map
    return options


def require_on_devices(whole: Any, name: str) -> None:
    """Raise an ``InputError`` if a part of a model was left in memory or on disk because the GPUs are too small.

    Such a part would be copied to a GPU for every batch.
    """
    devices = {str(device) for device in getattr(whole, "hf_device_map", {}).values()}
    elsewhere = devices & {"cpu", "disk"}
    if elsewhere and devices != {"cpu"}:
        raise InputError(
            f"teacher '{name}' does not fit into the memory of the GPUs here: a part of it would stay on "
            f"{' and '.join(sorted(elsewhere))}. Use more GPUs, or load it in fewer bits (teacher.quantization)"
        )
