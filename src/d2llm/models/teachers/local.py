"""Common base of teachers with local weights: loading, identity, truncation, batching, tuning and saving.

``TeacherConfig.model`` names pretrained weights, an adapter on them, or a whole tuned model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.extras import require
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json
from d2llm.core.manifest import write_manifest
from d2llm.core.progress import Advance
from d2llm.core.types import Task
from d2llm.models.device import (
    checkpoint_layers,
    choose_device,
    choose_dtype,
    inference,
    size_of_states,
    tokens_to_read,
    use_plain_attention_on_cpu,
)
from d2llm.models.length_limit import check_limits, cut_pair
from d2llm.models.lora import (
    adapter_state,
    attach_lora,
    compute_adapter,
    join_adapters,
    merge_adapter,
    train_adapters_only,
)
from d2llm.models.pretrained import EXTRA, prepare_quantized, quantized_options
from d2llm.models.sources import (
    find_model,
    fingerprint_model,
    load_pretrained,
    load_tensors,
    load_tokenizer,
    quiet_transformers,
)
from d2llm.models.teachers.identity import (
    ADAPTER_FILE,
    TEACHER_FORMAT_VERSION,
    TEACHER_KIND,
    chosen_quantization,
    config_of,
    fingerprint_prompt,
    identify_local_teacher,
    read_tuned_teacher,
    require_same_base,
    with_quantization,
)
from d2llm.models.teachers.pair_teacher import PartialScores, TeacherScores, TextPair
from d2llm.ops.batching import pad_right, token_budget_batches
from d2llm.recipe import LocalTeacherConfig, LoraConfig, Quantization, TeacherIdentity

_T = TypeVar("_T", bound="LocalTeacher")
_BATCH_PAIRS = 256


class Answers:
    """The scores of n pairs, filled in batch by batch."""

    def __init__(self, num_pairs: int, dim: int | None) -> None:
        self.num_truncated = self.num_tokens = 0
        self.is_scored = np.zeros(num_pairs, np.bool_)
        self.log_odds: NDArray[np.float32] = np.empty(num_pairs, dtype=np.float32)
        self.features: NDArray[np.float32] | None = (
            None if dim is None else np.empty((num_pairs, dim), dtype=np.float32)
        )

    def put(
        self, pairs: Sequence[int], log_odds: Float[Tensor, " pairs"], features: Float[Tensor, "pairs dim"] | None
    ) -> None:
        """Store the answers for the pairs with these indices."""
        self.log_odds[pairs] = log_odds.cpu().numpy()
        if self.features is not None and features is not None:
            self.features[pairs] = features.cpu().numpy()
        self.is_scored[pairs] = True


class LocalTeacher(nn.Module):
    """A pretrained model that scores pairs; the kinds differ in how they ask and where they read the answer."""

    kind: ClassVar[Literal["causal", "seq2seq", "classifier"]]
    _auto_class: ClassVar[str]
    """The class of ``transformers`` that loads the model."""

    def __init__(self, config: LocalTeacherConfig, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Load what ``config.model`` names: pretrained weights, a folder that ``save`` wrote, or a shipped teacher.

        Raises:
            ModelNotFoundError: there are no usable weights.
            ModelError: the model is of another kind, or the tuned adapter cannot be read.
            MismatchError: the teacher was tuned on weights other than those that its base model's name refers to here.
            AnswerTokenError: an answer word is not one distinct token.
            InputError: there is no such prompt set, or ``max_tokens`` is more than the model can read.
        """
        super().__init__()
        import transformers

        tuned = read_tuned_teacher(config)
        self.quantization: Quantization = chosen_quantization(config, tuned)
        tuned_config = config_of(config, tuned).as_kind(self.kind, quantization=self.quantization)
        self.config = cast(LocalTeacherConfig, tuned_config)
        self.compute_dtype = compute_dtype
        self.location = find_model(self.config.model)
        self.base_fingerprint = fingerprint_model(self.location)
        require_same_base(tuned, self.base_fingerprint, self.config.model)
        own_fingerprint = tuned.fingerprint if tuned else self.base_fingerprint
        self.fingerprint: str = with_quantization(own_fingerprint, self.quantization)
        self.tokenizer = load_tokenizer(self.location)
        auto_class = getattr(transformers, self._auto_class)
        options = _loading_options(config, self.quantization, device=device, dtype=compute_dtype)
        whole: Any = load_pretrained(auto_class, self.location, dtype=compute_dtype, **options, **self._head_options())
        # A classifier reads its score at the last token that is not padding, by its own padding id.
        whole.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        require_on_devices(whole, self.config.model)
        whole = (whole if "device_map" in options else whole.to(device)).eval().requires_grad_(False)
        self._whole = (whole,)  # in a tuple, so that torch does not register its weights twice
        self.model: nn.Module = self._scoring_part(whole)
        prepare_quantized(self.model, self.quantization)
        self._adapter: dict[str, Tensor] = (
            load_tensors(tuned.folder / ADAPTER_FILE, remedy="restore the teacher's folder or tune it again")
            if tuned and tuned.base_fingerprint is not None
            else {}
        )
        (merge_adapter if self.quantization == "none" else compute_adapter)(self.model, self._adapter)
        check_limits(whole.config, self.config.model, {"max_tokens": self.config.max_tokens})
        self._lora: LoraConfig | None = None
        self._is_tuned_whole = False

    @classmethod
    def load(
        cls: type[_T],
        config: LocalTeacherConfig,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> _T:
        """Load a teacher, by default on the fastest device here and in the number format that is fastest on it.

        Raises (besides the errors of the constructor):
            MissingExtraError: a package for quantised weights or several GPUs is not installed.
            InputError: the device does not exist, or the teacher does not fit into the GPUs of ``device_map``.
        """
        _check_device(config, device)
        chosen = choose_device(device)
        return cls(config, device=chosen, compute_dtype=choose_dtype(chosen, dtype or config.dtype))

    @classmethod
    def identify(cls, config: LocalTeacherConfig) -> TeacherIdentity:
        return identify_local_teacher(config)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.model.parameters()).device

    @property
    def dim(self) -> int | None:
        """Width of the features; None if this model has none."""
        raise NotImplementedError

    def prompt_fingerprint(self, task: Task) -> str:
        return fingerprint_prompt(self.config, task)

    def tokenize(self, pairs: Sequence[TextPair], task: Task) -> tuple[list[Any], int]:
        """The items that ``pad`` takes (one per pair, one element per token), and how many pairs lost text."""
        raise NotImplementedError

    def pad(self, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Convert items from ``tokenize`` to tensors for ``forward``."""
        return self._pad(inputs)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "pairs tokens"], Bool[Tensor, "pairs tokens"]]:
        return pad_right(rows, self._padding, self.device)

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Score pairs, in batches of similar length; arguments and result as for ``PairTeacher.score_pairs``."""
        return self.score_until_error(pairs, task, with_features=with_features, advance=advance).require_all()

    def score_until_error(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> PartialScores:
        """Score pairs; Ctrl-C does not lose the batches before it (``InterruptibleTeacher``)."""
        answers, interruption = Answers(len(pairs), self.dim if with_features else None), None
        try:
            self._score(pairs, task, answers, advance)
        except KeyboardInterrupt as error:
            interruption = error
        scores = TeacherScores(answers.log_odds, answers.features, answers.num_truncated, answers.num_tokens)
        return PartialScores(scores, answers.is_scored, interruption)

    def prepare_training(
        self,
        lora: LoraConfig,
        *,
        tuning: Literal["lora", "full"] = "lora",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        """Attach trainable adapters while everything else stays frozen, or make every weight trainable.

        With ``gradient_checkpointing``, the backward pass computes each layer again instead of keeping its activations.

        Raises:
            ModelError: the model has no layers for adapters, or none that can be computed again.
            InputError: full tuning was requested but the weights are not float32.
        """
        if tuning == "full":
            if self.quantization != "none" or next(self.model.parameters()).dtype != torch.float32:
                raise InputError("full tuning needs float32 weights; load the teacher with dtype='float32'")
            self._is_tuned_whole = True
            self._whole[0].requires_grad_(True)
            _disable_attention_dropout(self._whole[0])
        else:
            self._lora = lora
            attach_lora(self.model, lora, seed=seed)
        use_plain_attention_on_cpu(self._whole[0])
        if gradient_checkpointing:
            checkpoint_layers(self.model, self.config.model)

    def train(self: _T, mode: bool = True) -> _T:
        """Switch training mode; with LoRA, only the adapters' dropout is switched on."""
        super().train(mode)
        if not self._is_tuned_whole:
            train_adapters_only(self.model, mode)
        return self

    def save(self, folder: Path, content: dict[str, Any]) -> str:
        """Write what tuning changed (an adapter, or the whole model) into a folder; returns the tuned fingerprint.

        The manifest has the fingerprint without regard to how the weights were stored during tuning.
        ``TeacherConfig(model=str(folder))`` loads it again. The manifest also gets ``content`` (data, figures).
        """
        if self._is_tuned_whole:
            with quiet_transformers():
                self._whole[0].save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            own_fingerprint = fingerprint_model(str(folder))
        else:
            save_file(self.tuned_state(), folder / ADAPTER_FILE)
            own_fingerprint = fingerprint_json([self.base_fingerprint, fingerprint_files([folder / ADAPTER_FILE])])
        self.fingerprint = with_quantization(own_fingerprint, self.quantization)
        write_manifest(
            folder,
            TEACHER_KIND,
            TEACHER_FORMAT_VERSION,
            {
                **content,
                "fingerprint": own_fingerprint,
                "base_fingerprint": self.base_fingerprint,
                "holds": "model" if self._is_tuned_whole else "adapter",
                "config": self.config.model_dump(exclude={"dtype", "device_map"}),  # those depend on the machine
                "lora": self._lora.model_dump() if self._lora else None,
            },
        )
        return self.fingerprint

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changed since the pretrained weights, as an adapter of plain tensors."""
        return join_adapters(self._adapter, adapter_state(self.model))

    def _head_options(self) -> dict[str, Any]:
        """Options of ``load_pretrained`` for the layers that produce the answer."""
        return {}

    def _scoring_part(self, whole: Any) -> nn.Module:
        """The part of the model that adapters go into."""
        return cast(nn.Module, whole)

    def _score(self, pairs: Sequence[TextPair], task: Task, answers: Answers, advance: Advance | None) -> None:
        """Fill in the answers."""
        inputs, answers.num_truncated = self.tokenize(pairs, task)
        answers.num_tokens = sum(map(len, inputs))
        self._score_whole(inputs, range(len(inputs)), task, answers, advance)

    def _score_whole(
        self, inputs: Sequence[Any], indices: Sequence[int], task: Task, answers: Answers, advance: Advance | None
    ) -> None:
        """Score the inputs with the given ``indices``, each read as a whole."""
        for chosen in self._batches(indices, [len(inputs[index]) for index in indices]):
            with inference(self):
                log_odds, features = self(*self.pad([inputs[index] for index in chosen]), task)
            answers.put(chosen, log_odds, features)
            if advance is not None:
                advance(len(chosen))

    def _batches(self, indices: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batches of indices of inputs of similar length."""
        max_tokens = tokens_to_read(self.device, size_of_states(self.model))
        for batch in token_budget_batches(lengths, max_tokens=max_tokens, max_items=_BATCH_PAIRS):
            yield [indices[index] for index in batch]

    @property
    def _padding(self) -> int:
        return cast(int, self.tokenizer.pad_token_id or 0)

    def _number_format(self) -> torch.autocast:
        """Autocast, enabled only if trained float32 weights are mixed with weights in a smaller format."""
        mixed = self.compute_dtype != torch.float32 and (self._lora is not None or self._is_tuned_whole)
        return torch.autocast(self.device.type, self.compute_dtype, enabled=mixed)


_Row = TypeVar("_Row", bound="Sequence[Any]")


def fit_pairs(
    pairs: Sequence[TextPair], tokenizer: Any, encode: Callable[[Sequence[TextPair]], list[_Row]], *, max_tokens: int
) -> tuple[list[_Row], int]:
    """Inputs of at most ``max_tokens`` tokens, and how many pairs lost text.

    Excess tokens are cut from the end of the passage; a query that would leave the passage less than half of the room
    is itself cut to half. ``encode`` makes the complete inputs of pairs. The tokenizer must be a fast one, which gives
    the character offsets of each token.

    Raises:
        InputError: the tokens around the texts alone fill ``max_tokens``.
    """
    if not pairs:
        return [], 0
    around = len(encode([("", "")])[0])
    if max_tokens - around < 2:
        raise InputError(
            f"max_tokens is {max_tokens}, but prompt and special tokens alone take {around}; raise max_tokens"
        )
    rows = encode(pairs)
    too_long = [index for index, row in enumerate(rows) if len(row) > max_tokens]
    for index in too_long:
        room = max_tokens - around
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        offsets = [tokenizer(text, **options)["offset_mapping"] for text in pairs[index]]
        query_ends, passage_ends = ([end for _, end in spans] for spans in offsets)
        # Tokens may merge or split where the parts meet, so the result can be a token too long.
        while len(row := encode([cut_pair(pairs[index], (query_ends, passage_ends), room)])[0]) > max_tokens:
            room -= len(row) - max_tokens
        rows[index] = row
    return rows, len(too_long)


def _disable_attention_dropout(model: nn.Module) -> None:
    """Switch off the dropout of BERT-like models' attention: a quarter of a training step on a CPU (docs/log)."""
    for name, module in model.named_modules():
        if name.endswith("attention.self.dropout") and isinstance(module, nn.Dropout):
            module.p = 0.0


def _check_device(config: LocalTeacherConfig, device: str | torch.device | None) -> None:
    """Raise an ``InputError`` if a device is named for a teacher that is to be spread over all GPUs."""
    if config.device_map is not None and str(device) not in {"None", "cuda"}:
        raise InputError(
            f"teacher '{config.model}' is to be spread over all GPUs (device_map is {config.device_map}), so it cannot "
            f"be on {device} alone; leave the device out, or the device_map"
        )


def _loading_options(
    config: LocalTeacherConfig, quantization: Quantization, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Options of ``load_pretrained`` that put the weights where they belong; empty if the model is moved afterwards.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
    """
    options = quantized_options(quantization, device=device, dtype=dtype, what="teacher")
    if config.device_map is not None:
        require("accelerate", extra=EXTRA, purpose="a teacher on several GPUs")
        options["device_map"] = config.device_map
    return options


def require_on_devices(whole: Any, name: str) -> None:
    """Raise an ``InputError`` if a part of a model was left in memory or on disk because the GPUs are too small.

    Such a part would be copied to a GPU for every batch.
    """
    devices = {str(device) for device in getattr(whole, "hf_device_map", {}).values()}
    elsewhere = devices & {"cpu", "disk"}
    if elsewhere and devices != {"cpu"}:
        raise InputError(
            f"teacher '{name}' does not fit into the memory of the GPUs here: a part of it would stay on "
            f"{' and '.join(sorted(elsewhere))}. Use more GPUs, or load it in fewer bits (teacher.quantization)"
        )
