"""The memory that training a student takes, from the shape of its backbone; no weights are read.

Weights are counted on a model without memory (torch's device ``meta``), activations in a forward pass of two and three
layers with random weights on the CPU: each further layer keeps as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.device import checkpoint_layers, choose_dtype, tokens_to_train
from d2llm.models.interaction import make_head
from d2llm.models.lora import attach_lora, train_adapters_only
from d2llm.models.pooling import TextPooling, make_pooling
from d2llm.models.pretrained import keep_layers, last_states, model_class
from d2llm.models.sources import find_model
from d2llm.recipe import BackboneConfig, Lora, Recipe
from d2llm.training.gradient_cache import ALLOCATED, graph_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BYTES_QUANTIZED = {"8bit": 1.0, "4bit": 0.516}  # bytes of a weight: NF4 with the scale of 64 weights in 8 bits
_VOCABULARY = 1_000  # of the model whose activations are counted: they do not depend on it


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes of a part of the memory, and what they were computed from."""

    part: str
    memory: int
    basis: str


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What ``distill`` needs.

    Attributes:
        items: what is in memory at the same time, with the activations of one pass.
        memory_bytes: their sum.
        batch_bytes: activations of a whole batch: with so much more memory, nothing is computed twice.
    """

    items: list[MemoryPart]
    memory_bytes: int
    batch_bytes: int


def training_memory(recipe: Recipe, *, device: str = "cpu", memory: int | None = None) -> TrainingMemory:
    """The memory that ``distill`` with this recipe needs on a device: ``cpu`` or ``cuda``, which need not be there.

    ``memory`` is that of an accelerator, in bytes; it sets the tokens of a pass unless ``training.part_tokens`` does.

    Raises:
        InputError: the backbone is no model of transformers.
        ModelNotFoundError: there is no such model.
    """
    config, training = recipe.student.backbone, recipe.training
    chosen = torch.device(device)
    dtype = choose_dtype(chosen) if device == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = _model(config, torch.float32 if config.tuning.kind == "full" else dtype)
        shape = _Shape(config, model.config.hidden_size)
        pooling = make_pooling(recipe.student.pooling, shape)
        head = nn.ModuleList([pooling, make_head(recipe.student.interaction, pooling.dim)])
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    layers, trained = int(model.config.num_hidden_layers), _prepare(model, config)
    state_size = layers * shape.dim
    part_tokens = training.part_tokens or tokens_to_train(
        chosen, state_size, checkpointed=training.gradient_checkpointing, memory=memory
    )
    weights = sum(weight.nbytes for weight in model.parameters())
    if (stored := _BYTES_QUANTIZED.get(config.quantization)) is not None:
        weights -= round((dtype.itemsize - stored) * linear)
    of_head = sum(weight.numel() for weight in head.parameters())
    trained = trained * (1 + config.has_two_adapters) + of_head
    items = [MemoryPart("weights", weights + 4 * of_head, f"{layers} layers, {config.tuning.kind} tuning")]
    items += _trained_parts(trained)
    if config.tuning.kind == "full" and dtype != torch.float32:
        items.append(MemoryPart("weights in the products' format", weights // 2, "autocast keeps a copy for each step"))
    length = config.max_passage_tokens
    kept = _kept_of_text(recipe, length, layers, dtype, device)
    factor = ALLOCATED.get(device, 1.0)
    texts = max(1, part_tokens // length)
    basis = f"{texts} texts of {length} tokens, {kept * factor / 2**20:,.1f} MiB each"
    items.append(MemoryPart("activations of a pass", round(texts * kept * factor), basis))
    if training.gradient_checkpointing:
        whole = recipe.model_copy(update={"training": training.model_copy(update={"gradient_checkpointing": False})})
        layer = _kept_of_text(whole, length, layers, dtype, device) / layers
        items.append(MemoryPart("a layer that is computed again", round(texts * layer * factor), "its activations"))
    passages = training.num_positives + training.num_hard + training.num_easy
    tokens = training.batch_queries * (config.max_query_tokens + passages * length)
    return TrainingMemory(items, sum(part.memory for part in items), round(tokens / length * kept * factor))


def _trained_parts(trained: int) -> Iterator[MemoryPart]:
    """What the numbers that are trained take besides the weights of the backbone: all in float32."""
    for part, copies, basis in (
        ("gradients", 1, "in float32"),
        ("states of the optimiser", 2, "AdamW's two moments"),
        ("trained weights at the start", 1, "to undo changes that do not help"),
    ):
        yield MemoryPart(part, 4 * copies * trained, f"{trained:,} numbers are trained, {basis}")


class _Shape(Backbone):
    """A backbone that has nothing but its width."""

    def __init__(self, config: BackboneConfig, dim: int) -> None:
        super().__init__(config)
        self._dim = dim

    @property
    def dim(self) -> int:
        return self._dim


def _model(config: BackboneConfig, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """The backbone's model with random weights and ``changes`` of its configuration."""
    from transformers import AutoConfig

    is_here = (Path(config.model).expanduser() / "config.json").is_file()
    location = config.model if is_here else find_model(config.model)
    try:
        shape = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{config.model}' has no shape that transformers knows, so the memory of its training cannot be computed; "
            "give a recipe whose backbone is an encoder or a decoder of transformers"
        ) from error
    for name, value in changes.items():
        setattr(shape, name, value)
    if getattr(shape, "layer_types", None) is not None:
        shape.layer_types = shape.layer_types[: shape.num_hidden_layers]
    model = model_class(location).from_config(shape, dtype=dtype)
    if config.layers is not None and not changes:
        keep_layers(model, config.layers, name=config.model)
    return model


def _prepare(model: PreTrainedModel, config: BackboneConfig) -> int:
    """Make trainable what the tuning says; how many numbers that is."""
    model.requires_grad_(config.tuning.kind == "full")
    if isinstance(config.tuning, Lora):
        attach_lora(model, config.tuning)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _kept_of_text(recipe: Recipe, length: int, layers: int, dtype: torch.dtype, device: str) -> float:
    """Bytes that the forward pass of one text of ``length`` tokens keeps for the backward pass."""
    counted = range(2, 4) if layers > 3 else (layers,)
    first, *more = (_kept(recipe, length, count, dtype, device) for count in counted)
    return first + sum((layers - 2) * (second - first) for second in more)


def _kept(recipe: Recipe, length: int, layers: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that a forward pass of so many layers keeps for each text: what two texts need more than one."""
    config, is_full = recipe.student.backbone, recipe.student.backbone.tuning.kind == "full"
    changes = {"num_hidden_layers": layers, "vocab_size": _VOCABULARY, "pad_token_id": 0}
    model = _model(config, torch.float32 if is_full else dtype, **changes)
    _prepare(model, config)
    model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    if is_full:
        model.train()
    else:
        train_adapters_only(model, True)
    if recipe.training.gradient_checkpointing:
        checkpoint_layers(model, config.model)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    pooling = make_pooling(recipe.student.pooling, _Shape(config, model.config.hidden_size))
    one, two = (_kept_of_texts(model, pooling, texts, length, dtype) for texts in (1, 2))
    return two - one


def _kept_of_texts(model: PreTrainedModel, pooling: TextPooling, texts: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of so many texts keeps."""
    ids = torch.ones(texts, length, dtype=torch.long)
    with graph_bytes(nn.ModuleList([model, pooling])) as num_bytes:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states = last_states(model, ids, torch.ones_like(ids), None)
        vectors = pooling(states, ids.bool())
        counted = num_bytes()
    del vectors
    return counted
