"""Weights of eight bits in an ONNX graph, in the two forms that the runtimes multiply fast."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2llm.core.extras import require

Runtime = Literal["onnx", "openvino"]
OPENVINO_GROUP = 128
"""Of how many numbers of a token's state OpenVINO takes one scale: finer is more exact, and no slower at this size."""
_SMALLEST_SIDE = 16  # of a weight that is worth it


def quantise(file: Path, runtime: Runtime) -> None:
    """Turn the weights of a graph's products into eight bits a number, one scale for each column, in place.

    What they are multiplied with is quantised by the runtime when it meets it: by ONNX Runtime with one scale for a
    whole batch, by OpenVINO with one for each token and group of numbers.

    Raises:
        MissingExtraError: ``onnx`` or ``onnxruntime`` is not installed.
    """
    if runtime == "onnx":
        _for_onnx_runtime(file)
    else:
        _for_openvino(file)


def _for_onnx_runtime(file: Path) -> None:
    tools: Any = require("onnxruntime.quantization", extra="export", purpose="writing weights of eight bits")
    with _without_advice():
        tools.quantize_dynamic(
            file,
            file,
            per_channel=True,
            weight_type=tools.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},  # those of attention are of two computed sides, and small
        )


@contextmanager
def _without_advice() -> Generator[None]:
    """Without ONNX Runtime's advice to run its pre-processing first, which fails on these graphs (docs/LOG.md).

    It is logged by the root logger, which for that gets a handler of its own if it has none.
    """
    root, handler = logging.getLogger(), logging.NullHandler()

    def is_other(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root.addFilter(is_other)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(is_other)


def _for_openvino(file: Path) -> None:
    """Each weight as whole numbers and an operator that scales them, which OpenVINO knows as a compressed weight."""
    onnx: Any = require("onnx", extra="export", purpose="writing weights of eight bits")
    model = onnx.load(str(file))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    done: set[str] = set()
    for node in model.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name in weights and len(weights[name].dims) == 2 and min(weights[name].dims) >= _SMALLEST_SIDE:
            if name not in done:
                codes, scales = _by_column(onnx.numpy_helper.to_array(weights[name]))
                model.graph.initializer.append(onnx.numpy_helper.from_array(codes, f"{name}.codes"))
                model.graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}.scales"))
                inputs = [f"{name}.codes", f"{name}.scales"]
                nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}.scaled"], axis=1))
                done.add(name)
            node.input[1] = f"{name}.scaled"
        nodes.append(node)
    still_used = {name for node in nodes for name in node.input}
    for tensor in [weights[name] for name in done if name not in still_used]:
        model.graph.initializer.remove(tensor)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(file))


def _by_column(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.maximum(abs(weight).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.round(weight / scales).astype(np.int8), scales
