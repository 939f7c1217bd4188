"""Engines that encode texts: torch, or a compiled graph of the same student on the CPU.

A graph is exported once per student, engine and package versions, and kept in the user's cache folder. Scoring always
uses torch: it takes only a few matrix products, which ``models.scorer`` already runs at full speed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int
from platformdirs import user_cache_path

from d2llm.core.errors import InputError, ModelError
from d2llm.core.extras import require, require_openvino
from d2llm.core.fallbacks import fell_back
from d2llm.core.files import new_folder
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.machine import replaced_allocator
from d2llm.core.manifest import FILE_NAME, write_manifest
from d2llm.core.types import EngineName
from d2llm.models.device import choose_device, choose_dtype
from d2llm.models.export.eight_bits import OPENVINO_GROUP, Runtime
from d2llm.models.export.graphs import OPSET, write_text_graph
from d2llm.recipe import CustomBackbone, StudentConfig

if TYPE_CHECKING:
    from d2llm.models.student_encoder import StudentEncoder

Engine = Callable[[Sequence[Sequence[int]]], Float32[np.ndarray, "batch dim"]]
"""Computes the vectors of a batch of tokenized texts."""

_KIND, _FORMAT_VERSION, _FILE = "engine", 2, "text.onnx"
_Run = Callable[[Int[np.ndarray, "batch tokens"], Int[np.ndarray, "batch tokens"]], Float32[np.ndarray, "batch dim"]]


def choose_engine(
    name: str,
    config: StudentConfig | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> EngineName:
    """The requested engine; ``auto`` is the fastest one that gives the same vectors on this machine.

    That is OpenVINO if it is installed and the machine has no accelerator, or the CPU is requested; otherwise torch.
    OpenVINO crashes with another allocator than the C library's (``LD_PRELOAD``), so then it is torch as well. 8-bit
    weights change the vectors, so ``auto`` never selects them. A student (``config``) whose backbone is not read by
    transformers has nothing that an engine could run, and one with two adapters more than a graph holds.

    Raises:
        InputError: the name is unknown, or an engine does not support the student, the device, the number format or the
            allocator.
    """
    if name not in get_args(EngineName):
        raise InputError(f"unknown engine '{name}'; use one of {', '.join(get_args(EngineName))}")
    if config is not None and isinstance(config.backbone, CustomBackbone):
        if name not in ("torch", "auto"):
            raise InputError(
                f"engine '{name}' runs models of transformers, but this student's backbone is {config.backbone.kind}; "
                "leave engine out"
            )
        return "torch"
    if config is not None and config.backbone.has_two_adapters:
        if name not in ("torch", "auto"):
            raise InputError(
                f"engine '{name}' runs one set of weights, but this student reads queries and passages with adapters "
                "of their own; leave engine out"
            )
        return "torch"
    on_cpu = choose_device(device).type == "cpu"
    if name == "auto":
        reason = _why_not_openvino(dtype, on_cpu=on_cpu)
        if reason is None:
            return "openvino"
        fell_back("engine OpenVINO", f"{reason}; torch encodes", level=logging.INFO)
        return "torch"
    if name.startswith("openvino") and (allocator := replaced_allocator()):
        raise InputError(
            f"engine '{name}' crashes with {allocator} in place of the C library's allocator; unset LD_PRELOAD, or use "
            "engine 'torch'"
        )
    if name != "torch" and device is not None and not on_cpu:
        raise InputError(f"engine '{name}' runs on the CPU, but device '{device}' was requested; use engine 'torch'")
    if name != "torch" and not _can_multiply(name, dtype):
        raise InputError(f"engine '{name}' does not support dtype '{dtype}'; leave dtype out, or use engine 'torch'")
    return cast(EngineName, name)


def _why_not_openvino(dtype: str | torch.dtype | None, *, on_cpu: bool) -> str | None:
    """Why ``auto`` does not choose OpenVINO; None if it does."""
    if missing := [package for package in ("openvino", "onnx") if not find_spec(package)]:
        return f"{' and '.join(missing)} not installed"
    if not on_cpu or not _can_multiply("openvino", dtype):
        return "it computes on CPUs in float32 or bfloat16"
    if allocator := replaced_allocator():
        return f"it crashes with {allocator} in place of the C library's allocator (LD_PRELOAD)"
    return None


def choose_products(engine: EngineName, device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The number format of an engine's products, by default the fastest here; ONNX Runtime supports only float32."""
    return torch.float32 if engine.startswith("onnx") else choose_dtype(device, dtype)


def open_engine(student: StudentEncoder, name: EngineName, *, dtype: torch.dtype = torch.float32) -> Engine | None:
    """The compiled engine of a student, its graph taken from the user's cache folder or exported now; None for torch.

    Args:
        student: a student with weights in float32 on the CPU, as the export requires.
        name: name of the engine.
        dtype: number format of its products (``choose_products``).

    Raises:
        InputError: the student's weights are not float32 on the CPU.
        MissingExtraError: the engine is not installed.
    """
    if name == "auto" and student.backbone.compute_dtype != torch.float32:
        name = "torch"
    name = choose_engine(name, student.config, device=student.backbone.device, dtype=dtype)
    if name == "torch":
        return None
    run = _RUNTIMES[name](_graph(student, _INT8.get(name)), dtype)

    def encode(ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "batch dim"]:
        token_ids, mask = student.backbone.pad(ids)
        return run(token_ids.numpy(), mask.long().numpy())

    return encode


def _can_multiply(name: str, dtype: str | torch.dtype | None) -> bool:
    formats = (None, "float32", torch.float32)
    return dtype in ((*formats, "bfloat16", torch.bfloat16) if name.startswith("openvino") else formats)


def _graph(student: StudentEncoder, int8_for: Runtime | None) -> Path:
    """The file with the student's graph, exported if it is not in the cache."""
    require("onnx", extra="export", purpose="an engine other than torch")
    versions = [version(package) for package in ("d2llm", "torch", "transformers", "onnx")]
    key = fingerprint_json([student.fingerprint, int8_for, OPSET, _FORMAT_VERSION, versions])
    folder = user_cache_path("d2llm") / "engines" / key
    if not (folder / FILE_NAME).is_file():
        with new_folder(folder, kind=_KIND) as temporary:
            write_text_graph(
                student.backbone, student.pooling, student.interaction, temporary / _FILE, int8_for=int8_for
            )
            write_manifest(temporary, _KIND, _FORMAT_VERSION, {"student": student.fingerprint, "int8_for": int8_for})
    return folder / _FILE


def _onnx_runtime(file: Path, dtype: torch.dtype) -> _Run:
    assert dtype == torch.float32  # the only format that it multiplies fast on CPUs
    runtime: Any = require("onnxruntime", extra="export", purpose="the engine onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1  # batches run on different cores (``core_workers``)
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    return run


def _openvino(file: Path, dtype: torch.dtype) -> _Run:
    openvino: Any = require_openvino("the engine openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": torch.get_num_threads(),  # batches run on different cores (``core_workers``)
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": OPENVINO_GROUP,  # only affects 8-bit weights
    }
    # Compile in a separate thread: OpenVINO gives the compiling thread a signal stack and frees it with the model, so
    # the next signal that this thread handles (Ctrl-C in the main thread) would kill the process.
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiled = thread.submit(lambda: openvino.Core().compile_model(str(file), "CPU", settings)).result()
    thread_state = local()  # an infer request serves one caller at a time

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not hasattr(thread_state, "request"):
            thread_state.request = compiled.create_infer_request()
        return thread_state.request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)[0]

    # Run once in one thread: two threads that create OpenVINO's first tensors at the same time deadlock, because one
    # waits for the GIL while it holds the lock of a C++ static that the other waits for.
    if len(run(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))) != 1:  # seen with 8-bit weights and a lower ISA
        raise ModelError(
            "OpenVINO returns no vector for a text with this student on this CPU; unset ONEDNN_MAX_CPU_ISA if it is "
            "set, or use another engine"
        )
    return run


_RUNTIMES: dict[EngineName, Callable[[Path, torch.dtype], _Run]] = {
    "onnx": _onnx_runtime,
    "onnx-int8": _onnx_runtime,
    "openvino": _openvino,
    "openvino-int8": _openvino,
}
_INT8: dict[EngineName, Runtime] = {"onnx-int8": "onnx", "openvino-int8": "openvino"}
