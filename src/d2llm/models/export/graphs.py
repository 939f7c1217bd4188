"""Export a student as ONNX graphs: from tokens to a vector and states, and from vectors to logits.

Both are traced from the student's own modules, so there is no second definition of what it computes. The same ONNX file
works with ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from d2llm.core.errors import InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.types import Task
from d2llm.models.backbone import Backbone
from d2llm.models.device import inference
from d2llm.models.export.eight_bits import Runtime, quantise
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
