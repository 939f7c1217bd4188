"""8-bit weights in an ONNX graph, in the form that each of the two runtimes multiplies fast.

A vector must not depend on what else is in its batch, so the activations have scales of their own for each token, never
one for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2llm.core.extras import require

Runtime = Literal["onnx", "openvino"]
OPENVINO_GROUP = 128
"""How many numbers of a token's state share a scale in OpenVINO: smaller groups are more exact, this one no slower."""
_MIN_SIDE = 16  # smaller weight matrices are not worth quantising
_ZERO = 128  # code of a weight of 0, so that codes are unsigned


def quantise(file: Path, runtime: Runtime) -> None:
    """Quantise the weights of a graph's matrix products to 8 bits with one scale per column, in place.

    The activations are quantised as the graph runs: for ONNX Runtime by nodes of the graph, with step and offset by
    token; in OpenVINO by the runtime, with one scale per token and group of numbers.

    Raises:
        MissingExtraError: ``onnx`` is not installed.
    """
    onnx: Any = require("onnx", extra="export", purpose="writing 8-bit weights")
    model = onnx.load(str(file))
    make = _IntegerProducts(onnx, model) if runtime == "onnx" else _ScaledWeights(onnx, model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    replaced: set[str] = set()
    for node in model.graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name in weights and len(weights[name].dims) == 2 and min(weights[name].dims) >= _MIN_SIDE:
            if name not in replaced:
                make.add_weight(name, *_by_column(onnx.numpy_helper.to_array(weights[name])))
                replaced.add(name)
            nodes += make.product(node)
        else:
            nodes.append(node)
    still_used = {name for node in nodes for name in node.input}
    for tensor in [weights[name] for name in replaced if name not in still_used]:
        model.graph.initializer.remove(tensor)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(file))


class _Graph:
    """Adds constants and nodes to a model."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx = onnx
        self._constants: Any = model.graph.initializer
        self._node: Callable[..., Any] = onnx.helper.make_node

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._constants.append(self._onnx.numpy_helper.from_array(value, name))
        return name


class _ScaledWeights(_Graph):
    """Integers and an operator that scales them: OpenVINO's form of compressed weights."""

    def __init__(self, onnx: Any, model: Any) -> None:
        super().__init__(onnx, model)
        self._scaled: set[str] = set()

    def add_weight(self, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        """Store a weight's codes [rows, columns] and scales [columns]."""
        self._constant(f"{name}.codes", codes)
        self._constant(f"{name}.scales", scales)

    def product(self, node: Any) -> list[Any]:
        """The nodes in place of a product with this weight."""
        name = node.input[1]
        node.input[1] = f"{name}.scaled"
        if name in self._scaled:
            return [node]
        self._scaled.add(name)
        inputs = [f"{name}.codes", f"{name}.scales"]
        return [self._node("DequantizeLinear", inputs, [f"{name}.scaled"], axis=1), node]


class _IntegerProducts(_Graph):
    """Products of integers, exact on every CPU, between activations x = low + step * code and weights.

    x W = step * scale * (code (W_code - 128)) + low * (sum of W's column). Both codes are unsigned: ONNX Runtime's
    product of unsigned and signed bytes overflows on CPUs without VNNI, that of two unsigned ones does not, and is no
    slower. Its own dynamic quantisation has one step for the whole batch.
    """

    def __init__(self, onnx: Any, model: Any) -> None:
        super().__init__(onnx, model)
        self._codes: set[str] = set()  # activations that have been quantised
        self._last = self._constant("eight_bits.last", np.array([-1], np.int64))
        self._most = self._constant("eight_bits.most", np.array(255, np.float32))
        self._least_range = self._constant("eight_bits.least_range", np.array(1e-30, np.float32))
        self._none = self._constant("eight_bits.none", np.array(0, np.uint8))
        self._zero = self._constant("eight_bits.zero", np.array(_ZERO, np.uint8))

    def add_weight(self, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        """Store a weight's codes [rows, columns], scales [columns] and the sums of its columns."""
        self._constant(f"{name}.codes", (codes.astype(np.int16) + _ZERO).astype(np.uint8))
        self._constant(f"{name}.scales", scales)
        self._constant(f"{name}.sums", (codes.sum(axis=0, dtype=np.int64) * scales).astype(np.float32))

    def product(self, node: Any) -> list[Any]:
        """The nodes in place of a product with this weight."""
        name, weight, out = *node.input, node.output[0]
        nodes = [] if name in self._codes else self._quantised(name)
        self._codes.add(name)
        inputs = [f"{name}.codes", f"{weight}.codes", self._none, self._zero]
        return [
            *nodes,
            self._node("MatMulInteger", inputs, [f"{out}.integers"]),
            self._node("Cast", [f"{out}.integers"], [f"{out}.whole"], to=self._onnx.TensorProto.FLOAT),
            self._node("Mul", [f"{out}.whole", f"{name}.step"], [f"{out}.stepped"]),
            self._node("Mul", [f"{out}.stepped", f"{weight}.scales"], [f"{out}.scaled"]),
            self._node("Mul", [f"{name}.low", f"{weight}.sums"], [f"{out}.offset"]),
            self._node("Add", [f"{out}.scaled", f"{out}.offset"], [out]),
        ]

    def _quantised(self, name: str) -> list[Any]:
        """Codes, ``step`` and ``low`` of activations, by token."""
        return [
            self._node("ReduceMin", [name, self._last], [f"{name}.low"], keepdims=1),
            self._node("ReduceMax", [name, self._last], [f"{name}.high"], keepdims=1),
            self._node("Sub", [f"{name}.high", f"{name}.low"], [f"{name}.any_range"]),
            self._node("Max", [f"{name}.any_range", self._least_range], [f"{name}.range"]),
            self._node("Div", [f"{name}.range", self._most], [f"{name}.step"]),
            self._node("Div", [self._most, f"{name}.range"], [f"{name}.steps"]),
            self._node("Sub", [name, f"{name}.low"], [f"{name}.above"]),
            self._node("Mul", [f"{name}.above", f"{name}.steps"], [f"{name}.exact"]),
            self._node("Round", [f"{name}.exact"], [f"{name}.rounded"]),
            self._node("Cast", [f"{name}.rounded"], [f"{name}.codes"], to=self._onnx.TensorProto.UINT8),
        ]


def _by_column(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.maximum(abs(weight).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.round(weight / scales).astype(np.int8), scales
