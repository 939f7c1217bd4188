"""The fastest device and number format of this machine, and running a model for inference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2llm.core.errors import InputError, ModelError
from d2llm.core.fallbacks import fell_back
from d2llm.core.machine import available_memory

_CPU_TOKENS = 512
_MAX_TOKENS, _MIN_TOKENS = 32_768, 2_048  # on an accelerator
_LARGE_STATE = 32_768  # of a model with about a billion parameters
_BYTES_OF_GRAPH, _BYTES_CHECKPOINTED = 80, 5  # for each number of a token's states (docs/log)
_UNKNOWN_MEMORY = 8 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The requested device; by default CUDA, Apple's MPS or the CPU, in this order.

    Raises:
        InputError: the device does not exist on this machine, or cannot be used.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the torch backend
            present = devices_here()
            # The reason helps if the device exists (such as a full memory); otherwise it is pages long.
            exists = str(device).partition(":")[0] in {name.partition(":")[0] for name in present}
            reason = f" ({str(error).splitlines()[0].rstrip('.')})" if exists else ""
            raise InputError(
                f"device '{device}' cannot be used here{reason}; use one of {', '.join(present)}, or leave it out"
            ) from error
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def devices_here() -> list[str]:
    """The names of the devices on this machine that torch can use."""
    accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *accelerators, *(["mps"] if torch.backends.mps.is_available() else [])]


@cache
def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), which is several times faster.

    oneDNN must support it too: ONEDNN_MAX_CPU_ISA can keep it from using the CPU's instructions. False is the safe
    answer, and the one returned for CPUs other than x86, where this was never measured.
    """
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, flag, lambda: False)() for flag in flags):
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError) as error:  # not in every version of torch; rely on the flags
        fell_back("asking oneDNN for bfloat16", f"{error}; relying on the CPU's flags", level=logging.INFO)
        return torch.backends.mkldnn.is_available()


@cache
def can_fuse_bfloat16_layers() -> bool:
    """Whether torch can run a bfloat16 layer and its ReLU on this CPU as one oneDNN operation on reordered weights.

    The operation is emitted by torch's compiler and not part of its public API. It is missing from builds without
    oneDNN (macOS, most aarch64 wheels) and rejects CPUs without AVX512 or AVX-NE-CONVERT. Therefore it is tried once on
    a small layer, and used only if its result is correct.
    """
    weight = torch.linspace(-1, 1, 32 * 32).view(32, 32).bfloat16()
    inputs, bias = weight.flip(0), weight[0].clone()
    expected = torch.nn.functional.linear(inputs.float(), weight.float(), bias.float()).relu_()
    return computes(
        lambda: onednn_linear(inputs, pack_bfloat16_weight(weight), bias, activation="relu"),
        expected,
        tolerance=0.02 * float(expected.max()),
        name="fused bfloat16 layers",
        otherwise="layers are computed one by one",
    )


def computes(work: Callable[[], Tensor], expected: Tensor, *, tolerance: float, name: str, otherwise: str) -> bool:
    """Whether an operation that is not part of torch's public API is in this build, runs on this CPU, and is right.

    If not, what is done ``otherwise`` goes into the log, under this name.
    """
    try:
        result = work()
    except (AttributeError, RuntimeError) as error:  # no such operation in this build; not on this CPU
        fell_back(name, f"{error}; {otherwise}", level=logging.INFO)
        return False
    is_right = bool((result.float() - expected).abs().max() <= tolerance)
    if not is_right:
        fell_back(name, f"their result is wrong on this CPU; {otherwise}")
    return is_right


def pack_bfloat16_weight(weight: Tensor) -> Tensor:
    """A layer's weights [out, in] in oneDNN's internal layout, for use with ``onednn_linear`` only."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def onednn_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Literal["none", "relu"] = "none"
) -> Tensor:
    """The activation of W x + b as one operation of oneDNN: inputs [..., in], weight [out, in] or packed, [..., out].

    The operation is not part of torch's public API: use it where ``computes`` has found it right.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, activation, [], "")


def choose_dtype(device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The requested number format; by default bfloat16 if ``device`` is fast with it, otherwise float32.

    Raises:
        InputError: the name is unknown.
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
    """Bytes that this process can still allocate in the memory of ``device``; None if unknown."""
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_by_torch
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return available_memory()


def tokens_to_read(device: torch.device, state_size: int) -> int:
    """Tokens, including padding, that a model reads at a time where nothing is trained.

    On a CPU: large enough for fast products, small enough for activations to fit a core's cache, and with little
    padding. On an accelerator: as many as keep it busy, of which a small model needs more. ``state_size`` is how many
    numbers the states of a token have, over all layers (``size_of_states``).
    """
    if device.type == "cpu":
        return _CPU_TOKENS
    return _MAX_TOKENS if state_size <= _LARGE_STATE else _MAX_TOKENS // 4


def tokens_to_train(
    device: torch.device, state_size: int, *, checkpointed: bool = False, memory: int | None = None
) -> int:
    """Tokens, including padding, in one forward and backward pass of a model.

    On a CPU, larger batches are no faster and take more memory. On an accelerator, they are faster until it is busy: as
    many as there is room for in an eighth of its memory, with ``checkpointed`` layers (``checkpoint_layers``) or
    without. ``memory`` is that of an accelerator, by default this one's. What else is in its memory does not count, so
    a run that resumes cuts its batches as before. ``state_size`` is as for ``tokens_to_read``.
    """
    if device.type == "cpu":
        return _CPU_TOKENS
    per_token = state_size * (_BYTES_CHECKPOINTED if checkpointed else _BYTES_OF_GRAPH)
    fitting = (memory or _whole_memory(device)) // 8 // per_token if per_token else _MAX_TOKENS
    return max(_MIN_TOKENS, min(_MAX_TOKENS, fitting))


def size_of_states(model: Any) -> int:
    """How many numbers the states of a token have in a ``transformers`` model: its width times its layers.

    0 for a model whose configuration does not say.
    """
    config = model.config.get_text_config()
    return int(getattr(config, "hidden_size", 0)) * int(getattr(config, "num_hidden_layers", 0))


def _whole_memory(device: torch.device) -> int:
    """Bytes of memory of an accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return torch.mps.recommended_max_memory() if device.type == "mps" else _UNKNOWN_MEMORY


def use_plain_attention_on_cpu(model: Any) -> None:
    """Switch a ``transformers`` model on a CPU to plain attention for training.

    On a CPU, at passage length, the backward pass of fused attention takes several times as long as that of plain
    attention.
    """
    if next(model.parameters()).device.type == "cpu":
        model.set_attn_implementation("eager")


def checkpoint_layers(model: nn.Module, name: str) -> None:
    """Let a ``transformers`` model compute its layers again in the backward pass instead of keeping their activations.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (gradient checkpointing). The model's own
    switch has no effect here, because it needs training mode, in which frozen layers would have dropout.

    Raises:
        ModelError: the model (``name`` in the message) has no layers that ``transformers`` can compute again.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"'{name}' ({type(model).__name__}) has no layers that support gradient checkpointing; set "
            "gradient_checkpointing = false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@contextmanager
def inference(model: nn.Module) -> Generator[None]:
    """Disable gradients and dropout inside the block, even in the middle of a training run."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()


def weights_state(model: nn.Module) -> list[tuple[int, int]]:
    """A value that changes when any weight does: the memory address of each and how often it was written to."""
    weights = [*model.parameters(), *model.buffers()]
    # Tensors created in inference mode do not count writes, but they cannot be trained either.
    return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]  # pyright: ignore[reportPrivateUsage]
