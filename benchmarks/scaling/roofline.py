"""The limits of this machine, measured: products of a model's shapes, and copying; and what a model's work takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2llm.models.device import onednn_linear

ROWS = 512
"""Rows of the products: the tokens that a core reads at a time."""
_SECONDS = 0.4
_COPIED = 1 << 28


@dataclass(frozen=True)
class Encoder:
    """The shape of a BERT-like encoder, and the rank of the adapters that are trained (0: all its weights are)."""

    dim: int
    inner: int
    layers: int
    rank: int = 0

    @classmethod
    def shape_of(cls, model: Any, rank: int = 0) -> Encoder:
        """The shape of a model of ``transformers``."""
        config = model.config
        return cls(config.hidden_size, config.intermediate_size, config.num_hidden_layers, rank)

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, times) of the linear layers of one layer."""
        return [(self.dim, self.dim, 4), (self.dim, self.inner, 1), (self.inner, self.dim, 1)]

    def forward(self, shapes: Iterable[tuple[int, int]]) -> float:
        """Floating-point operations that read texts, given as (number, tokens of each)."""
        return sum(linear + attention for linear, attention in map(self._forward, shapes))

    def step(self, shapes: Iterable[tuple[int, int]]) -> float:
        """Those of a forward and backward pass: frozen weights have no gradient."""
        operations = 0.0
        for rows, tokens in shapes:
            linear, attention = self._forward((rows, tokens))
            adapters = sum(6 * self.rank * (i + o) * times for i, o, times in self.products) * self.layers
            operations += (2 if self.rank else 3) * linear + 3 * attention + adapters * rows * tokens
        return operations

    def _forward(self, shape: tuple[int, int]) -> tuple[float, float]:
        rows, tokens = shape
        linear = sum(2 * i * o * times for i, o, times in self.products)
        return float(self.layers * linear * rows * tokens), float(self.layers * 4 * self.dim * rows * tokens**2)


def measure_limits(shape: Encoder, formats: Iterable[str]) -> dict[str, float]:
    """Operations a second (1e9) of the model's products in each number format, and GB a second of copying.

    The products of a layer count as often as the layer has them, each with the library that is fastest here.
    """
    limits = {name: _products(shape, name) for name in formats}
    source = torch.zeros(_COPIED // 4)
    target = torch.empty_like(source)
    limits["copy_gb_per_second"] = 2 * _COPIED / _fastest(lambda: target.copy_(source)) / 1e9
    return limits


def _products(shape: Encoder, number_format: str) -> float:
    seconds = operations = 0.0
    for inputs, outputs, times in shape.products:
        seconds += times * min(map(_fastest, _ways(inputs, outputs, number_format)))
        operations += times * 2 * ROWS * inputs * outputs
    return operations / seconds / 1e9


def _ways(inputs: int, outputs: int, number_format: str) -> Iterator[Callable[[], Any]]:
    """The same product, computed by the libraries that can."""
    if number_format == "int8":
        yield _onnx_product(inputs, outputs, integers=True)
        return
    dtype = getattr(torch, number_format)
    states, weight = torch.randn(ROWS, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    yield lambda: torch.nn.functional.linear(states, weight)
    if number_format == "float32":
        yield _onnx_product(inputs, outputs, integers=False)
        if torch.backends.mkldnn.is_available():
            yield lambda: onednn_linear(states, weight)


def _onnx_product(inputs: int, outputs: int, *, integers: bool) -> Callable[[], Any]:
    """ONNX Runtime's product with a constant matrix."""
    import onnx
    import onnxruntime

    rng = np.random.default_rng(0)
    types = (np.uint8, np.int8, np.int32) if integers else (np.float32,) * 3
    states = rng.integers(0, 127, (ROWS, inputs)).astype(types[0])
    weight = onnx.numpy_helper.from_array(rng.integers(-127, 127, (inputs, outputs)).astype(types[1]), "weight")
    element = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in types]
    given = onnx.helper.make_tensor_value_info("states", element[0], states.shape)
    result = onnx.helper.make_tensor_value_info("result", element[2], (ROWS, outputs))
    node = onnx.helper.make_node("MatMulInteger" if integers else "MatMul", ["states", "weight"], ["result"])
    graph = onnx.helper.make_graph([node], "product", [given], [result], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"states": states})


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of many calls: what the machine can do when nothing else runs."""
    work()
    end, fastest = time.perf_counter() + _SECONDS, float("inf")
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest
