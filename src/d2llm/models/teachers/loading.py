"""Loading a teacher that is large for one device: quantised while it is loaded, or spread over several GPUs.

Source of 8 bits: Dettmers et al., "LLM.int8()", NeurIPS 2022. Of 4 bits (NF4, double quantisation), and of adapters
tuned on them: Dettmers et al., "QLoRA", NeurIPS 2023.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.recipe import LocalTeacherConfig, Quantization

_EXTRA = "large"
_MARKS = {"8bit": "is_loaded_in_8bit", "4bit": "is_loaded_in_4bit"}  # what PEFT looks for on a model to adapt


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
    options: dict[str, Any] = {}
    if quantization != "none":
        purpose = f"a teacher in {quantization.removesuffix('bit')} bits"
        require("accelerate", extra=_EXTRA, purpose=purpose)
        require("bitsandbytes", extra=_EXTRA, purpose=purpose)
        options |= {"quantization_config": _quantization_config(quantization, dtype), "device_map": {"": device}}
    if config.device_map is not None:
        require("accelerate", extra=_EXTRA, purpose="a teacher on several GPUs")
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


def prepare_quantized(model: nn.Module, quantization: Quantization) -> None:
    """Prepare a part of a model whose layers are quantised for adapters; does nothing for "none"."""
    if quantization == "none":
        return
    setattr(model, _MARKS[quantization], True)  # transformers marks only the whole model
    for layer in model.modules():
        # On a CPU, a 4-bit layer packs its weights when it is first used, and from then on gives no gradient.
        if "support_avx512bf16_for_cpu" in vars(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # It says in every layer and batch that it computes outliers in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
