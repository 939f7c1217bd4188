"""Weights in 8 or 4 bits, quantised while a model is loaded.

Source of 8 bits: Dettmers et al., "LLM.int8()", NeurIPS 2022. Of 4 bits (NF4, double quantisation), and of adapters
tuned on them: Dettmers et al., "QLoRA", NeurIPS 2023.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from d2llm.core.extras import require
from d2llm.recipe import Quantization

EXTRA = "large"
_MARKS = {"8bit": "is_loaded_in_8bit", "4bit": "is_loaded_in_4bit"}  # what PEFT looks for on a model to adapt


def quantized_options(
    quantization: Quantization, *, device: torch.device, dtype: torch.dtype, what: str
) -> dict[str, Any]:
    """Options of ``load_pretrained`` that quantise the weights of ``what`` on a device; empty for "none".

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
    """
    if quantization == "none":
        return {}
    purpose = f"a {what} in {quantization.removesuffix('bit')} bits"
    require("accelerate", extra=EXTRA, purpose=purpose)
    require("bitsandbytes", extra=EXTRA, purpose=purpose)
    return {"quantization_config": _quantization_config(quantization, dtype), "device_map": {"": device}}


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
