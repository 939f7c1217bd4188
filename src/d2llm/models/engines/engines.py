"""Engines that encode texts: torch, or a compiled graph of the same student on the CPU.

A graph gives the vectors of texts and the states of their tokens, from which token embeddings are made. It is exported
once per student, engine and package versions, and kept in the user's cache folder. Scoring always uses torch: it takes
only a few matrix products, which ``models.scorer`` already runs at full speed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

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
from d2llm.models.device import choose_device, choose_dtype, inference
from d2llm.models.export.graphs import OPENVINO_GROUP, OPSET, Runtime, write_text_graph
from d2llm.models.hub import find_student
from d2llm.models.student_files import read_student_manifest
from d2llm.recipe import CustomBackbone, StudentConfig

if TYPE_CHECKING:
    from d2llm.models.student_encoder import StudentEncoder

_log = logging.getLogger(__name__)
_KIND, _FORMAT_VERSION, _FILE = "engine", 3, "text.onnx"
_FASTEST: tuple[EngineName, ...] = ("openvino", "onnx")
"""Engines that give the same vectors as torch, fastest first (``benchmarks/encoding.py``)."""
_PACKAGES = {"openvino": ("openvino", "onnx"), "onnx": ("onnxruntime", "onnx")}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far ``auto`` lets the numbers of an engine be from torch's in float32, as a fraction of the largest."""
_PROBES = ("", "what do bees make?", "北京大学在哪里 где живут пчёлы", "Bees make honey from nectar. " * 10)


class ReadTexts(NamedTuple):
    """What an engine reads from tokenized texts; states of padding mean nothing."""

    vectors: Float32[np.ndarray, "batch dim"]
    states: Float32[np.ndarray, "batch tokens states"]


_Run = Callable[[Int[np.ndarray, "batch tokens"], Int[np.ndarray, "batch tokens"]], ReadTexts]


@dataclass(frozen=True)
class Engine:
    """A compiled graph; ``run`` takes token ids and their mask, padded on the right."""

    name: EngineName
    run: _Run


def choose_engine(
    name: str,
    config: StudentConfig | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> EngineName:
    """The requested engine; ``auto`` is the fastest one that gives the same vectors on this machine.

    That is OpenVINO, or ONNX Runtime, if it is installed and the machine has no accelerator, or the CPU is requested;
    otherwise torch. OpenVINO crashes with another allocator than the C library's (``LD_PRELOAD``), so then it is not
    used. 8-bit weights change the vectors, so ``auto`` never selects them. A student (``config``) whose backbone is not
    read by transformers has nothing that an engine could run, and one that cannot be merged has no weights for a graph.

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
    if config is not None and (reason := config.backbone.why_not_merged) is not None:
        if name not in ("torch", "auto"):
            raise InputError(
                f"engine '{name}' runs one set of weights, which this student cannot give: {reason}; leave engine out"
            )
        return "torch"
    on_cpu = choose_device(device).type == "cpu"
    if name == "auto":
        reasons = {engine: _why_not(engine, dtype, on_cpu=on_cpu) for engine in _FASTEST}
        for engine in _FASTEST:
            if reasons[engine] is None:
                return engine
        told = "; ".join(f"{engine}: {reason}" for engine, reason in reasons.items())
        fell_back("engine auto", f"torch encodes ({told})", level=logging.INFO)
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


def _why_not(engine: EngineName, dtype: str | torch.dtype | None, *, on_cpu: bool) -> str | None:
    """Why ``auto`` does not choose an engine; None if it may."""
    if missing := [package for package in _PACKAGES[engine] if not find_spec(package)]:
        return f"{' and '.join(missing)} not installed"
    if not on_cpu or not _can_multiply(engine, dtype):
        return "it computes on CPUs, in float32" + (" or bfloat16" if engine == "openvino" else "")
    if engine == "openvino" and (allocator := replaced_allocator()):
        return f"it crashes with {allocator} in place of the C library's allocator (LD_PRELOAD)"
    return None


def choose_products(engine: EngineName, device: torch.device, dtype: str | torch.dtype | None = None) -> torch.dtype:
    """The number format of an engine's products, by default the fastest here; ONNX Runtime supports only float32."""
    return torch.float32 if engine.startswith("onnx") else choose_dtype(device, dtype)


def prepared_engine(
    name: EngineName, student: str | Path, *, device: str | torch.device | None = None, dtype: str | None = None
) -> EngineName:
    """The engine to load a student with where nothing may be exported: torch in place of ``auto`` without a graph.

    Raises:
        InputError: as ``choose_engine``.
        ModelNotFoundError: there is no such student.
        DataFormatError: its manifest is damaged.
    """
    if name != "auto":
        return name
    folder = find_student(student)
    manifest, config = read_student_manifest(folder)
    if (chosen := choose_engine(name, config, device=device, dtype=dtype)) == "torch":
        return chosen
    if (_graph_folder(manifest["fingerprint"], None) / FILE_NAME).is_file():
        return name
    fell_back(
        f"engine {chosen}",
        f"it needs a graph of {folder.name}, which `d2llm index`, `encode` and `serve` make, and Student.load("
        f"..., engine='{chosen}'); torch encodes",
        level=logging.INFO,
    )
    return "torch"


def open_engine(student: StudentEncoder, name: EngineName, *, dtype: torch.dtype = torch.float32) -> Engine | None:
    """The compiled engine of a student, its graph taken from the user's cache folder or exported now; None for torch.

    Args:
        student: a student with weights in float32 on the CPU, as the export requires.
        name: name of the engine; ``auto`` takes the fastest one that agrees with torch about a few texts.
        dtype: number format of its products (``choose_products``).

    Raises:
        InputError: the student's weights are not float32 on the CPU.
        MissingExtraError: the engine is not installed.
    """
    device = student.backbone.device
    if name != "auto":
        name = choose_engine(name, student.config, device=device, dtype=dtype)
        return None if name == "torch" else _open(student, name, dtype)
    exportable = student.backbone.compute_dtype == torch.float32
    if not exportable or choose_engine("auto", student.config, device=device, dtype=dtype) == "torch":
        return None
    for engine in _FASTEST:
        if _why_not(engine, dtype, on_cpu=True) is not None:
            continue
        try:
            opened = _open(student, engine, dtype)
            difference = _difference(student, opened)
        except Exception as error:  # noqa: BLE001 - a runtime may raise anything, and torch can always encode
            fell_back(f"engine {engine}", f"{type(error).__name__}: {error}; another engine encodes")
            continue
        if difference <= _TOLERANCE[dtype]:
            return opened
        fell_back(f"engine {engine}", f"it differs from torch by {difference:.2g} on this CPU; another engine encodes")
    return None


def _open(student: StudentEncoder, name: EngineName, dtype: torch.dtype) -> Engine:
    runtime, process = _RUNTIMES[name](_graph(student, _INT8.get(name)), dtype), os.getpid()

    def run(ids: np.ndarray, mask: np.ndarray) -> ReadTexts:
        if os.getpid() != process:  # it would wait for ever
            raise ModelError(
                "this student was loaded before the process was forked, and the threads of its engine stay with the "
                "first process; load it in this one, or start processes by multiprocessing.get_context('spawn')"
            )
        return runtime(ids, mask)

    return Engine(name, run)


def _difference(student: StudentEncoder, engine: Engine) -> float:
    """How far vectors and states of texts of all sorts are from torch's in float32, as a fraction of the largest."""
    ids, mask = student.backbone.pad(student.tokenize(_PROBES, "passage").ids)
    with inference(student):
        states, _ = student.backbone(ids, mask)
        vectors = student.pool(states, mask).numpy()
    read = engine.run(ids.numpy(), mask.long().numpy())
    real = mask.numpy()
    pairs = ((read.vectors, vectors), (read.states[real], states.numpy()[real]))
    differences = [float(abs(actual - exact).max() / abs(exact).max()) for actual, exact in pairs]
    return max(differences) if np.isfinite(differences).all() else float("inf")


def _can_multiply(name: str, dtype: str | torch.dtype | None) -> bool:
    formats = (None, "float32", torch.float32)
    return dtype in ((*formats, "bfloat16", torch.bfloat16) if name.startswith("openvino") else formats)


def _graph_folder(fingerprint: str, int8_for: Runtime | None) -> Path:
    """Where the graph of the student with this fingerprint is kept."""
    versions = [version(package) for package in ("d2llm", "torch", "transformers", "onnx")]
    key = fingerprint_json([fingerprint, int8_for, OPSET, _FORMAT_VERSION, versions])
    return user_cache_path("d2llm") / "engines" / key


def _graph(student: StudentEncoder, int8_for: Runtime | None) -> Path:
    """The file with the student's graph, exported if it is not in the cache."""
    require("onnx", extra="export", purpose="an engine other than torch")
    folder = _graph_folder(student.fingerprint, int8_for)
    if not (folder / FILE_NAME).is_file():
        _log.info("exporting the graph of the student %s, once; it is kept in %s", student.fingerprint, folder)
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

    def run(ids: np.ndarray, mask: np.ndarray) -> ReadTexts:
        return ReadTexts(*session.run(list(ReadTexts._fields), {"input_ids": ids, "attention_mask": mask}))

    return run


_UNWRITTEN = np.uint32(0x7FC0D2D2)
"""Bits of a NaN that no product has: it is put where OpenVINO (2026.4) writes, which else returns an older answer."""


def _openvino(file: Path, dtype: torch.dtype) -> _Run:
    openvino: Any = require_openvino("the engine openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": torch.get_num_threads(),  # batches run on different cores (``core_workers``)
        "ENABLE_CPU_PINNING": False,  # two programs would pin their threads to the same core, and leave others idle
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": OPENVINO_GROUP,  # only affects 8-bit weights
    }
    # Compile in a separate thread: OpenVINO gives the compiling thread a signal stack and frees it with the model, so
    # the next signal that this thread handles (Ctrl-C in the main thread) would kill the process.
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiled = thread.submit(lambda: openvino.Core().compile_model(str(file), "CPU", settings)).result()
    thread_state, broken = local(), list[Any]()  # an infer request serves one caller at a time

    def infer(ids: np.ndarray, mask: np.ndarray) -> ReadTexts:
        if not hasattr(thread_state, "request"):
            thread_state.request = compiled.create_infer_request()
        read = thread_state.request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)
        texts = ReadTexts(*(read[name] for name in ReadTexts._fields))
        thread_state.request.get_tensor("vectors").data.view(np.uint32)[:, :1] = _UNWRITTEN
        return texts

    def run(ids: np.ndarray, mask: np.ndarray) -> ReadTexts:
        texts = infer(ids, mask)
        if len(texts.vectors) != len(ids) or (texts.vectors.view(np.uint32)[:, :1] == _UNWRITTEN).any():
            broken.append(thread_state.request)  # it computes nothing any more, and would crash if it were freed
            del thread_state.request
            raise MemoryError("OpenVINO computed nothing, and raised nothing, as it does where memory is lacking")
        return texts

    # Run once in one thread: two threads that create OpenVINO's first tensors at the same time deadlock, because one
    # waits for the GIL while it holds the lock of a C++ static that the other waits for.
    first = infer(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64))
    if len(first.vectors) != 1:  # seen with 8-bit weights and a lower ISA
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
