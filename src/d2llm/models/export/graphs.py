"""Export a student as ONNX graphs: from tokens to a vector and states, and from vectors to logits.

Both are traced from the student's own modules, so there is no second definition of what it computes. The same ONNX file
works with ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from d2llm.core.errors import InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.types import Task
from d2llm.models.backbone import Backbone
from d2llm.models.device import inference
from d2llm.models.interaction import CosineHead, Interaction
from d2llm.models.pooling import TextPooling, to_sphere
from d2llm.models.pretrained import last_states

OPSET = 18
"""ONNX operator set: the first version for which torch's exporter supports everything the models need."""


class TextGraph(nn.Module):
    """Token ids and mask [batch, tokens], padded on the right, to vectors [batch, dim] and the tokens' states."""

    def __init__(self, backbone: Backbone, pooling: TextPooling, *, on_sphere: bool) -> None:
        super().__init__()
        self.model, self.pooling = backbone.model, pooling
        self._weighing = backbone.pooling.weighing
        self._on_sphere = on_sphere
        self.training = backbone.training  # a new module starts in training mode, and would switch its submodules to it

    def forward(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens states"]]:
        """Vectors of tokenized texts, and the states of their tokens, from which token embeddings are made."""
        states = last_states(self.model, input_ids, attention_mask, self._weighing)
        vectors = self.pooling(states, attention_mask.bool())
        return (to_sphere(vectors) if self._on_sphere else vectors), states


class ScoreGraph(nn.Module):
    """Query and passage vectors to the logits [queries, passages] of one task."""

    def __init__(self, head: Interaction | CosineHead, task: Task) -> None:
        super().__init__()
        self.head, self._task = head, task
        self.training = head.training

    def forward(
        self, query_vectors: Float[Tensor, "queries dim"], passage_vectors: Float[Tensor, "passages dim"]
    ) -> Float[Tensor, "queries passages"]:
        """Logits of every query with every passage."""
        return self.head(query_vectors, passage_vectors, self._task).logits


def write_text_graph(
    backbone: Backbone,
    pooling: TextPooling,
    head: Interaction | CosineHead,
    file: Path,
    *,
    int8_for: Runtime | None = None,
) -> None:
    """Write the graph that encodes texts, for any number of texts and tokens.

    ``head`` matters because the cosine head puts its vectors on a sphere. ``int8_for`` is the runtime whose 8-bit form
    is written; by default the products are float32.

    Raises:
        InputError: the student is not in float32 on the CPU.
        ModelError: the backbone has parts that ONNX does not support.
        MissingExtraError: ``onnx`` or ``onnxruntime`` is not installed.
    """
    backbone.require_tokens("a graph of the backbone")
    backbone.require_merged("a graph of the backbone")
    if backbone.device.type != "cpu" or backbone.compute_dtype != torch.float32:
        raise InputError(
            f"a graph is exported from float32 weights on the CPU, but this student computes in "
            f"{str(backbone.compute_dtype).removeprefix('torch.')} on {backbone.device.type}; load it with "
            "device='cpu', dtype='float32'"
        )
    graph = TextGraph(backbone, pooling, on_sphere=isinstance(head, CosineHead) and head.kind == "cosine")
    # An example with padding and no dimension of size 1, so that the tracer takes no size for a constant.
    mask = torch.tensor([[1] * 16, [1] * 9 + [0] * 7, [1] * 3 + [0] * 13])
    examples = {"input_ids": mask * 5, "attention_mask": mask}
    dynamic = {0: "batch", 1: "tokens"}
    sizes = {"input_ids": dynamic, "attention_mask": dynamic, "vectors": {0: "batch"}, "states": dynamic}
    config: Any = backbone.model.config
    attention: str = config._attn_implementation
    # Plain attention: the runtimes fuse its products again, and are no slower.
    backbone.model.set_attn_implementation("eager")
    try:
        _export(graph, examples, ["vectors", "states"], sizes, file)
    finally:
        backbone.model.set_attn_implementation(attention)
    if int8_for is not None:
        quantise(file, int8_for)


def write_score_graph(head: Interaction | CosineHead, task: Task, file: Path) -> None:
    """Write the graph that scores vectors in one task, for any number of queries and passages.

    Raises:
        MissingExtraError: ``onnx`` is not installed.
    """
    examples = {"query_vectors": torch.ones(2, head.dim), "passage_vectors": torch.ones(3, head.dim)}
    queries, passages = {0: "queries"}, {0: "passages"}
    sizes = {"query_vectors": queries, "passage_vectors": passages, "logits": queries | {1: "passages"}}
    _export(ScoreGraph(head, task), examples, ["logits"], sizes, file)


def _export(
    graph: nn.Module, examples: dict[str, Tensor], outputs: list[str], sizes: dict[str, dict[int, str]], file: Path
) -> None:
    require("onnx", extra="export", purpose="writing ONNX files")
    with inference(graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about every size that it turns into a constant
        try:
            # Not torch's newer exporter, which specialises the models' masks to the example's sizes and needs another
            # package.
            torch.onnx.export(
                graph,
                tuple(examples.values()),
                str(file),
                input_names=list(examples),
                output_names=outputs,
                dynamic_axes=sizes,
                opset_version=OPSET,
                dynamo=False,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ModelError(
                f"this backbone cannot be written as an ONNX graph ({reason}); encode with torch"
            ) from error


# 8-bit weights, in the form that each of the two runtimes multiplies fast ---------------------------------------------

# A vector must not depend on what else is in its batch, so the activations have scales of their own for each token,
# never one for the whole batch.

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
