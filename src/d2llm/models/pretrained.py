"""The backbone that ``transformers`` loads: any encoder or decoder without its language-model head.

With two adapters, queries and passages are read with different low-rank changes of the same weights, after Jung et al.,
"Semi-Siamese Bi-encoder Neural Ranking Model Using Lightweight Fine-Tuning", WWW 2022 (arXiv 2110.14943). There the
adapters of the attention's queries are shared and those of its values are not; here nothing is shared but the backbone.

Depths: the states of tokens after some of the layers, in one pass, as the model cut to these layers would give them.
Source: Li et al., "2D Matryoshka Sentence Embeddings", 2024 (arXiv 2402.14776). Which depths learn in a step, and
whether they are aligned with the last layer, says ``losses.nested_cross_entropy``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2llm.core.errors import InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.json_values import read_model_json
from d2llm.models.backbone import Backbone, load_weights
from d2llm.models.device import use_plain_attention_on_cpu
from d2llm.models.fast_layers import sum_gradients_by_row
from d2llm.models.length_limit import check_layers, check_limits
from d2llm.models.lora import (
    adapter_state,
    attach_lora,
    compute_adapter,
    has_adapters,
    join_adapters,
    load_adapter_state,
    merge_adapter,
    merged_state_dict,
    own_linear_weights,
    sharing_copy,
    train_adapters_only,
)
from d2llm.models.sources import (
    find_model,
    find_model_file,
    fingerprint_model,
    load_pretrained,
    load_tokenizer,
    model_type,
    quiet_transformers,
)
from d2llm.ops.pooling import to_right_padding
from d2llm.recipe import AutoPooling, BackboneConfig, Lora, Pooling, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MODEL = "model"
_QUERY = "query:"  # before the names of the tensors of the queries' adapter, if there are two


class PretrainedBackbone(Backbone):
    """Any decoder or encoder of ``transformers`` without its language-model head.

    Trained weights stay in float32, whatever ``compute_dtype`` is.
    """

    def __init__(
        self,
        config: BackboneConfig,
        pooling: Pooling | None = None,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        auto_pooling: str | None = None,
    ) -> None:
        """Load the weights that ``config.model`` names, for a pooling of their states, by default ``auto``.

        On torch's device ``meta`` no weights are read: what does not fit is refused all the same, in a second.
        ``auto_pooling`` is the kind of pooling that ``auto`` stands for; by default, the model's folder says it.

        Raises:
            ModelNotFoundError: no usable weights there.
            ModelError: the model is neither a plain encoder nor a plain decoder.
            InputError: a token limit exceeds what the model can read, ``layers`` exceeds its number of layers, the
                pooling does not fit, ``bidirectional`` is set for an encoder, or tuning is "lora" and it has no layers.
        """
        super().__init__(config, pooling, compute_dtype=compute_dtype)
        self.location = find_model(config.model)
        weight_dtype = torch.float32 if config.tuning.kind == "full" else compute_dtype
        self.tokenizer = load_tokenizer(self.location)
        has_weights = device.type != "meta"
        options = quantized_options(config.quantization, device=device, dtype=compute_dtype, what="student")
        model: Any = _load_model(self.location, weight_dtype, options, with_weights=has_weights)
        self._modules[_MODEL] = (model if options else model.to(device)).eval()
        self.model.requires_grad_(False)
        prepare_quantized(model, config.quantization)
        if config.tuning.kind == "lora" and not any(isinstance(part, nn.Linear) for part in self.model.modules()):
            raise InputError(
                f"'{config.model}' has no linear layers, so LoRA has nothing to adapt; set tuning to full or frozen"
            )
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"'{config.model}' is an encoder-decoder model ({type(self.model).__name__}) whose encoder cannot be "
                "loaded alone; a backbone is an encoder, a decoder, or the encoder of a T5 model: use another model"
            )
        if config.layers is not None:
            keep_layers(self.model, config.layers, name=config.model)
        if config.bidirectional and has_weights:  # it compares what the model makes of two texts
            read_both_ways(self.model, name=config.model)
        if (weighing := self.pooling.weighing) is not None:
            weighing.check_model(self.model.config, config.model)
            if weighing.reads_attention:
                self.model.set_attn_implementation("eager")  # fused attention does not give its weights
        if hasattr(self.model.config, "use_cache"):
            self.model.config.use_cache = False  # each text is read once, so no key-value cache is needed
        self.query_model = sharing_copy(self.model) if config.has_two_adapters else None
        self._merged_adapter: dict[str, Tensor] = {}
        self._final: list[nn.Module] = []  # what follows the last layer: in a list, as it is a part of the model
        if isinstance(self.pooling.weightless, AutoPooling):
            self.own_pooling = Pooling.of(auto_pooling or _auto_pooling(config, self.location, self.model.config))
        limits = {"max_query_tokens": config.max_query_tokens, "max_passage_tokens": config.max_passage_tokens}
        check_limits(self.model.config, config.model, limits)

    @property
    def model(self) -> PreTrainedModel:
        """The model that reads passages, and queries if these have none of their own."""
        return cast("PreTrainedModel", self._modules[_MODEL])

    @property
    def dim(self) -> int:
        """Width of the states."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of layers; 0 for a model without layers."""
        return int(getattr(self.model.config, "num_hidden_layers", 0))

    def cut(self, depth: int) -> None:
        """Remove all layers but the first ``depth``, in place.

        Raises:
            InputError: there are not so many.
        """
        modules: set[str] = set()
        for prefix, model in self._models.items():
            keep_layers(model, depth, name=self.config.model)
            modules |= {prefix + name for name, _ in model.named_modules()}
        merged = self._merged_adapter.items()
        self._merged_adapter = {name: tensor for name, tensor in merged if name.rpartition(".")[0] in modules}

    def fingerprint_base(self) -> str:
        """Fingerprint of the pretrained weights, before any tuning."""
        return fingerprint_model(self.location)

    def prepare_training(self, *, seed: int = 0) -> None:
        """Make trainable what ``config.tuning`` says: adapters (those there stay), everything, or nothing."""
        if isinstance(self.config.tuning, Lora) and not has_adapters(self.model):
            for index, model in enumerate(self._models.values()):
                attach_lora(model, self.config.tuning, seed=seed + index)
        elif self.config.tuning.kind == "full":
            self.model.requires_grad_(True)
            sum_gradients_by_row(self.model)
        for model in self._models.values():
            use_plain_attention_on_cpu(model)

    def train(self, mode: bool = True) -> PretrainedBackbone:
        """Switch training mode; with LoRA, only the adapters' dropout is switched on."""
        super().train(mode)
        if self.config.tuning.kind != "full":
            for model in self._models.values():
                train_adapters_only(model, mode)
        return self

    @property
    def _models(self) -> dict[str, PreTrainedModel]:
        """The model, and that of queries if they have their own, by the prefix of the names of their adapters."""
        return {"": self.model} | ({} if self.query_model is None else {_QUERY: self.query_model})

    def _adapters(self, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The adapter of each of the models in a tuned state, by prefix."""
        return {
            prefix: {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(_QUERY) == (prefix == _QUERY)
            }
            for prefix in self._models
        }

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changed since the pretrained weights: the adapter's tensors, all weights, or nothing."""
        if self.config.tuning.kind == "lora":
            attached = {
                p + n: tensor for p, model in self._models.items() for n, tensor in adapter_state(model).items()
            }
            return join_adapters(self._merged_adapter, attached)
        if self.config.tuning.kind == "full":
            return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        return {}

    def load_tuned_state(self, state: dict[str, Tensor], *, merge: bool) -> None:
        """Load tensors made by ``tuned_state`` into the attached adapters, or merge them permanently into the weights.

        Raises:
            ModelError: the tensors belong to another architecture.
        """
        if self.config.tuning.kind == "full":
            load_weights(self.model, state, name=self.config.model)
        elif self.config.tuning.kind == "lora":
            if self.query_model is not None and merge:
                own_linear_weights(self.query_model)
            for prefix, adapter in self._adapters(state).items():
                merged = merge_adapter if self.config.quantization == "none" else compute_adapter
                (merged if merge else load_adapter_state)(self._models[prefix], adapter)
            if merge:
                self._merged_adapter = join_adapters(self._merged_adapter, state)

    @property
    def is_saved_whole(self) -> bool:
        """Whether all weights were tuned."""
        return self.config.tuning.kind == "full"

    def save_merged(self, folder: Path) -> None:
        """Write the configuration and all weights, adapters merged, in the format of the plain model.

        Raises:
            InputError: tuning cannot be merged (``BackboneConfig.why_not_merged``).
        """
        self.require_merged("a copy with all weights merged")
        self.model.config.save_pretrained(folder)
        weights = {name: tensor.contiguous() for name, tensor in merged_state_dict(self.model).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def forward(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """States of the last layer and their mask, right-padded regardless of the input's padding."""
        (states,), mask = self.states_at(token_ids, mask, ())
        return states, mask

    def states_at(
        self, token_ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], depths: Sequence[int]
    ) -> tuple[list[Float[Tensor, "batch tokens dim"]], Bool[Tensor, "batch tokens"]]:
        """States after the first ``depths`` layers, then those of the last layer, and their mask.

        Raises:
            ModelError: the states of this architecture cannot be read after fewer layers.
        """
        token_ids, mask = to_right_padding(token_ids, mask)
        if self.query_model is None:
            return self._read(self.model, token_ids, mask, depths), mask
        is_query = token_ids[:, 0] < 0
        token_ids = torch.where(token_ids < 0, ~token_ids, token_ids)
        models = (self.model, ~is_query), (self.query_model, is_query)
        read = [(rows, self._read(model, token_ids[rows], mask[rows], depths)) for model, rows in models if rows.any()]
        together = [states.new_zeros(*token_ids.shape, self.dim) for states in read[0][1]]
        for rows, read_states in read:
            for states, part in zip(together, read_states, strict=True):
                states[rows] = part
        return together, mask

    def _read(
        self,
        model: PreTrainedModel,
        token_ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        depths: Sequence[int],
    ) -> list[Float[Tensor, "batch tokens dim"]]:
        def read() -> Tensor:
            return last_states(model, token_ids, mask, self.pooling.weighing)

        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            if not depths:
                return [read()]
            layers = layers_of(model, name=self.config.model)
            if not self._final:
                self._final.append(final_module(model, layers, read, name=self.config.model))
            return read_depths(layers, self._final[0], depths, read)


def last_states(
    model: Any,
    token_ids: Int[Tensor, "batch tokens"],
    mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    weighing: Pooling | None,
) -> Float[Tensor, "batch tokens dim"]:
    """States of a model's last layer, or what a pooling makes of its attention or of other layers' states."""
    if weighing is None:
        return model(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
    wanted = {"output_attentions": weighing.reads_attention, "output_hidden_states": weighing.reads_layers}
    output = model(input_ids=token_ids, attention_mask=mask.long(), **wanted)
    return weighing.weigh(output.last_hidden_state, mask, output)


def keep_layers(model: nn.Module, layers: int | Sequence[int], *, name: str) -> None:
    """Keep the first ``layers`` layers of a model, or the listed ones, and remove the others in place.

    Raises:
        InputError: the model (``name`` in the message) has fewer layers.
        ModelError: its layers are not a single list of modules.
    """
    config = cast(Any, model).config
    stack = layers_of(model, name=name)
    total = len(stack)
    kept = range(layers) if isinstance(layers, int) else layers
    if kept[0] > 0 and any("relative_attention_bias" in part for part, _ in stack[0].named_parameters()):
        raise InputError(f"layers leaves out layer 0 of '{name}', which has the positions of all its layers; keep it")
    check_layers(layers, total, name=name)
    for index in reversed(range(total)):
        if index not in kept:
            del stack[index]
    config.num_hidden_layers = len(stack)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]


def read_both_ways(model: nn.Module, *, name: str) -> None:
    """Let every token of a decoder attend to all tokens of its text, in place.

    BehnamGhader et al., "LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders", COLM 2024 (arXiv
    2404.05961), section 2, the first of three steps.

    Raises:
        InputError: the model (``name`` in the message) already reads so.
        ModelError: its attention cannot be changed in this way.
    """
    config = cast(Any, model).config
    if getattr(config, "is_causal", True) and _sees_what_follows(model):  # a student's weights say that they are not
        raise InputError(f"'{name}' is no decoder: its tokens attend to all others already; delete bidirectional")
    config.is_causal = False  # from it, transformers makes the mask
    for module in model.modules():
        if hasattr(module, "is_causal"):
            cast(Any, module).is_causal = False  # and from these what fused attention does without one
    if not _sees_what_follows(model):
        raise ModelError(
            f"the attention of '{name}' ({type(model).__name__}) cannot be made bidirectional; use a decoder such as "
            "Llama, Mistral, Qwen or Gemma, or delete bidirectional"
        )


def _sees_what_follows(model: nn.Module) -> bool:
    """Whether a text's first state depends on its last token."""
    device = next(model.parameters()).device
    ids = torch.tensor([[3, 3, 3], [3, 3, 4]], device=device)
    with torch.no_grad():
        states = [
            model(input_ids=token_ids[None], attention_mask=torch.ones_like(token_ids[None])) for token_ids in ids
        ]
    first, other = (output.last_hidden_state[0, 0].float() for output in states)
    return not torch.allclose(first, other, rtol=1e-4, atol=1e-6)


def layers_of(model: nn.Module, *, name: str) -> nn.ModuleList:
    """The layers of a model (``name`` in the message).

    Raises:
        ModelError: they are not a single list of modules.
    """
    total = int(cast(Any, model).config.num_hidden_layers)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(stacks) != 1:
        raise ModelError(f"'{name}' ({type(model).__name__}) has no single list of layers to cut; leave layers unset")
    return stacks[0]


def _load_model(
    location: str, dtype: torch.dtype, options: dict[str, Any], *, with_weights: bool = True
) -> PreTrainedModel:
    kinds, kind = BackboneConfig.kinds, model_type(location)
    if kind in kinds.kinds:
        if options:
            raise InputError(f"'{location}' is of kind {kind}, which is not quantised here; set quantization to none")
        return kinds.find(kind).load_model(location, dtype)
    if with_weights:
        return load_pretrained(model_class(location), location, dtype=dtype, **options)
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(location, trust_remote_code=False)
    with torch.device("meta"), quiet_transformers():
        return model_class(location).from_config(shape, dtype=dtype)


def model_class(location: str) -> Any:
    """The class that loads a model without its language-model head, and without its decoder if it is a T5 model."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    encoder_class = {**MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}.get(model_type(location), "")
    return AutoModelForTextEncoding if encoder_class.endswith("EncoderModel") else AutoModel


def _auto_pooling(config: BackboneConfig, location: str, model_config: Any) -> str:
    """The kind of pooling that a model was trained with."""
    settings = find_model_file(location, "1_Pooling/config.json")  # where sentence-transformers keeps it
    if settings is not None:
        modes = read_model_json(settings)
        # Newer files name the mode or modes, older ones have a flag per mode.
        named = modes.get("pooling_mode")
        flagged = [name for flag, name in _POOLING_FLAGS.items() if modes.get(flag) is True]
        chosen = [named] if isinstance(named, str) else list(named or flagged)
        kinds = {mode: kind for kind, mode in SENTENCE_TRANSFORMERS_POOLINGS.items()} | {"mean_sqrt_len_tokens": "mean"}
        if len(chosen) != 1 or chosen[0] not in kinds:
            raise ModelError(
                f"'{location}' is pooled by {' and '.join(map(str, chosen)) or 'nothing'}, which is none of "
                f"{', '.join(kinds)}; set student.pooling to one of {', '.join(SENTENCE_TRANSFORMERS_POOLINGS)}"
            )
        return kinds[chosen[0]]  # the mean by the square root has the direction of the mean
    return "last" if is_decoder(model_config) and not config.bidirectional else "mean"


def is_decoder(model_config: Any) -> bool:
    """Whether a model with this configuration predicts the next token."""
    architecture = (getattr(model_config, "architectures", None) or [""])[0]
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or model_config.model_type in _DECODER_TYPES


SENTENCE_TRANSFORMERS_POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "first": "cls",
    "last": "lasttoken",
}
"""The kinds of pooling that sentence-transformers has, with their names there."""
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DECODER_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gpt2"}
)


Read = Callable[[], Float[Tensor, "batch tokens dim"]]
"""Runs the model on a batch and returns its last states."""


def read_depths(
    layers: nn.ModuleList, final: nn.Module, depths: Sequence[int], read: Read
) -> list[Float[Tensor, "batch tokens dim"]]:
    """The states after the first ``depths`` of a model's layers, then those after all of them, with their gradient.

    Args:
        layers: the model's layers.
        final: what follows the last layer (``final_module``).
        depths: numbers of layers, each below that of the model.
        read: runs the model.
    """
    outputs: dict[int, Tensor] = {}
    hooks = [_keep_output(layers[depth - 1], outputs, depth) for depth in depths]
    try:
        last = read()
    finally:
        for hook in hooks:
            hook.remove()
    return [*(final(outputs[depth]).view_as(last) for depth in depths), last]


def final_module(model: nn.Module, layers: nn.ModuleList, read: Read, *, name: str) -> nn.Module:
    """What a model does to the states of its last layer: a norm, or nothing (``nn.Identity``), found by running it.

    Raises:
        ModelError: something else follows the layers of the model (``name`` in the message).
    """
    outputs: dict[int, Tensor] = {}
    followers: list[tuple[nn.Module, Any]] = []

    def follow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and inputs[0] is outputs.get(0):
            followers.append((module, output))

    inside = {id(module) for module in layers.modules()}
    outside = [module for module in model.modules() if id(module) not in inside and module is not model]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout after the norm would hide it
    hooks = [_keep_output(layers[-1], outputs, 0), *(module.register_forward_hook(follow) for module in outside)]
    try:
        with torch.no_grad():
            last = read()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if torch.equal(outputs[0].view_as(last), last):
        return nn.Identity()
    for module, output in followers:
        if isinstance(output, Tensor) and output.numel() == last.numel() and torch.equal(output.view_as(last), last):
            return module
    raise ModelError(
        f"'{name}' ({type(model).__name__}) has more than a norm after its last layer, so its states cannot be read "
        "after fewer layers: delete losses.nested_cross_entropy.layers, or use another model"
    )


def _keep_output(layer: nn.Module, outputs: dict[int, Tensor], key: int) -> RemovableHandle:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs[key] = output[0] if isinstance(output, tuple) else output

    return layer.register_forward_hook(keep)


# Weights in 8 or 4 bits, quantised while a model is loaded ------------------------------------------------------------

EXTRA = "large"
_MARKS = {"8bit": "is_loaded_in_8bit", "4bit": "is_loaded_in_4bit"}  # what PEFT looks for on a model to adapt


def quantized_options(
    quantization: Quantization, *, device: torch.device, dtype: torch.dtype, what: str
) -> dict[str, Any]:
    """Options of ``load_pretrained`` that quantise the weights of ``what`` on a device; empty for "none".

    Source of 8 bits: Dettmers et al., "LLM.int8()", NeurIPS 2022. Of 4 bits (NF4, double quantisation), and of adapters
    tuned on them: Dettmers et al., "QLoRA", NeurIPS 2023.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
    """
    if quantization == "none":
        return {}
    purpose = f"a {what} in {quantization.removesuffix('bit')} bits"
    require("accelerate", extra=EXTRA, purpose=purpose)
    require("bitsandbytes", extra=EXTRA, purpose=purpose)
    return {"quantization_config": _quantization_config(quantization, dtype), "device_map": {"": device}}


def prepare_quantized(model: nn.Module, quantization: Quantization) -> None:
    """Prepare a part of a model whose layers are quantised for adapters; does nothing for "none"."""
    if quantization == "none":
        return
    setattr(model, _MARKS[quantization], True)  # transformers marks only the whole model
    for layer in model.modules():
        # On a CPU, a 4-bit layer packs its weights when it is first used, and from then on gives no gradient.
        if "support_avx512bf16_for_cpu" in vars(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # It says in every layer and batch that it computes outliers in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
