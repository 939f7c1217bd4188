"""A head's weights as plain arrays, folded as far as they can be: what ``models.export.numpy_head`` scores with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from d2llm.core.types import TASKS, Task
from d2llm.models.interaction import CosineHead, Interaction


def head_weights(head: Interaction | CosineHead) -> dict[str, np.ndarray]:
    """Arrays of float32 by name; those that both tasks share once as ``name``, the others as ``task/name``."""
    with torch.inference_mode():
        of_task = {task: _task_weights(head, task) for task in TASKS}
    first, second = (of_task[task] for task in TASKS)
    weights: dict[str, np.ndarray] = {}
    for name in first:
        if np.array_equal(first[name], second[name]):
            weights[name] = first[name]
        else:
            weights |= {f"{task}/{name}": of_task[task][name] for task in TASKS}
    return weights


def _task_weights(head: Interaction | CosineHead, task: Task) -> dict[str, np.ndarray]:
    if isinstance(head, CosineHead):
        return {"anchor": _array(head.log_scale.exp() / head.dim)}
    layers = head.split_layers(task)
    parts: dict[str, Tensor | None] = {
        "query": layers.query,
        "passage": layers.passage,
        "product": layers.product,
        "difference": layers.difference,
        "first_bias": layers.bias,
        "last": layers.last,
        "constant": layers.constant,
    }
    for number, layer in enumerate(layers.inner):
        parts |= {f"inner_{number}_weight": layer.weight, f"inner_{number}_bias": layer.bias}
    if head.has_anchor:
        # Of the unit vectors: anchor_queries is linear, so this is its matrix.
        parts["anchor"] = head.anchor_queries(torch.eye(head.dim, device=layers.last.device), task)
        parts["bound"] = head.bound(task)
    for name, gate in (("query_gate", head.query_gate), ("passage_gate", head.passage_gate)):
        if gate is not None:
            parts |= {f"{name}_weight": gate.weight[0], f"{name}_bias": gate.bias[0]}
    return {name: _array(tensor) for name, tensor in parts.items() if tensor is not None}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().contiguous().numpy().copy()
