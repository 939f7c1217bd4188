"""8-bit weights in an ONNX graph, in the form that each of the two runtimes multiplies fast."""

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
"""How many numbers of a token's state share a scale in OpenVINO: smaller groups are more exact, this one no slower."""
_SMALLEST_SIDE = 16  # smaller weight matrices are not worth quantising


def quantise(file: Path, runtime: Runtime) -> None:
    """Quantise the weights of a graph's matrix products to 8 bits with one scale per column, in place.

    The runtime quantises the activations as it runs: ONNX Runtime with one scale for the whole batch, OpenVINO with one
    per token and group of numbers.

    Raises:
        MissingExtraError: ``onnx`` or ``onnxruntime`` is not installed.
    """
    if runtime == "onnx":
        _for_onnx_runtime(file)
    else:
        _for_openvino(file)


def _for_onnx_runtime(file: Path) -> None:
    tools: Any = require("onnxruntime.quantization", extra="export", purpose="writing 8-bit weights")
    with _without_advice():
        tools.quantize_dynamic(
            file,
            file,
            per_channel=True,
            weight_type=tools.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},  # attention multiplies two activations, and is small
        )


@contextmanager
def _without_advice() -> Generator[None]:
    """Suppress ONNX Runtime's advice to run its pre-processing first, which fails on these graphs (docs/LOG.md).

    The advice is logged with the root logger, to which logging adds a handler if it has none; the null handler
    prevents that.
    """
    root, handler = logging.getLogger(), logging.NullHandler()

    def is_not_advice(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root.addFilter(is_not_advice)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(is_not_advice)


def _for_openvino(file: Path) -> None:
    """Replace each weight by integers and an operator that scales them: OpenVINO's form of compressed weights."""
    onnx: Any = require("onnx", extra="export", purpose="writing 8-bit weights")
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
